"""Histories, stochastic length, the recommender and the baselines."""

import math
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import dtypes

from hstu_ops import Histories, HSTURecommender, reference, stochastic_length
from hstu_ops.baselines import SoftmaxHSTU, Transformer, softmax_attention
from hstu_ops.recommender import ENCODERS

ITEMS, ACTIONS, LENGTHS = 40, 5, (6, 1, 12, 3)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """The models are tiny: threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def histories(device="cpu", lengths=LENGTHS, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def draw(most):
        return [torch.randint(most, (n,), generator=gen).tolist() for n in lengths]

    times = [sorted(x) for x in draw(10**6)]
    return Histories.from_lists(draw(ITEMS), times, draw(ACTIONS)).to(device)


def recommender(device="cpu", **options):
    """With weights large enough for every part to matter."""
    torch.manual_seed(1)
    options = dict(max_seq_len=16, embedding_dim=16, num_heads=2, dropout=0.0) | options
    model = HSTURecommender(ITEMS, **options)
    for name, p in model.named_parameters():
        if "norm" not in name:
            p.data = torch.randn(p.shape) * (p.shape[-1] ** -0.5 if p.dim() == 2 and "embedding" not in name else 0.5)
    return model.to(device).eval()


EVERYTHING = dict(num_actions=ACTIONS, relative_bias="position+time")


# ---- histories ---------------------------------------------------------------------------------------------------


def lists(x):
    return [p.tolist() for p in x.items.split(x.lengths.tolist())]


def test_histories(device):
    x = histories(device)
    want = lists(x)
    assert lists(x.users(torch.tensor([2, 0, 2], device=device))) == [want[2], want[0], want[2]]
    assert lists(x.recent(4)) == [p[-4:] for p in want]
    shorter, following = x.split_last()
    assert lists(shorter) == [p[:-1] for p in want]
    assert x.items[following].tolist() == [i for p in want for i in p[1:]]
    other = histories(device, (2, 0, 1, 5), seed=7)
    both = x.append(other)
    assert lists(both) == [a + b for a, b in zip(want, lists(other), strict=True)]
    for column in ("timestamps", "actions"):
        a, b, c = (getattr(p, column).split(p.lengths.tolist()) for p in (x, other, both))
        assert all(torch.equal(torch.cat([p, q]), r) for p, q, r in zip(a, b, c, strict=True))
    assert len(x) == 4 and x.sequence.tolist() == [b for b, n in enumerate(LENGTHS) for _ in range(n)]
    assert x.append(Histories(other.items, other.seq_offsets)).timestamps is None
    with pytest.raises(ValueError, match="timestamps"):
        Histories.from_lists([[1, 2]], [[1]])


# ---- stochastic length -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selection", ["recent", "random", "time"])
def test_stochastic_length_keeps_what_it_should(selection, device):
    lengths = torch.tensor([8, 9, 40, 0, 64, 1], dtype=torch.int32, device=device)
    timestamps = torch.cat([torch.arange(n) ** 2 for n in lengths.tolist()]).to(device)
    limit, seen = 22, set()  # floor(64^(1.5 / 2))
    for _ in range(200):
        rows, new = stochastic_length(lengths, 1.5, 64, selection=selection, timestamps=timestamps)
        assert new.dtype == torch.int32 and new.sum() == len(rows)
        assert (rows.diff() > 0).all()
        sequence = torch.searchsorted(lengths.cumsum(0), rows, right=True)
        assert torch.equal(torch.bincount(sequence, minlength=6), new.long())
        assert new.tolist()[:2] == [8, 9] and new.tolist()[3] == 0 and new.tolist()[5] == 1
        assert new[2] in (limit, 40) and new[4] in (limit, 64)
        seen.add(tuple(new.tolist()))
        if selection == "recent" and new[2] == limit:
            assert rows[17 : 17 + limit].tolist() == list(range(17 + 18, 17 + 40))
    assert len(seen) == 4  # either of the long sequences is cut or not


def test_stochastic_length_statistics():
    """Probabilities of staying whole and of being chosen, to 5 standard deviations."""
    draws, n, most, alpha = 4000, 50, 60, 1.6
    limit, whole = math.floor(most ** (alpha / 2)), most**alpha / n**2
    lengths = torch.full((draws,), n)
    gen = torch.Generator().manual_seed(0)
    rows, new = stochastic_length(lengths, alpha, most, selection="random", generator=gen)
    assert abs((new == n).double().mean() - whole) < 5 * (whole * (1 - whole) / draws) ** 0.5
    share = torch.bincount(rows % n, minlength=n).double() / draws
    want = whole + (1 - whole) * limit / n
    assert (share - want).abs().max() < 5 * (want * (1 - want) / draws) ** 0.5
    # By time: one row is as old as all others together, so its weight is a half of theirs at most.
    times = torch.tensor([0] + [1000] * (n - 1)).repeat(draws)
    rows, new = stochastic_length(lengths, alpha, most, timestamps=times, generator=gen)
    cut = (new == limit)[rows // n]
    oldest = torch.bincount((rows % n)[cut], minlength=n)[0] / (new == limit).sum()
    assert oldest == 0  # f of the oldest is all of the sum: its weight is 0
    times = torch.tensor([0, 500] + [1000] * (n - 2)).repeat(draws)
    rows, new = stochastic_length(lengths, alpha, most, timestamps=times, generator=gen)
    share = torch.bincount((rows % n)[(new == limit)[rows // n]], minlength=n).double() / (new == limit).sum()
    assert share[0] < share[1] < share[2:].min()  # weights 1/3, 2/3, 1


def test_stochastic_length_is_seeded():
    def draw():
        return stochastic_length(torch.tensor([50, 60]), 1.5, 60, selection="random", generator=gen())

    def gen():
        return torch.Generator().manual_seed(4)

    assert all(torch.equal(a, b) for a, b in zip(draw(), draw(), strict=True))
    rows, new = stochastic_length(torch.tensor([50, 60]), 2.0, 60, selection="random")
    assert new.tolist() == [50, 60] and rows.tolist() == list(range(110))
    cut = histories().rows(*stochastic_length(histories().lengths, 1.5, 12, selection="recent"))
    assert cut.lengths[[0, 1, 3]].tolist() == [6, 1, 3] and cut.lengths[2] in (6, 12)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("alpha", dict(alpha=1.0)),
        ("alpha", dict(alpha=2.1)),
        ("max_seq_len", dict(max_seq_len=0)),
        ("selection", dict(selection="best")),
        ("timestamps", dict(selection="time")),
        ("lengths", dict(lengths=torch.ones(3))),
    ],
)
def test_stochastic_length_errors(name, options):
    given = dict(lengths=torch.tensor([3, 4]), alpha=1.5, max_seq_len=10, selection="random") | options
    with pytest.raises(ValueError, match=name):
        stochastic_length(**given)


# ---- recommender -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_row_sees_the_future(encoder):
    relative_bias = "none" if encoder == "transformer" else "position"
    model, x = recommender(encoder=encoder, relative_bias=relative_bias, num_actions=ACTIONS), histories()
    changed = Histories(x.items.clone(), x.seq_offsets, x.timestamps, x.actions)
    changed.items[x.seq_offsets[3] - 1] = (changed.items[x.seq_offsets[3] - 1] + 1) % ITEMS
    a, b = model(x), model(changed)
    row = torch.arange(len(x.items)) != x.seq_offsets[3] - 1
    assert torch.equal(a[row], b[row]) and not torch.equal(a, b)


def test_query_time_is_that_of_the_next_item():
    model = recommender(**EVERYTHING)
    x, asked = histories(), {}
    model.encoder.register_forward_pre_hook(lambda module, args, given: asked.update(given), with_kwargs=True)
    model(x, num_targets=torch.tensor([2, 0, 3, 1]))
    for times, queries, t in zip(
        x.timestamps.split(LENGTHS), asked["query_timestamps"].split(LENGTHS), (2, 0, 3, 1), strict=True
    ):
        n = len(times)
        want = [times[min(i + 1, n - 1)] if i < n - t else times[i] for i in range(n)]
        assert queries.tolist() == [int(w) for w in want]
    model(x, request_timestamps=torch.tensor([11, 12, 13, 14]))
    last = asked["query_timestamps"][x.seq_offsets[1:] - 1]
    assert last.tolist() == [11, 12, 13, 14]


@pytest.mark.parametrize("encoder", ["hstu", "softmax-hstu"])
def test_candidates_in_one_pass_and_one_by_one(encoder, device):
    """A candidate's score does not depend on the others, nor on how the batch is put together."""
    model, x = recommender(device, encoder=encoder, **EVERYTHING), histories(device)
    asked = torch.tensor([10**6 + 5] * 4, device=device)
    candidates = torch.randint(ITEMS, (4, 7), device=device)
    together = model.score(x, candidates, request_timestamps=asked)
    alone = [model.score(x, candidates[:, i : i + 1], request_timestamps=asked) for i in range(7)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))
    assert together.std() > 0.1
    jagged = Histories.from_lists([candidates[b, : b + 1].tolist() for b in range(4)]).to(device)
    want = torch.cat([together[b, : b + 1] for b in range(4)])
    torch.testing.assert_close(model.score(x, jagged, request_timestamps=asked), want)


