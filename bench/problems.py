"""What is measured: a `Problem`, a case at one type. Its work follows from the mask, its tensors come from `draw`.

Cases are those of python_tests/cases.py, or made here from shapes (`dense`, `jagged`).
"""

from __future__ import annotations

import random
import sys
from collections import Counter
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "python_tests"))

import cases
from cases import Case, Inputs

from hstu_ops import RelativeBias, TimeBuckets, reference

try:
    from hstu_ops import _core
except ImportError:  # built without pybind11; the ops work without it
    _core = None

DIRECTIONS = ("fwd", "bwd", "fwd+bwd", "det")  # det: bwd in deterministic mode
BIASES = ("none", "position", "time", "relative", "sqrt", "dense")  # relative: position and time; sqrt: 2048 buckets
COUNTED_BY = "hstu_ops._core" if _core else "hstu_ops.reference.attention_mask, slow (no hstu_ops._core in this build)"

_TYPES = {"fp64": torch.float64, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_TYPE_NAMES = {y: x for x, y in _TYPES.items()}


def type_named(name: str) -> torch.dtype:
    return _TYPES[name]


def type_name(dtype: torch.dtype) -> str:
    return _TYPE_NAMES[dtype]


@dataclass(frozen=True)
class Problem:
    """`against` names problems whose rate this one is held against: (what to call them, their label)."""

    case: Case
    dtype: torch.dtype
    against: tuple[tuple[str, str], ...] = ()

    @property
    def label(self) -> str:
        return label(self.case, self.dtype)

    @property
    def total(self) -> int:
        return sum(self.case.lengths)


def label(case: Case, dtype: torch.dtype) -> str:
    return f"{case.name} {type_name(dtype)}"


# ---- cases from shapes -----------------------------------------------------------------------------------


def dense(length: int, batch: int, dim: int, *, heads: int = 4, bias: str = "none", **options) -> Case:
    """`batch` sequences of one length."""
    return _shape(f"N{length} B{batch}", (length,) * batch, length, dim, heads, bias, options)


def jagged(longest: int, batch: int, dim: int, *, heads: int = 4, bias: str = "none", **options) -> Case:
    """`batch` lengths uniform in 0.1..1 of `longest`, the same on every run."""
    rng = random.Random(longest)
    lengths = tuple(rng.randint(max(1, longest // 10), longest) for _ in range(batch))
    return _shape(f"jagged N{longest} B{batch}", lengths, longest, dim, heads, bias, options)


def mean_length(case: Case) -> int:
    return round(sum(case.lengths) / max(1, len(case.lengths)))


def _shape(name: str, lengths: tuple, longest: int, dim: int, heads: int, bias: str, options: dict) -> Case:
    targets = options.pop("targets", 0)
    if targets:
        options["num_targets"] = tuple(min(targets, n) for n in lengths)
        name += f" t{targets}"
    for option, short in (("max_attn_len", "w"), ("contextual_seq_len", "c"), ("global_prefix_len", "g")):
        if options.get(option):
            name += f" {short}{options[option]}"
    if options.get("queries"):
        name += f" q{max(options['queries'])}"
    name += f" D{dim}" + (f" {bias}" if bias != "none" else "")
    return Case(
        name,
        lengths,
        heads=heads,
        dim_qk=dim,
        dim_v=dim,
        max_seq_len=longest,
        bias={"relative": "position+time", "sqrt": "position+time/sqrt"}.get(bias, bias),
        **options,
    )


# ---- work ------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _kept_pairs(n: int, queries: int, targets: int, contextual: int, options: tuple[tuple[str, int], ...]) -> int:
    if _core:
        mask = _core.Mask(length=n, num_targets=targets, contextual_seq_len=contextual, **dict(options))
        return mask.kept_pairs(queries)
    mask = reference.attention_mask(n, num_targets=targets, contextual_seq_len=contextual, **dict(options))
    return int(mask[n - queries :].sum())


def _sequences(case: Case) -> Counter:
    """How often each (keys, queries, targets, contextual rows) occurs: equal sequences are counted once."""
    batch = len(case.lengths)
    context = case.contextual_seq_len
    return Counter(
        zip(
            case.lengths,
            case.lengths if case.queries is None else case.queries,
            case.num_targets or (0,) * batch,
            context if isinstance(context, tuple) else (context,) * batch,
            strict=True,
        )
    )


def kept_pairs(case: Case) -> int:
    """(row, column) pairs that the mask keeps, over all sequences, for one head."""
    options = (
        ("causal", case.causal),
        ("target_group_size", case.target_group_size),
        ("max_attn_len", case.max_attn_len),
        ("min_full_attn_seq_len", case.min_full_attn_seq_len),
        ("global_prefix_len", case.global_prefix_len),
    )
    return sum(times * _kept_pairs(*sequence, options) for sequence, times in _sequences(case).items())


def flops(case: Case, direction: str) -> int:
    """Multiplications and additions of the matrix products on kept pairs.

    Forward q k and p v; backward q k again, do v, and the products for dq, dk and dv.
    """
    forward, backward = case.dim_qk + case.dim_v, 3 * case.dim_qk + 2 * case.dim_v
    dims = {"fwd": forward, "bwd": backward, "fwd+bwd": forward + backward, "det": backward}[direction]
    return 2 * dims * kept_pairs(case) * case.heads


def moved_bytes(case: Case, dtype: torch.dtype, direction: str) -> int:
    """Bytes that must be moved at least: each tensor read or written once. Kept entries only of a dense bias."""
    queries = sum(case.lengths if case.queries is None else case.queries)
    keys = sum(case.lengths)
    forward = case.heads * (queries * (case.dim_qk + case.dim_v) + keys * (case.dim_qk + case.dim_v))
    backward = case.heads * (queries * (2 * case.dim_qk + case.dim_v) + 2 * keys * (case.dim_qk + case.dim_v))
    size = torch.finfo(dtype).bits // 8
    accumulate = max(size, 4)
    bias = 8 * (keys + queries) if "time" in case.bias else 0
    if case.bias.startswith("dense"):
        shared = 1 if "/batch" in case.bias else max(1, len(case.lengths))
        bias = accumulate * kept_pairs(case) // shared * (case.heads if "/head" in case.bias else 1)
    times = {"fwd": (1, 0, 1), "bwd": (0, 1, 2), "fwd+bwd": (1, 1, 3), "det": (0, 1, 2)}[direction]
    return times[0] * forward * size + times[1] * backward * size + times[2] * bias


# ---- tensors ---------------------------------------------------------------------------------------------


def cumulative(lengths: torch.Tensor) -> torch.Tensor:
    """Offsets `[B + 1]` of sequences of these lengths."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def timestamps_of(count: int, device: str, generator: torch.Generator | None = None) -> torch.Tensor:
    """Rising seconds, int64; gaps are log-normal around an hour."""
    gaps = 3600 * (2 * torch.randn(count, generator=generator, dtype=torch.float64, device=device)).exp()
    return 1_600_000_000 + gaps.cumsum(0).long()


def draw(case: Case, dtype: torch.dtype, device: str, seed: int = 0) -> Inputs:
    """N(0, 1) tensors drawn on the device; gaps between timestamps are log-normal around an hour."""
    small = cases.make(
        replace(case, heads=1, dim_qk=1, dim_v=1, bias="none", strided=False), torch.float32, device, grad=False
    )
    generator = torch.Generator(device).manual_seed(seed)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*shape: int, dtype: torch.dtype = accumulate) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=dtype, device=device)

    total_q, total_kv, heads = len(small.q), len(small.k), case.heads
    if case.strided and case.queries is None:
        widths = [heads * d for d in (case.dim_v, case.dim_qk, case.dim_qk)]
        v, q, k = (x.unflatten(1, (heads, -1)) for x in normal(total_kv, sum(widths), dtype=dtype).split(widths, dim=1))
    else:
        q, k = (normal(n, heads, case.dim_qk, dtype=dtype) for n in (total_q, total_kv))
        v = normal(total_kv, heads, case.dim_v, dtype=dtype)

    size, bias = small.max_seq_len, None
    if case.bias.startswith("dense"):
        batch = len(case.lengths) if "/batch" in case.bias else 1
        bias = normal(batch, heads if "/head" in case.bias else 1, size, size).requires_grad_()
    elif case.bias != "none":
        fields = {}
        for term in case.bias.split("+"):
            lead = (heads,) if "/head" in term else ()
            if term.startswith("position"):
                positions = size if case.positions is None else case.positions
                fields["position_weight"] = normal(*lead, 2 * positions - 1).requires_grad_()
                continue
            times = timestamps_of(total_kv + 1, device, generator)
            buckets = (TimeBuckets.sqrt() if term.endswith("/sqrt") else TimeBuckets.log()).to(device)
            fields["time_weight"] = normal(*lead, len(buckets.boundaries) + 1).requires_grad_()
            fields |= {"buckets": buckets, "timestamps": times[:-1]}
            if case.query_timestamps and case.queries is None:  # the time of the next item
                fields["query_timestamps"] = times[1:].clone()
        bias = RelativeBias(**fields)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    return Inputs(q, k, v, small.seq_offsets, size, {**small.options, "bias": bias})
