"""python -m hstu_ops train: trains a recommender and says how good it is after every epoch."""

from __future__ import annotations

import argparse
import contextlib
import pickle
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .data import Dataset, read_ratings, synthetic_stream
from .recommender import HSTURecommender

METRICS = ("HR@10", "HR@50", "NDCG@10")
COMPARED = ("transformer", "softmax-hstu", "hstu")
FULL_SOFTMAX_ITEMS = 10_000  # up to this many items the default is a softmax over all


def _at_least(least: float, kind: type = int) -> Callable[[str], float]:
    """An argparse type: a finite number that is not below `least`."""

    def number(text: str) -> float:
        value = kind(text)
        if not least <= value < 2**63:
            raise argparse.ArgumentTypeError(f"expected at least {least}, got {text}")
        return value

    number.__name__ = kind.__name__  # in argparse's own message
    return number


_AMOUNT, _COUNT, _POSITIVE = _at_least(0, float), _at_least(0), _at_least(1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    data = parser.add_argument_group("data")
    data.add_argument("--scale", type=_AMOUNT, default=0.1, help="of the synthetic stream (default: %(default)s)")
    data.add_argument("--ratings", metavar="FILE", help="MovieLens ratings.dat, ratings.csv or u.data instead")
    data.add_argument(
        "--max-seq-len", type=_POSITIVE, help="items of a history that are read (default: 128; ratings: 200)"
    )
    model = parser.add_argument_group("model")
    model.add_argument("--encoder", choices=("hstu", "reference", "softmax-hstu", "transformer"), default="hstu")
    model.add_argument("--dim", type=_POSITIVE, default=64, help="of embeddings (default: %(default)s)")
    model.add_argument("--layers", type=_POSITIVE, default=2)
    model.add_argument("--heads", type=_POSITIVE, default=2)
    model.add_argument("--relative-bias", choices=("none", "position", "time", "position+time"))
    model.add_argument("--dropout", type=float, help="default: 0; ratings: 0.2")
    model.add_argument("--temperature", type=_AMOUNT, help="of cosines; 0: inner products (default; ratings: 0.05)")
    model.add_argument("--actions", action="store_true", help="embed the ratings too")
    loop = parser.add_argument_group("training")
    loop.add_argument(
        "--epochs", type=_POSITIVE, help="parts of the stream, which is read once (5); ratings: passes (30)"
    )
    loop.add_argument("--batch-size", type=_POSITIVE, default=64, help="users (default: %(default)s)")
    loop.add_argument("--lr", type=float, default=2e-3, help="of AdamW (default: %(default)s)")
    loop.add_argument(
        "--negatives", type=_COUNT, help=f"of sampled softmax; 0: none (up to {FULL_SOFTMAX_ITEMS} items)"
    )
    loop.add_argument("--candidates", type=_COUNT, default=0, help="also train ranking, among this many negatives")
    loop.add_argument("--seed", type=_COUNT, default=0)
    loop.add_argument("--output", type=Path, default=Path("hstu_run"), help="folder of checkpoints and the plot")
    loop.add_argument("--resume", action="store_true", help="continue from the checkpoints in --output")
    loop.add_argument("--baseline", action="store_true", help=f"train {', '.join(COMPARED)}; print and plot them")


@dataclass
class Run:
    """Training of one model: everything that a checkpoint holds."""

    model: HSTURecommender
    optimizer: torch.optim.Optimizer
    arguments: dict
    history: list[dict] = field(default_factory=list)  # one an epoch

    def save(self, path: Path, dataset: Dataset) -> None:
        """HSTURecommender.load reads it too."""
        content = dict(config=self.model.config, state=self.model.state_dict(), optimizer=self.optimizer.state_dict())
        content.update(arguments=self.arguments, history=self.history, item_ids=dataset.item_ids)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(path)

    def resume(self, path: Path, device: str, dataset: Dataset) -> None:
        try:
            content = torch.load(path, map_location=device, weights_only=True)
            arguments, items = content["arguments"], content["item_ids"]
        except (RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
            raise ValueError(f"hstu_ops: --resume: {path} is no checkpoint of a training: {error!r}") from None
        changed = [x for x, value in self.arguments.items() if arguments.get(x) != value]
        if changed:
            was = ", ".join(f"{x} {arguments.get(x)} (now {self.arguments[x]})" for x in changed)
            raise ValueError(f"hstu_ops: --resume: {path} was trained with {was}")
        if items is not None and not torch.equal(items.cpu(), dataset.item_ids):
            raise ValueError(f"hstu_ops: --resume: {path} was trained with other items")
        self.model.load_state_dict(content["state"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.history = content["history"]


def train(arguments: argparse.Namespace) -> int:
    """Trains an HSTU recommender on the paper's synthetic stream, or on MovieLens ratings; prints HR@10, HR@50 and
    NDCG@10 after every epoch.
    """
    try:
        dataset = _dataset(arguments)
        print(dataset)
        if dataset.best is not None:
            print("best possible: " + ", ".join(f"{x} {value:.4f}" for x, value in dataset.best.items()))
            longest, read = int(dataset.test.lengths.max()), arguments.max_seq_len
            if read is not None and read + 1 < longest:
                print(f"  that is of all {longest} items of a record; of the last {read} are the figures below")
        runs = {}
        for encoder in COMPARED if arguments.baseline else (arguments.encoder,):
            runs[encoder] = fit(encoder, dataset, arguments)
    except (OSError, ValueError) as error:
        print(f"python -m hstu_ops train: {error}", file=sys.stderr)
        return 2
    if arguments.baseline:
        _compare(runs, dataset, arguments)
    return 0


def _dataset(arguments: argparse.Namespace) -> Dataset:
    if arguments.ratings is None:
        return synthetic_stream(arguments.scale, seed=arguments.seed)
    return read_ratings(arguments.ratings)


def fit(encoder: str, dataset: Dataset, arguments: argparse.Namespace) -> Run:
    """Trains one model; prints as it goes."""
    stream, device = dataset.stream, arguments.device
    epochs = arguments.epochs or (5 if stream else 30)
    if stream and epochs > len(dataset.train):
        raise ValueError(f"--epochs: expected at most {len(dataset.train)}, a record of the stream each, got {epochs}")
    run = _start(encoder, dataset, arguments, epochs)
    weights = sum(p.numel() for n, p in run.model.named_parameters() if n.startswith("encoder."))
    print(f"\n{encoder}: {arguments.layers} layers, {weights} weights in the encoder; {device}\n")
    path = arguments.output / f"{encoder}.pt"
    if arguments.resume and path.exists():
        run.resume(path, device, dataset)
        print(f"continuing {path} after epoch {len(run.history)}")
    print(f"{'epoch':>6}{'loss':>9}" + "".join(f"{x:>9}" for x in METRICS) + f"{'time':>9}{'ms/step':>10}")
    for row in run.history:
        _print_row(row)
    for epoch in range(len(run.history), epochs):
        # Everything random in an epoch follows from the seed and its number, so that it can be resumed there.
        torch.manual_seed(1_000_003 * arguments.seed + epoch)
        began = time.perf_counter()
        loss, step = _epoch(run, dataset, arguments, epoch, epochs)
        metrics = evaluate(run.model, dataset, arguments.batch_size, autocast=_autocast(arguments))
        run.history.append(dict(epoch=epoch + 1, loss=loss, **metrics, time=time.perf_counter() - began, step=step))
        _print_row(run.history[-1])
        run.save(path, dataset)
    return run


def _start(encoder: str, dataset: Dataset, arguments: argparse.Namespace, epochs: int) -> Run:
    stream = dataset.stream
    relative_bias = arguments.relative_bias or ("position" if stream else "position+time")
    dropout, temperature = (
        default if given is None else given
        for given, default in (
            (arguments.dropout, 0.0 if stream else 0.2),
            (arguments.temperature, 0.0 if stream else 0.05),
        )
    )
    torch.manual_seed(arguments.seed)
    model = HSTURecommender(
        dataset.num_items,
        max_seq_len=arguments.max_seq_len or (128 if stream else 200),
        embedding_dim=arguments.dim,
        num_layers=arguments.layers,
        num_heads=arguments.heads,
        num_actions=dataset.num_actions if arguments.actions else 0,
        relative_bias="none" if encoder == "transformer" else relative_bias,
        dropout=dropout,
        temperature=temperature or None,
        encoder=encoder,
    ).to(arguments.device)
    fused = str(arguments.device).startswith("cuda")  # one kernel for all weights
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=fused or None
    )
    deciding = ("scale", "ratings", "batch_size", "lr", "negatives", "candidates", "seed", "dtype")
    given = {x: getattr(arguments, x) for x in deciding}
    return Run(model, optimizer, dict(given, epochs=epochs if stream else None, **model.config))


def _epoch(run: Run, dataset: Dataset, arguments: argparse.Namespace, epoch: int, epochs: int) -> tuple[float, float]:
    """One pass, or one of the equal parts of a stream; the mean loss, and the mean seconds of a step but the first."""
    train, model, size = dataset.train, run.model.train(), arguments.batch_size
    if dataset.stream:
        first, end = (len(train) * e // epochs for e in (epoch, epoch + 1))
        order = torch.arange(first, end)
    else:
        order = torch.nonzero(train.lengths >= 2)[:, 0]
        order = order[torch.randperm(len(order))]
    negatives = arguments.negatives
    if negatives is None:
        negatives = 0 if dataset.num_items <= FULL_SOFTMAX_ITEMS else 1024
    total, batches, began = 0.0, order.split(size), time.perf_counter()
    for step, users in enumerate(progress(batches, f"epoch {epoch + 1}")):
        # One more than the model reads: the last is only predicted.
        histories = train.users(users).recent(model.max_seq_len + 1).to(arguments.device)
        with _autocast(arguments):
            loss = model.next_item_loss(histories, num_negatives=negatives or None)
            if arguments.candidates:
                loss = loss + model.ranking_loss(histories, num_negatives=arguments.candidates)
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        total += loss.detach()
        if step == 0:
            float(total)  # waits for a GPU, as the result below does
            began = time.perf_counter()
    loss = float(total) / max(len(batches), 1)
    return loss, (time.perf_counter() - began) / max(len(batches) - 1, 1)


def _autocast(arguments: argparse.Namespace):
    if arguments.dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(arguments.device, getattr(torch, arguments.dtype))


@torch.no_grad()
def evaluate(model: HSTURecommender, dataset: Dataset, batch_size: int, autocast=None) -> dict[str, float]:
    """HR@10, HR@50 and NDCG@10 among all items, over every item of a stream's test, or over each user's last one
    (the items of the user's history are then not ranked).
    """
    model.eval()
    device = model.item_embedding.weight.device
    ranks = []
    for users in torch.arange(len(dataset.test)).split(batch_size):
        whole = dataset.test.users(users)
        histories = whole.recent(model.max_seq_len + 1).to(device)
        inputs, following = histories.split_last()
        times = histories.timestamps
        with autocast or contextlib.nullcontext():
            rows = model(inputs, request_timestamps=None if times is None else times[histories.seq_offsets[1:] - 1])
        right = histories.items[following]
        if not dataset.stream:
            last = inputs.seq_offsets[1:] - 1
            rows, right = rows[last], right[last]
        logits = model.item_logits(rows)
        score = logits.gather(1, right[:, None])
        if not dataset.stream:
            seen = whole.split_last()[0].to(device)
            logits[seen.sequence, seen.items] = -torch.inf
        # The right item, its equals and NaN are counted as better, so that equal scores for all are no hit, nor NaN.
        ahead = ~(logits < score)
        ranks.append((ahead.sum(1) - ahead.gather(1, right[:, None])[:, 0].long()).cpu())
    return metrics_of(torch.cat(ranks))


def metrics_of(ranks: Tensor) -> dict[str, float]:
    """Of the ranks of the right items, 0 being the best."""
    gain = torch.where(ranks < 10, 1 / torch.log2(ranks.double() + 2), 0)
    values = ((ranks < 10).double().mean(), (ranks < 50).double().mean(), gain.mean())
    return {name: value.item() for name, value in zip(METRICS, values, strict=True)}


def popularity(dataset: Dataset) -> dict[str, float]:
    """The metrics of ranking items by how often they occur in the training data."""
    count = torch.bincount(dataset.train.items, minlength=dataset.num_items).double()
    ranks = []
    for users in torch.arange(len(dataset.test)).split(64):
        whole = dataset.test.users(users)
        inputs, following = whole.split_last()
        right = whole.items[following]
        if dataset.stream:
            better = count.sort().values
            ranks.append(len(count) - torch.searchsorted(better, count[right]) - 1)
            continue
        right = right[inputs.seq_offsets[1:] - 1]
        scores = count.repeat(len(right), 1)
        scores[inputs.sequence, inputs.items] = -1
        ranks.append((scores >= count[right][:, None]).sum(1) - 1)
    return metrics_of(torch.cat(ranks))


def progress(items: Iterable, label: str) -> Iterator:
    """The items, with a bar on a terminal."""
    items, shown = list(items), sys.stderr.isatty()
    for done, item in enumerate(items):
        if shown:
            bar = "#" * (30 * done // len(items))
            print(f"\r{label} [{bar:30}] {done}/{len(items)}", end="", file=sys.stderr, flush=True)
        yield item
    if shown:
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _print_row(row: dict) -> None:
    metrics = "".join(f"{row[x]:9.4f}" for x in METRICS)
    step = f"{1e3 * row['step']:10.3f}" if "step" in row else ""  # older checkpoints have none
    print(f"{row['epoch']:6}{row['loss']:9.4f}{metrics}{row['time']:7.1f} s{step}", flush=True)


def _compare(runs: dict[str, Run], dataset: Dataset, arguments: argparse.Namespace) -> None:
    """The table, and the plot if matplotlib is installed."""
    rows = {"popularity": popularity(dataset), **{name: run.history[-1] for name, run in runs.items()}}
    if dataset.best is not None:
        rows["best possible"] = dataset.best
    print(f"\n{'':14}" + "".join(f"{x:>9}" for x in METRICS) + f"{'time':>9}{'ms/step':>10}")
    for name, row in rows.items():
        spent = ""
        if name in runs:
            history = runs[name].history
            steps = [x["step"] for x in history if "step" in x]
            spent = f"{sum(x['time'] for x in history):7.1f} s{1e3 * sum(steps) / max(len(steps), 1):10.3f}"
        print(f"{name:14}" + "".join(f"{row[x]:9.4f}" for x in METRICS) + spent)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno plot: pip install 'hstu_ops[plot]'")
        return
    figure = Figure(figsize=(9, 3), layout="constrained")
    for metric, axes in zip(METRICS, figure.subplots(1, len(METRICS)), strict=True):
        for name, run in runs.items():
            axes.plot([x["epoch"] for x in run.history], [x[metric] for x in run.history], marker=".", label=name)
        axes.axhline(rows["popularity"][metric], color="gray", linestyle=":", label="popularity")
        axes.set(xlabel="epoch", title=metric, ylim=(0, None))
    axes.legend(fontsize="small")
    path = arguments.output / "training.png"
    figure.suptitle(str(dataset), fontsize="small")
    figure.savefig(path, dpi=150)
    print(f"\nplot: {path}")
