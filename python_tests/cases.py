"""The cases that tests and benchmarks share, as plain data: SMALL (every feature), CORNER (every edge), REAL (sizes of
use).

A `Case` says what to compute, `make` draws its tensors. A new option of the op gets a field here and a line in SMALL.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hstu_ops import RelativeBias, TimeBuckets

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
BIASES = (
    "none",
    "position",
    "time",
    "position+time",
    "position/head",
    "time/head",
    "position+time/head",
    "position/head+time",
    "dense",
    "dense/batch",
    "dense/head",
    "dense/batch/head",
)


def devices() -> list[str]:
    """Where the tests run. HSTU_OPS_BACKEND ("sm80", "sm90") picks CUDA kernels and shows in the ids of tests."""
    from hstu_ops._library import DEVICE_TYPES

    return ["cpu"] + (["cuda"] if torch.cuda.is_available() and "cuda" in DEVICE_TYPES else [])


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    """What the kernels of a device serve: CUDA has no float64."""
    return DTYPES if device == "cpu" else DTYPES[1:]


def backend(device: str) -> str:
    forced = os.environ.get("HSTU_OPS_BACKEND", "")
    return f"{device}-{forced}" if device == "cuda" and forced else device


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # of the sequences, in keys
    queries: tuple[int, ...] | None = None  # None: as many as keys
    heads: int = 2
    dim_qk: int = 32
    dim_v: int = 32
    max_seq_len: int | None = None  # None: the longest length
    causal: bool = True
    num_targets: tuple[int, ...] | None = None
    target_group_size: int = 1
    contextual_seq_len: int | tuple[int, ...] = 0
    max_attn_len: int = 0
    min_full_attn_seq_len: int = 0
    global_prefix_len: int = 0
    bias: str = "none"  # one of BIASES; "/head": one table a head; "/sqrt": 2048 buckets of times, not 128
    positions: int | None = None  # P of the position table; None: max_seq_len
    query_timestamps: bool = False
    alpha: float | None = None
    scale: float | str | None = None  # a number, "sequence" or "row"
    strided: bool = False  # q, k, v are slices of one projection
    offsets: torch.dtype = torch.int64

    def __str__(self) -> str:
        return self.name


@dataclass
class Inputs:
    """Tensors of a case: `options` are the keyword arguments, `leaves` whatever can have a gradient, by name."""

    q: Tensor
    k: Tensor
    v: Tensor
    seq_offsets: Tensor
    max_seq_len: int
    options: dict

    @property
    def leaves(self) -> dict[str, Tensor]:
        bias = self.options.get("bias")
        tables = {"bias": bias} if isinstance(bias, Tensor) else {}
        if isinstance(bias, RelativeBias):
            tables = {x: getattr(bias, x) for x in ("position_weight", "time_weight") if getattr(bias, x) is not None}
        return {"q": self.q, "k": self.k, "v": self.v, **tables}

    def call(self, attention, **options) -> Tensor:
        return attention(self.q, self.k, self.v, self.seq_offsets, self.max_seq_len, **{**self.options, **options})

    def with_leaves(self, leaves: dict[str, Tensor]) -> Inputs:
        bias = self.options.get("bias")
        if isinstance(bias, RelativeBias):
            bias = replace(bias, **{x: leaves[x] for x in ("position_weight", "time_weight") if x in leaves})
        elif "bias" in leaves:
            bias = leaves["bias"]
        return replace(self, q=leaves["q"], k=leaves["k"], v=leaves["v"], options={**self.options, "bias": bias})

    def double(self) -> Inputs:
        """The same numbers in float64."""
        new = self.with_leaves({x: t.detach().double().requires_grad_(t.requires_grad) for x, t in self.leaves.items()})
        if isinstance(scale := self.options.get("scale"), Tensor):
            new.options["scale"] = scale.double()
        return new


def make(
    case: Case, dtype: torch.dtype = torch.float32, device: str = "cpu", *, seed: int = 0, grad: bool = True
) -> Inputs:
    """Draws N(0, 1) tensors: small inputs would make outputs that any tolerance accepts, an all-zero one included."""
    gen = torch.Generator().manual_seed(seed)
    queries = case.lengths if case.queries is None else case.queries
    batch, total_q, total_kv, heads = len(case.lengths), sum(queries), sum(case.lengths), case.heads
    longest = max(case.lengths, default=0)
    max_seq_len = max(longest, 1) if case.max_seq_len is None else case.max_seq_len
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = accumulate) -> Tensor:
        return (
            torch.randn(shape, generator=gen, dtype=torch.float64).to(device=device, dtype=dtype).requires_grad_(grad)
        )

    def ints(values: tuple[int, ...]) -> Tensor:
        return torch.tensor(values, dtype=case.offsets, device=device)

    def offsets(lengths: tuple[int, ...]) -> Tensor:
        return ints((0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()))

    if case.strided:
        width = heads * (2 * case.dim_qk + case.dim_v)
        split = [heads * case.dim_v, heads * case.dim_qk, heads * case.dim_qk]
        v, q, k = normal(total_kv, width, dtype=dtype).detach().split(split, dim=1)
        q, k, v = (x.unflatten(1, (heads, -1)) for x in (q, k, v))
        q = q[total_kv - total_q :] if total_q < total_kv else q
        q, k, v = (x.requires_grad_(grad) for x in (q, k, v))
    else:
        q = normal(total_q, heads, case.dim_qk, dtype=dtype)
        k = normal(total_kv, heads, case.dim_qk, dtype=dtype)
        v = normal(total_kv, heads, case.dim_v, dtype=dtype)

    terms = case.bias.split("+")
    bias: Tensor | RelativeBias | None = None
    if case.bias.startswith("dense"):
        bias = normal(
            batch if "/batch" in case.bias else 1, heads if "/head" in case.bias else 1, max_seq_len, max_seq_len
        )
    elif case.bias != "none":
        positions = max_seq_len if case.positions is None else case.positions
        fields: dict = {}
        for term in terms:
            lead = (heads,) if "/head" in term else ()
            if term.startswith("position"):
                fields["position_weight"] = normal(*lead, 2 * positions - 1)
            else:
                # Gaps are log-normal around a quarter of an hour, so that many buckets occur; times rise along a
                # sequence.
                gaps = (torch.randn(total_kv + 1, generator=gen, dtype=torch.float64) * 2).exp() * 900
                times = (1_600_000_000 + gaps.cumsum(0)).long().to(device)
                fields["buckets"] = (TimeBuckets.sqrt() if term.endswith("/sqrt") else TimeBuckets.log()).to(device)
                fields["time_weight"] = normal(*lead, len(fields["buckets"].boundaries) + 1)
                fields["timestamps"] = times[:-1]
                if case.query_timestamps:  # the time of the next item
                    rows = torch.cat(
                        [torch.arange(e - m, e) for m, e in zip(queries, _ends(case.lengths), strict=True)]
                        or [ints(())]
                    )
                    fields["query_timestamps"] = times[1:][rows.long().to(device)].contiguous()
        bias = RelativeBias(**fields)

    scale = case.scale
    if isinstance(scale, str):
        size = {"sequence": batch, "row": total_q}[scale]
        scale = normal(size).detach().abs() / max_seq_len
    context = case.contextual_seq_len
    options = {
        "alpha": case.alpha,
        "scale": scale,
        "causal": case.causal,
        "num_targets": None if case.num_targets is None else ints(case.num_targets),
        "target_group_size": case.target_group_size,
        "contextual_seq_len": ints(context) if isinstance(context, tuple) else context,
        "max_attn_len": case.max_attn_len,
        "min_full_attn_seq_len": case.min_full_attn_seq_len,
        "global_prefix_len": case.global_prefix_len,
        "bias": bias,
        "seq_offsets_q": None if case.queries is None else offsets(case.queries),
    }
    return Inputs(q, k, v, offsets(case.lengths), max_seq_len, options)


def _ends(lengths: tuple[int, ...]) -> list[int]:
    return torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()


_MIXED = (70, 1, 33, 128, 0, 64)  # around tile sizes, with an empty and a single-row sequence

SMALL = [
    Case("causal", _MIXED),
    Case("not-causal", _MIXED, causal=False),
    Case("int32-offsets", _MIXED, offsets=torch.int32, num_targets=(5, 0, 3, 7, 0, 1)),
    Case("strided", _MIXED, strided=True, dim_qk=16, dim_v=40),
    Case("dims-differ", _MIXED, dim_qk=48, dim_v=24, heads=3),
    Case("targets", _MIXED, num_targets=(20, 1, 0, 30, 0, 64)),
    Case("target-groups", _MIXED, num_targets=(20, 1, 0, 30, 0, 64), target_group_size=4),
    Case("contextual", _MIXED, contextual_seq_len=6),
    Case("contextual-per-sequence", _MIXED, contextual_seq_len=(6, 1, 40, 0, 2, 1), num_targets=(5, 0, 3, 7, 0, 1)),
    Case("window", _MIXED, max_attn_len=17),
    Case("window-contextual-targets", _MIXED, max_attn_len=30, contextual_seq_len=40, num_targets=(5, 0, 3, 17, 0, 1)),
    Case("window-min-full", _MIXED, max_attn_len=9, min_full_attn_seq_len=20, num_targets=(5, 1, 3, 17, 0, 9)),
    Case("semi-local", _MIXED, max_attn_len=11, global_prefix_len=13, num_targets=(5, 0, 3, 17, 0, 1)),
    Case("not-causal-window", _MIXED, causal=False, max_attn_len=8, global_prefix_len=3, contextual_seq_len=2),
    Case("position", _MIXED, bias="position", contextual_seq_len=3, num_targets=(5, 0, 3, 17, 0, 1)),
    Case("position-short-table", _MIXED, bias="position/head", positions=20),
    Case("time", _MIXED, bias="time", num_targets=(5, 0, 3, 17, 0, 1)),
    Case("position-time", _MIXED, bias="position+time", query_timestamps=True, strided=True),
    Case("position-time-per-head", _MIXED, bias="position/head+time", max_attn_len=25, query_timestamps=True),
    Case("position-many-times", _MIXED, bias="position+time/sqrt", num_targets=(5, 0, 3, 17, 0, 1)),
    Case("dense", _MIXED, bias="dense", num_targets=(5, 0, 3, 17, 0, 1)),
    Case("dense-full", _MIXED, bias="dense/batch/head", causal=False),
    Case("scale-float", _MIXED, scale=0.02, alpha=0.3),
    Case("scale-per-sequence", _MIXED, scale="sequence"),
    Case("scale-per-row", _MIXED, scale="row", num_targets=(5, 0, 3, 17, 0, 1)),
    Case("fewer-queries", _MIXED, queries=(7, 1, 0, 60, 0, 64), bias="position+time", query_timestamps=True),
    Case(
        "fewer-queries-targets",
        _MIXED,
        queries=(7, 1, 3, 60, 0, 1),
        num_targets=(7, 1, 3, 20, 0, 64),
        scale="row",
        bias="time",
    ),
    # Enough work for every thread, so that kernels have no reason to split a sequence.
    Case("many", (*_MIXED, *range(5, 95, 5)), heads=3, num_targets=(2, 0, 1) * 8),
    Case("many-position-time", (*_MIXED, *range(5, 95, 5)), heads=3, bias="position/head+time", alpha=0.3),
    Case(
        "everything",
        _MIXED,
        queries=(50, 1, 33, 100, 0, 10),
        num_targets=(21, 0, 3, 17, 0, 9),
        target_group_size=3,
        contextual_seq_len=(6, 1, 40, 0, 2, 1),
        max_attn_len=12,
        min_full_attn_seq_len=5,
        global_prefix_len=9,
        bias="position/head+time/head",
        query_timestamps=True,
        scale="sequence",
        offsets=torch.int32,
        strided=True,
        heads=3,
        dim_qk=24,
        dim_v=40,
    ),
]

CORNER = [
    Case("empty-batch", ()),
    Case("empty-batch-bias", (), bias="position+time", num_targets=(), contextual_seq_len=(), scale="sequence"),
    Case("total-0", (0, 0, 0), num_targets=(0, 0, 0), bias="position+time"),
    Case("empty-sequences", (0, 40, 0, 0, 9, 0), bias="position+time"),
    Case("no-queries", (30, 20), queries=(0, 0)),
    Case("no-queries-in-one", (30, 20), queries=(0, 20), bias="dense/batch"),
    Case("no-queries-at-first", (30, 20), queries=(0, 20), bias="position+time", query_timestamps=True),
    Case("one-row", (1,) * 40, heads=4),
    Case("one-row-target", (1,) * 40, heads=4, num_targets=(1,) * 40, bias="position"),
    Case("two-rows", (2,) * 30, heads=4, max_attn_len=1),
    Case("all-targets", (30, 65, 17), num_targets=(30, 65, 17), bias="position+time"),
    Case("all-targets-one-group", (30, 65, 17), num_targets=(30, 65, 17), target_group_size=1000),
    Case("more-context-than-history", (30, 65, 17), contextual_seq_len=50, num_targets=(4, 20, 17)),
    Case("all-contextual", (30, 65, 17), contextual_seq_len=65, bias="position"),
    Case("window-1", (30, 65, 17), max_attn_len=1, num_targets=(4, 20, 17)),
    Case(
        "window-1-everything",
        (80, 65),
        max_attn_len=1,
        min_full_attn_seq_len=1,
        global_prefix_len=1,
        contextual_seq_len=2,
    ),
    Case(
        "window-longer-than-sequence",
        (30, 65, 17),
        max_attn_len=1000,
        min_full_attn_seq_len=1000,
        global_prefix_len=1000,
    ),
    Case("window-with-many-contextual", (100, 120), max_attn_len=30, contextual_seq_len=40, num_targets=(3, 30)),
    Case("dim-1", (40, 70), dim_qk=1, dim_v=1, heads=8),
    Case("dim-25", (40, 70), dim_qk=25, dim_v=25),
    Case("dim-50", (40, 70), dim_qk=50, dim_v=50, bias="position+time"),
    Case("dim-256", (40, 70), dim_qk=256, dim_v=256),
    Case("dim-128-dense", (40, 170), dim_qk=128, dim_v=100, bias="dense", scale="row", num_targets=(3, 10)),
    Case("dim-256-dense", (40, 170), dim_qk=256, dim_v=256, bias="dense/head", contextual_seq_len=3),
    Case(
        "dim-256-bias",
        (40, 300),
        dim_qk=256,
        dim_v=256,
        bias="position+time",
        num_targets=(3, 70),
        contextual_seq_len=9,
    ),
    Case(
        "dim-200-bias", (300, 40), dim_qk=200, dim_v=256, bias="position/head+time/sqrt", max_attn_len=90, scale="row"
    ),
    Case("dim-7-by-13", (40, 70), dim_qk=7, dim_v=13, strided=True),
    Case("one-head", (40, 70), heads=1, strided=True),
    Case("position-table-of-1", (40, 70), bias="position/head", positions=1),
    Case("one-long", (300,), bias="position+time", max_attn_len=100, num_targets=(100,)),
    Case("long-context", (400, 300), bias="position+time", contextual_seq_len=100, num_targets=(250, 40)),
    Case("tile-edges", (31, 32, 33, 63, 64, 65, 127, 128, 129), num_targets=(1, 0, 1, 0, 1, 0, 1, 0, 1)),
    Case("longer-than-max-seq-len", (40, 70), max_seq_len=20),
]


def _uniform(count: int, low: int, high: int) -> tuple[int, ...]:
    rng = random.Random(count * high)
    return tuple(rng.randint(low, high) for _ in range(count))


def _targets(lengths: tuple[int, ...], most: int) -> tuple[int, ...]:
    rng = random.Random(most)
    return tuple(min(n, rng.randint(0, most)) for n in lengths)


_USERS = _uniform(32, 10, 1000)
_QUARTER = _uniform(16, 100, 924)  # mean 512, a quarter of 2048

REAL = [
    *(Case(f"dense-{n}", (n,) * max(1, 4096 // n), heads=4, dim_qk=64, dim_v=64) for n in (512, 1024, 2048, 4096)),
    Case("quarter", _QUARTER, heads=4, dim_qk=64, dim_v=64, max_seq_len=2048),
    Case("quarter-bias", _QUARTER, heads=4, dim_qk=64, dim_v=64, max_seq_len=2048, bias="position+time"),
    Case(
        "users",
        _USERS,
        heads=4,
        dim_qk=64,
        dim_v=64,
        max_seq_len=1000,
        num_targets=_targets(_USERS, 20),
        bias="position+time",
        query_timestamps=True,
    ),
    Case(
        "ml-1m", _uniform(128, 20, 200), heads=2, dim_qk=25, dim_v=25, max_seq_len=211, bias="position+time", alpha=1.0
    ),
    Case(
        "candidates", _uniform(16, 200, 1000), queries=(50,) * 16, num_targets=(50,) * 16, heads=4, dim_qk=64, dim_v=64
    ),
    Case("window", (4096,), heads=4, dim_qk=64, dim_v=64, max_attn_len=256, contextual_seq_len=8, global_prefix_len=64),
    Case("long", (8192,), heads=2, dim_qk=64, dim_v=64, bias="position+time"),
]


_CROWD = (130, 0, 64, *(n * 37 % 66 for n in range(150)))

# So many sequences that kernels have no reason to split what heads have in common.
CROWDED = [
    Case("causal", _CROWD, heads=4, dim_qk=64, dim_v=48, bias="position+time"),
    Case("targets", _CROWD, bias="position+time", num_targets=tuple(min(n, n % 9) for n in _CROWD)),
    Case(
        "targets-contextual",
        _CROWD,
        heads=4,
        dim_qk=64,
        bias="position+time",
        contextual_seq_len=9,
        num_targets=tuple(min(n, n % 31) for n in _CROWD),
    ),
    Case("window", _CROWD, heads=5, bias="position+time", max_attn_len=40, min_full_attn_seq_len=20),
    Case("not-causal", _CROWD, heads=4, bias="time", causal=False, query_timestamps=True),
    Case("queries", _CROWD, bias="position+time", queries=tuple(n // 3 for n in _CROWD), scale="row"),
    Case("position", _CROWD, heads=6, dim_qk=128, dim_v=72, bias="position", scale="sequence"),
    Case("wide", _CROWD, heads=4, dim_qk=128, dim_v=128, bias="position+time"),
    Case("many", _CROWD, heads=4, dim_qk=64, bias="position+time/sqrt", contextual_seq_len=5),
    Case("wide-many", _CROWD, heads=3, dim_qk=72, dim_v=128, bias="time/sqrt", causal=False),
    Case(
        "widest", _CROWD, dim_qk=256, dim_v=160, bias="position+time", num_targets=tuple(min(n, n % 9) for n in _CROWD)
    ),
    Case(
        "heads",
        _CROWD,
        heads=12,
        dim_qk=64,
        dim_v=48,
        bias="position+time",
        contextual_seq_len=3,
        num_targets=tuple(min(n, n % 9) for n in _CROWD),
    ),
    Case(
        "heads-window", _CROWD, heads=12, bias="position+time", max_attn_len=30, queries=tuple(n // 2 for n in _CROWD)
    ),
    Case("heads-many", _CROWD, heads=6, dim_qk=128, dim_v=72, bias="position+time/sqrt", scale="row"),
    Case("dense", _CROWD, dim_qk=64, dim_v=48, bias="dense", num_targets=tuple(min(n, n % 9) for n in _CROWD)),
]

# Sequences long enough for kernels of their own.
LONG = [
    Case("long", (2300, 1900), dim_qk=128, dim_v=72, bias="position+time", num_targets=(30, 0)),
    Case("long-position", (1100, 1000), dim_qk=64, dim_v=48, bias="position", contextual_seq_len=9),
]


def random_case(seed: int) -> Case:
    """A case with every option drawn at random; small, so that many fit in a test run."""
    rng = random.Random(seed)
    lengths = tuple(rng.choice((0, 1, 2, rng.randint(3, 40), rng.randint(3, 150))) for _ in range(rng.randint(1, 5)))
    fewer = rng.random() < 0.3
    context = rng.choice((0, 0, 1, rng.randint(2, 12), "tuple"))
    return Case(
        f"random-{seed}",
        lengths,
        queries=tuple(rng.randint(0, n) for n in lengths) if fewer else None,
        heads=rng.randint(1, 4),
        dim_qk=rng.choice((4, 8, 16, 31, 32, 64, 72)),
        dim_v=rng.choice((4, 8, 16, 31, 32, 64, 72)),
        max_seq_len=rng.choice((None, max(*lengths, 1) + rng.randint(1, 50))),
        causal=rng.random() < 0.8,
        num_targets=tuple(rng.randint(0, n) for n in lengths) if rng.random() < 0.5 else None,
        target_group_size=rng.choice((1, 1, 2, 5)),
        contextual_seq_len=tuple(rng.randint(0, 12) for _ in lengths) if context == "tuple" else context,
        max_attn_len=rng.choice((0, rng.randint(1, 10), rng.randint(1, 100))),
        min_full_attn_seq_len=rng.choice((0, 0, rng.randint(1, 30))),
        global_prefix_len=rng.choice((0, 0, rng.randint(1, 30))),
        bias=rng.choice(("none", *BIASES)),
        positions=rng.choice((None, None, rng.randint(1, 60))),
        query_timestamps=rng.random() < 0.5,
        alpha=rng.choice((None, 0.2)),
        scale=rng.choice((None, 0.05, "sequence", "row")),
        strided=not fewer and rng.random() < 0.5,
        offsets=rng.choice((torch.int32, torch.int64)),
    )