def test_losses_by_hand():
    model, x = recommender(num_actions=ACTIONS, temperature=0.3), histories()
    total, count, ranking = 0.0, 0, []
    for b, (items, actions) in enumerate(zip(lists(x), x.actions.split(LENGTHS), strict=True)):
        for n in range(1, len(items)):
            prefix = Histories.from_lists([items[:n]], None, [actions[:n].tolist()])
            row = model(prefix)[-1]
            logits = F.cosine_similarity(row[None], model.item_embedding.weight) / 0.3
            total, count = total - logits.log_softmax(0)[items[n]], count + 1
        if b != 1:
            prefix = Histories.from_lists([items[:-1]], None, [actions[:-1].tolist()])
            ranking.append((prefix, items[-1]))
    assert model.next_item_loss(x).item() == pytest.approx((total / count).item(), rel=1e-5)
    torch.manual_seed(2)
    got = model.ranking_loss(x.users(torch.tensor([0, 2, 3])), num_negatives=4)
    torch.manual_seed(2)
    negatives = torch.randint(ITEMS, (3, 4))
    scores = [
        model.score(h, torch.cat([torch.tensor([right]), other])[None])[0]
        for (h, right), other in zip(ranking, negatives, strict=True)
    ]
    assert got.item() == pytest.approx(-sum(s.log_softmax(0)[0] for s in scores).item() / 3, rel=1e-5)


