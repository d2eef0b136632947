"""Relative attention bias: learned tables indexed by distance in position and by bucketed difference in time.

    bias_ij = position_weight[head, clamp(pos(j) - pos(i) + P - 1, 0, 2P - 2)] + time_weight[head, bucket(tq_i - tk_j)]

`pos` is the logical position of `hstu_ops.reference.logical_position`: all targets share one, all contextual rows share
one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

import torch
import torch.utils._pytree
from torch import Tensor, nn

_INT64_MAX = 2**63 - 1


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, bias tables and their gradients are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class TimeBuckets:
    """A rule that puts integer time differences into buckets: `bucket(d)` is how many sorted `boundaries` are `<= d`.

    `boundaries`: int64 `[n]`, never falling; there are `n + 1` buckets, 0 to n. The unit of time is that of the
    timestamps. Make one with `log`, `sqrt` or `from_boundaries`, which check; `to` moves it to a device. Calling it
    gives the buckets of an int64 tensor.

        >>> TimeBuckets.from_boundaries([1, 60, 3600])(torch.tensor([0, 59, 60, 10**6]))
        tensor([0, 1, 2, 3])
    """

    boundaries: Tensor

    def __call__(self, difference: Tensor) -> Tensor:
        return torch.bucketize(difference, self.boundaries, right=True)

    def to(self, device: torch.device | str) -> TimeBuckets:
        return TimeBuckets(self.boundaries.to(device))

    @staticmethod
    def log(num_buckets: int = 128, divisor: float = 0.301) -> TimeBuckets:
        """`bucket(d) = min(floor(ln(max(d, 1)) / divisor), num_buckets)`, equal bit for bit to the float32 expression

            (torch.log(d.clamp(min=1)) / divisor).long().clamp(0, num_buckets)

        of the research code of the HSTU paper (128 buckets, 0.301, seconds: a bucket spans a factor of 1.35 in time).
        """
        _require(num_buckets >= 1, "num_buckets", "at least 1", num_buckets)
        _require(divisor > 0, "divisor", "a positive number", divisor)
        return TimeBuckets(_log_boundaries(num_buckets, divisor).clone())

    @staticmethod
    def sqrt(num_buckets: int = 2048, units_per_increment: float = 60.0, divisor: float = 1.0) -> TimeBuckets:
        """`bucket(d) = min(floor(sqrt(max(d, 0) / units_per_increment) / divisor), num_buckets)`, equal bit for bit to

            (torch.sqrt(d.clamp(min=1e-6) / units_per_increment) / divisor).long().clamp(0, num_buckets)

        The defaults are those of Meta's production models, whose timestamps are in seconds and whose increment is a
        minute: bucket 1 starts at a minute, bucket 2 at 4 minutes, bucket 2048 at 8 years. For timestamps in
        milliseconds pass `units_per_increment=60_000.0`.
        """
        _require(num_buckets >= 1, "num_buckets", "at least 1", num_buckets)
        _require(units_per_increment > 0, "units_per_increment", "a positive number", units_per_increment)
        _require(divisor > 0, "divisor", "a positive number", divisor)
        return TimeBuckets(_sqrt_boundaries(num_buckets, units_per_increment, divisor).clone())

    @staticmethod
    def from_boundaries(boundaries: Tensor | Sequence[int]) -> TimeBuckets:
        """Buckets with the given boundaries, ints or an integer tensor `[n]`. ValueError if they ever fall."""
        boundaries = torch.as_tensor(boundaries)
        if boundaries.numel() == 0:
            boundaries = boundaries.long()
        _require(boundaries.dim() == 1, "boundaries", "one dimension", tuple(boundaries.shape))
        if boundaries.is_floating_point() or boundaries.is_complex() or boundaries.dtype == torch.bool:
            raise TypeError(f"boundaries: expected integers, got {boundaries.dtype}")
        boundaries = boundaries.long().contiguous()
        _require(bool((boundaries.diff() >= 0).all()), "boundaries", "values that never fall", boundaries.tolist())
        return TimeBuckets(boundaries)


@dataclass(frozen=True, eq=False)
class RelativeBias:
    """The bias argument of `hstu_attention` for one batch; `RelativeAttentionBias` makes them from tables it owns.

    Either term may be absent (its table None).

    - `position_weight`: `[2P - 1]`, or `[H, 2P - 1]` for one table a head. Entry `P - 1 + d` belongs to keys that stand
      `d` positions after the query (causal: `d <= 0`); distances beyond the table use its ends.
    - `time_weight`: `[n + 1]` or `[H, n + 1]` for `n = len(buckets.boundaries)`. Needs `buckets` and `timestamps`.
    - `timestamps`: int64 `[total_kv]`, one per key row, in the unit the buckets were made for.
    - `query_timestamps`: int64 `[total_q]`. Default: the timestamps of the queries' own rows. The published retrieval
      models pass the time of the *next* item.

    Tables of any float type are used, and their gradients summed, in float32 (float64 when q is float64). A weight that
    shuts keys out is -1e9, say; weights below -1e38 alpha may make gradients NaN on GPUs.
    """

    position_weight: Tensor | None = None
    time_weight: Tensor | None = None
    timestamps: Tensor | None = None
    query_timestamps: Tensor | None = None
    buckets: TimeBuckets | None = None

    def with_tables_in(self, dtype: torch.dtype) -> RelativeBias:
        """The same bias with its tables cast to `dtype`, differentiably."""
        cast = {x: w.to(dtype) for x in ("position_weight", "time_weight") if (w := getattr(self, x)) is not None}
        return replace(self, **cast)


# So that torch.export and torch.func take them as arguments.
for _cls in (TimeBuckets, RelativeBias):
    torch.utils._pytree.register_dataclass(_cls)


class RelativeAttentionBias(nn.Module):
    """Owns the tables of a relative attention bias and makes the `RelativeBias` of a batch.

    Parameters: `position_weight` `[2 * max_seq_len - 1]` (None with `position=False`) and `time_weight` `[n + 1]` for n
    boundaries (None without `buckets`), or `[num_heads, ...]` when num_heads is given; float32, initially normal(0,
    0.02) as published. The boundaries are a buffer that moves with the module and is not saved; a module made on "meta"
    has them again behind `to_empty`.

        >>> rab = RelativeAttentionBias(max_seq_len=200, buckets=TimeBuckets.log())
        >>> out = hstu_attention(q, k, v, seq_offsets, 200, bias=rab(timestamps))
    """

    def __init__(
        self,
        max_seq_len: int,
        buckets: TimeBuckets | None = None,
        *,
        position: bool = True,
        num_heads: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(max_seq_len, Integral):
            raise TypeError(f"max_seq_len: expected an int, got {type(max_seq_len).__name__}")
        if not isinstance(buckets, TimeBuckets | None):
            raise TypeError(f"buckets: expected TimeBuckets, got {type(buckets).__name__}")
        _require(max_seq_len >= 1, "max_seq_len", "at least 1", max_seq_len)
        _require(position or buckets is not None, "buckets", "TimeBuckets where position=False", buckets)
        heads = () if num_heads is None else (num_heads,)

        def table(size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*heads, size, device=device, dtype=dtype))

        boundaries = None if buckets is None else buckets.boundaries.to(device or torch.get_default_device())
        self.register_buffer("boundaries", boundaries, persistent=False)
        self._boundaries = None if buckets is None else buckets.boundaries.cpu()  # what the buffer holds everywhere
        self.position_weight = table(2 * max_seq_len - 1) if position else None
        self.time_weight = None if buckets is None else table(len(boundaries) + 1)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in self.parameters():
            nn.init.normal_(weight, mean=0.0, std=0.02)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelativeAttentionBias:
        super()._apply(fn, recurse)
        if self._boundaries is not None:  # `fn` may leave memory that nobody wrote
            self.boundaries = self._boundaries.to(self.boundaries.device)
        return self

    def forward(self, timestamps: Tensor | None = None, query_timestamps: Tensor | None = None) -> RelativeBias:
        """The bias of a batch: `timestamps` int64 `[total_kv]`, `query_timestamps` int64 `[total_q]` or None."""
        if self.time_weight is None:
            return RelativeBias(self.position_weight)
        buckets = TimeBuckets(self.boundaries)
        return RelativeBias(self.position_weight, self.time_weight, timestamps, query_timestamps, buckets)


@functools.lru_cache(maxsize=16)
def _log_boundaries(num_buckets: int, divisor: float) -> Tensor:
    return _boundaries_of(lambda d: (torch.log(d.clamp(min=1)) / divisor).long(), num_buckets)


@functools.lru_cache(maxsize=16)
def _sqrt_boundaries(num_buckets: int, units_per_increment: float, divisor: float) -> Tensor:
    return _boundaries_of(lambda d: (torch.sqrt(d.clamp(min=1e-6) / units_per_increment) / divisor).long(), num_buckets)


def _boundaries_of(bucket: Callable[[Tensor], Tensor], num_buckets: int) -> Tensor:
    """For b = 1..num_buckets the smallest d >= 0 with bucket(d) >= b, by bisection; int64 max where there is none."""
    wanted = torch.arange(1, num_buckets + 1, device="cpu")
    low, high = torch.zeros_like(wanted), torch.full_like(wanted, _INT64_MAX)
    while bool((low < high).any()):
        middle = low + (high - low) // 2
        reached = bucket(middle) >= wanted
        low, high = torch.where(reached, low, middle + 1), torch.where(reached, middle, high)
    return low


def _require(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"{name}: expected {expected}, got {got}")
