"""The paper's efficiency figure: an HSTU encoder beside a Transformer on FlashAttention2, by length of the sequences.

Both have the same width, heads and number of layers; the Transformer is pre-norm with a feed-forward part 4 times as
wide. In training HSTU reads sequences of Stochastic Length, each cut to N^(alpha / 2) rows or left whole with
probability N^(alpha - 2) (the expected number of whole ones of this batch, rounded up), and the Transformer whole ones;
alpha 2 cuts nothing, so its line compares the two at equal length. In inference both read whole sequences: all of
length N, and once more ("jagged") of lengths from 0.1 N to N, where "Transformer, padded" is what one without kernels
for jagged rows computes.

One line a model, length and pass: time and spread, original rows a second (those that were cut away count), memory held
at most beyond weights and input, how many times as long the Transformer takes at this length, how many times at most it
could be (if HSTU's matrix products and kept pairs of attention ran at the rate of a large matrix product and all else
took no time), and where the time of the device goes: attention, matrix products, everything else, and the rest of the
step, in which it waits.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import problems
import torch
from torch.profiler import ProfilerActivity, profile

import hstu_ops
from hstu_ops.baselines import Transformer

PAPER = "the paper, against FlashAttention2 at N 8192: training up to 15.2x, inference 5.6x"
COLUMNS = {"model": "<22", "pass": "<9", "N": ">5", "batch": ">5", "rows": ">7", "ms": ">9.3f", "+-%": ">5.1f"}
COLUMNS |= {"Mrows/s": ">7.3g", "MiB": ">7", "x": ">6.2f", "most": ">6.2f"}
COLUMNS |= dict.fromkeys(("attention", "products", "pointwise", "waiting"), ">9.2f")  # ms
ATTENTION = ("attention", "flash", "fmha", "layer_core")  # in names of kernels, or of ops on a CPU
PRODUCTS = ("gemm", "nvjet", "cutlass", "xmma", "splitk", "aten::mm", "aten::addmm", "cublas")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("encoder", __doc__)
    p.add_argument("--lengths", type=common.numbers, help="N (default 1024,2048,4096,8192 on CUDA, 256,512 on CPU)")
    p.add_argument("--tokens", type=int, help="rows of a batch before cuts (default 262144 on CUDA, 2048 on CPU)")
    p.add_argument("--layers", type=int, help="(default 2; the time of both models is that of so many)")
    p.add_argument("--width", type=int, default=512, help="d (default 512)")
    p.add_argument("--heads", type=int, default=8, help="h (default 8); d_qk = d_v = d / h")
    p.add_argument("--alphas", help="of Stochastic Length (default 1.6,1.7,1.8,1.9,2.0; with --quick 1.6,2.0)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="(default bf16 on CUDA, fp32 on CPU)")
    return p.parse_args(argv)


@dataclass(frozen=True)
class Case:
    model: str  # "Transformer", "Transformer, padded", "HSTU" or "HSTU + bias"
    length: int
    batch: int
    training: bool
    alpha: float | None = None  # of Stochastic Length
    jagged: bool = False

    @property
    def kind(self) -> str:
        return "training" if self.training else "jagged" if self.jagged else "inference"

    @property
    def original(self) -> list[int]:
        """Lengths of the sequences before any cut."""
        if not self.jagged:
            return [self.length] * self.batch
        return [max(1, round(self.length * (0.1 + 0.9 * (i + 0.5) / self.batch))) for i in range(self.batch)]

    @property
    def lengths(self) -> list[int]:
        """Of the sequences that the model reads."""
        if self.model == "Transformer, padded":
            return [self.length] * self.batch
        if self.alpha is None:
            return self.original
        cut = math.floor(self.length ** (self.alpha / 2) * (1 + 1e-12))
        whole = math.ceil(self.batch * self.length ** (self.alpha - 2) * (1 - 1e-12))
        return [self.length] * whole + [cut] * (self.batch - whole)

    @property
    def label(self) -> str:
        return f"{self.model}" + ("" if self.alpha in (None, 2) else f", alpha {self.alpha:g}")


def choose(args: argparse.Namespace, device: str) -> list[Case]:
    cuda = device == "cuda"
    if args.quick:
        lengths, tokens, alphas = ([1024, 4096], 32768, "1.6,2.0") if cuda else ([256], 512, "1.6,2.0")
    else:
        lengths, tokens = ([1024, 2048, 4096, 8192], 262144) if cuda else ([256, 512], 2048)
        alphas = "1.6,1.7,1.8,1.9,2.0"
    lengths, tokens = args.lengths or lengths, args.tokens or tokens
    alphas = [float(x) for x in (args.alphas or alphas).split(",")]
    if min(lengths) < 1 or tokens < 1 or not all(1 < x <= 2 for x in alphas):
        raise ValueError("--lengths, --tokens: expected at least 1; --alphas: expected numbers in (1, 2]")
    cases = []
    for n in lengths:
        batch = max(1, tokens // n)
        for training in (True, False):
            cases.append(Case("Transformer", n, batch, training))
            for model in ("HSTU", "HSTU + bias"):
                cases += [Case(model, n, batch, training, x) for x in (reversed(alphas) if training else (None,))]
        models = ("Transformer", "Transformer, padded", "HSTU", "HSTU + bias")
        cases += [Case(model, n, batch, False, jagged=True) for model in models]
    return cases


def build(case: Case, args: argparse.Namespace, bench: common.Bench):
    """The encoder, on the device and in the type of the bench."""
    where = {"device": bench.device, "dtype": bench.dtype}
    shape = (args.layers, args.width, args.heads)
    if case.model.startswith("Transformer"):
        return Transformer(*shape, max_seq_len=case.length, hidden_dim=4 * args.width, **where)
    bias = None
    if case.model == "HSTU + bias":
        bias = hstu_ops.RelativeAttentionBias(case.length, hstu_ops.TimeBuckets.log(), device=bench.device)
    return hstu_ops.HSTU(*shape, max_seq_len=case.length, relative_bias=bias, **where)


def step(case: Case, args: argparse.Namespace, bench: common.Bench) -> Callable[[], object]:
    """One call: forward, and in training backward to the input and all weights."""
    encoder = build(case, args, bench)
    lengths = torch.tensor(case.lengths, device=bench.device)
    offsets = problems.cumulative(lengths)
    x = torch.randn(sum(case.lengths), args.width, device=bench.device, dtype=bench.dtype, requires_grad=True)
    options = {}
    if case.model == "HSTU + bias":
        times = problems.timestamps_of(len(x) + 1, bench.device)
        options = {"timestamps": times[:-1].clone(), "query_timestamps": times[1:].clone()}
    if not case.training:
        encoder.eval()
        return torch.no_grad()(lambda: encoder(x, offsets, **options))
    leaves, grad_out = [x, *encoder.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(encoder(x, offsets, **options), leaves, grad_out)


def flops(case: Case, args: argparse.Namespace) -> float:
    """What HSTU computes: 5 d^2 weights a row and layer, and the pairs that the causal mask keeps."""
    weights = 5 * args.width**2 * sum(case.lengths)
    pairs = sum(n * (n + 1) // 2 for n in case.lengths) * 2 * args.width
    return 2 * args.layers * (weights * (3 if case.training else 1) + pairs * (3.5 if case.training else 1))


def components(call: Callable[[], object], device: str) -> dict[str, float]:
    """Milliseconds of one call by kind of work: of the kernels on CUDA, of the ops on a CPU."""
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
        if cuda:
            torch.cuda.synchronize()
    found = {"attention": 0.0, "products": 0.0, "pointwise": 0.0}
    for event in profiled.key_averages():
        name, took = event.key.lower(), event.self_device_time_total if cuda else event.self_cpu_time_total
        kinds = (("attention", ATTENTION), ("products", PRODUCTS))
        kind = next((kind for kind, words in kinds if any(x in name for x in words)), "pointwise")
        found[kind] += took / 1e3
    return found


def run(args: argparse.Namespace) -> int:
    args.layers = args.layers or 2
    cuda = args.device != "cpu" and torch.cuda.is_available()
    bench = common.Bench("encoder", args, args.dtype or ("bf16" if cuda else "fp32"), COLUMNS)
    cases = choose(args, bench.device)
    bench.head(
        f"{args.layers} layers, d {args.width}, h {args.heads}, {bench.dtype}; x: times as long the Transformer takes",
        PAPER,
    )
    transformer: dict[tuple, float] = {}

    def measure(case: Case) -> None:
        call = step(case, args, bench)
        timing, peak = bench.time(call)
        where = (case.length, case.kind)
        if case.model == "Transformer":
            transformer[where] = timing.median
        parts = components(bench.step(call), bench.device)
        waiting = timing.median * 1e3 - sum(parts.values()) if bench.device == "cuda" else None
        taken = transformer.get(where)
        bound = flops(case, args) / bench.peaks.of(bench.dtype)
        row = {
            "model": case.label,
            "pass": case.kind,
            "N": case.length,
            "batch": case.batch,
            "rows": sum(case.lengths),
            "layers": args.layers,
            "width": args.width,
            "heads": args.heads,
            "Mrows/s": sum(case.original) / timing.median / 1e6,
            "MiB": None if peak is None else round(peak / 2**20),
            "x": taken / timing.median if taken else None,
            "most": taken / bound if taken and case.model.startswith("HSTU") else None,
            **parts,
            "waiting": waiting,
        }
        bench.add(row, timing)

    bench.each(cases, lambda x: f"{x.label} N {x.length} {x.kind}", measure)
    return bench.finish(("model", "pass", "N", "batch", "layers", "width", "heads"), draw)


def draw(pyplot, bench: common.Bench, path: Path) -> None:
    lines: dict[str, dict] = {}
    for row in bench.rows:
        for quantity, value in (
            (f"Mrows/s, {row['pass']}", row["Mrows/s"]),
            (f"times as fast, {row['pass']}", row["x"]),
        ):
            if value is not None:
                lines.setdefault(quantity, {}).setdefault(row["model"], []).append((row["N"], value))
    common.panels(pyplot, bench, path, lines, "length of the sequences")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    return common.main("encoder", run, args)


if __name__ == "__main__":
    sys.exit(main())