def test_sampled_softmax_estimates_the_full_one(device):
    model, x = recommender(device, temperature=0.5), histories(device)
    full = model.next_item_loss(x)
    assert model.next_item_loss(x, num_negatives=100_000).item() == pytest.approx(full.item(), rel=0.01)
    few = torch.stack([model.next_item_loss(x, num_negatives=30) for _ in range(50)]).mean()
    assert few.item() == pytest.approx(full.item(), rel=0.1)


def test_recommend(device):
    model, x = recommender(device, **EVERYTHING), histories(device)
    items, scores = model.recommend(x, 20)
    assert items.shape == scores.shape == (4, 20) and (scores.diff(dim=1) <= 0).all()
    for b, seen in enumerate(lists(x)):
        assert not set(items[b].tolist()) & set(seen)
        one = x.users(torch.tensor([b], device=device))
        logits = model.item_logits(model(one)[-1:])[0]
        torch.testing.assert_close(logits[items[b]], scores[b])
        assert (logits > scores[b, -1] + 1e-4).sum() <= 19 + len(seen)
        everything = model.recommend(one, ITEMS, exclude_seen=False)[0]
        assert everything.sort().values.tolist() == [list(range(ITEMS))]

    plain = recommender(device)
    best, scores = plain.recommend([3, 1, 4], 5)
    assert best.shape == scores.shape == (5,)
    assert torch.equal(best, plain.recommend(Histories.from_lists([[3, 1, 4]]), 5)[0][0])
    long = list(range(30))
    expected = plain.recommend(Histories.from_lists([long[-16:]]), 5, exclude_seen=False)[0][0]
    assert torch.equal(plain.recommend(long, 5, exclude_seen=False)[0], expected)
    for name, history, k in (("k", [1], 0), ("k", [1], 41), ("history", [], 3), ("history", [2, 40], 3)):
        with pytest.raises(ValueError, match=name):
            plain.recommend(history, k)
    assert plain(Histories.from_lists([list(range(30))]).to(device)).isfinite().all()  # too long, yet no crash


def test_save_and_load(tmp_path, device):
    model, x = recommender(device, alpha=0.7, norm_affine=True, **EVERYTHING), histories(device)
    model.save(tmp_path / "model.pt")
    for changes in ({}, {"encoder": "reference"}):
        loaded = HSTURecommender.load(tmp_path / "model.pt", device, **changes).eval()
        torch.testing.assert_close(loaded(x), model(x))
    assert isinstance(loaded.encoder, reference.HSTU)


_ONE, _UNKNOWN = Histories.from_lists([[1, 2]]), Histories.from_lists([[1, 40, -1]])


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("encoder", lambda: recommender(encoder="best")),
        ("relative_bias", lambda: recommender(relative_bias="rotary")),
        ("relative_bias", lambda: recommender(encoder="transformer", relative_bias="time")),
        ("actions", lambda: recommender(num_actions=3)(Histories.from_lists([[1, 2]]))),
        ("timestamps", lambda: recommender(relative_bias="time")(Histories.from_lists([[1, 2]]))),
        ("recompute", lambda: recommender(recompute=("all",))),
        ("seq_offsets", lambda: Histories(torch.arange(5), torch.tensor([0, 700_000, 5]))),
        ("seq_offsets", lambda: Histories(torch.arange(5), torch.tensor([0, 3]))),
        ("timestamps", lambda: Histories(torch.arange(5), torch.tensor([0, 5]), torch.arange(4))),
        ("items", lambda: Histories([1, 2], torch.tensor([0, 2]))),
        ("items: expected int64", lambda: Histories(torch.ones(2), torch.tensor([0, 2]))),
        ("items: expected int64", lambda: Histories(torch.ones(2, 2).long(), torch.tensor([0, 2]))),
        (r"histories.items: expected items from 0 to 39, got \[-1, 40\]", lambda: recommender()(_UNKNOWN)),
        (r"candidates: expected int64 \[1, n\]", lambda: recommender().score(_ONE, torch.tensor([1, 2]))),
        (r"candidates: expected int64 \[1, n\]", lambda: recommender().score(_ONE, torch.ones(2, 3).long())),
        ("candidates: expected those of 1 users", lambda: recommender().score(_ONE, Histories.from_lists([[1], [2]]))),
        ("candidates: expected int64", lambda: recommender().score(_ONE, [[1, 2]])),
        ("items: expected items", lambda: recommender().score(_ONE, torch.tensor([[40]]))),
        ("histories", lambda: recommender().next_item_loss(Histories.from_lists([[1, 2], []]))),
        ("histories", lambda: recommender().ranking_loss(Histories.from_lists([[], [1, 2]]))),
    ],
)
def test_errors_name_the_argument(name, call):
    with pytest.raises((ValueError, TypeError), match=name):
        call()


@pytest.mark.parametrize("items", ([], [[1]], [[1], [2]]))
def test_no_next_item_no_loss(items):
    model = recommender()
    loss = model.next_item_loss(Histories.from_lists(items))
    loss.backward()
    assert loss == 0 and all(not x.grad.any() for x in model.parameters() if x.grad is not None)


def test_saved_numbers_of_numpy_are_read(tmp_path):
    numpy = pytest.importorskip("numpy")
    HSTURecommender(numpy.int64(30), max_seq_len=8, embedding_dim=16, dropout=numpy.float64(0.5)).save(tmp_path / "m")
    assert HSTURecommender.load(tmp_path / "m").config["dropout"] == 0.5


# ---- baselines ---------------------------------------------------------------------------------------------------


def test_softmax_attention(device):
    """Against softmax over the columns that a row keeps, one sequence at a time."""
    for dtype in dtypes(device):
        gen = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(24, 2, 8, generator=gen).to(device, dtype) for _ in range(3))
        offsets = torch.tensor([0, 9, 10, 24], device=device)
        targets = torch.tensor([3, 0, 5], device=device)
        for masks in ({}, dict(num_targets=targets)):
            got = softmax_attention(q, k, v, offsets, 14, alpha=0.4, **masks)
            for b in range(3):
                rows = slice(int(offsets[b]), int(offsets[b + 1]))
                t = int(targets[b]) if masks else 0
                keep = reference.attention_mask(rows.stop - rows.start, num_targets=t, device=device)
                s = 0.4 * torch.einsum("ihd,jhd->hij", q[rows].double(), k[rows].double())
                p = s.masked_fill(~keep, -torch.inf).softmax(-1)
                want = torch.einsum("hij,jhd->ihd", p, v[rows].double())
                torch.testing.assert_close(got[rows].double(), want, rtol=0.02, atol=0.02)
                if dtype in (torch.float32, torch.float64):
                    torch.testing.assert_close(got[rows].double(), want, rtol=1e-4, atol=1e-5)


def test_baselines_have_the_size_of_hstu():
    def weights(kind):
        stack = kind(2, 64, 2, max_seq_len=10)
        return sum(p.numel() for p in stack.parameters() if p.dim() == 2)

    assert weights(Transformer) == weights(SoftmaxHSTU) == weights(ENCODERS["hstu"])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_learns(encoder, device):
    """Items that follow each other in a circle."""
    torch.manual_seed(0)
    relative_bias = "none" if encoder == "transformer" else "position"
    model = HSTURecommender(
        ITEMS, max_seq_len=16, embedding_dim=16, dropout=0.0, encoder=encoder, relative_bias=relative_bias
    ).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = Histories.from_lists([[(i + b * 3) % ITEMS for i in range(5 + b % 8)] for b in range(20)]).to(device)
    for _ in range(60):
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model.next_item_loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.5
    assert model.eval().recommend([7, 8, 9], 1)[0].item() == 10


def test_loss_curve_of_200_steps(device):
    """Training with the kernels follows training with plain PyTorch in float32, up to the noise of a seed: what another
    order of the batches changes.
    """

    gen = torch.Generator().manual_seed(0)
    first, step = torch.randint(ITEMS, (64, 1), generator=gen), torch.randint(1, 4, (64, 1), generator=gen)
    data = Histories.from_lists(((first + torch.arange(8) * step) % ITEMS).tolist())

    def curve(encoder, seed=0):
        torch.manual_seed(0)
        model = HSTURecommender(ITEMS, max_seq_len=16, embedding_dim=16, dropout=0.0, encoder=encoder).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        order, losses = torch.Generator().manual_seed(seed), []
        half = device == "cuda" and encoder == "hstu"
        for _ in range(200):
            batch = data.users(torch.randperm(64, generator=order)[:4]).to(device)
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = model.next_item_loss(batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        return torch.stack(losses).cpu().view(10, 20).mean(1)

    ours, plain, other = curve("hstu"), curve("reference"), curve("reference", seed=1)
    assert plain[-1] < 0.5 * plain[0]
    assert (ours - plain).abs().max() < 0.5 * (other - plain).abs().max()


_README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not _README.exists(), reason="not in a source tree")
def test_readme_examples(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = _README.read_text().split("## Models")[1].split("## Training")[0]
    codes = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    names = {}
    for code in codes:
        exec(code, names)
    arguments = dict(timestamps=torch.arange(50) * 60, num_targets=torch.tensor([5, 0]))
    encoder, plain = names["encoder"].eval(), names["plain"].eval()
    torch.testing.assert_close(
        encoder(names["x"], names["seq_offsets"], **arguments), plain(names["x"], names["seq_offsets"], **arguments)
    )
    assert names["items"].shape == (10,) and names["ranking"].shape == (2, 3) and len(codes) == 2
