"""Jagged sequences: torch.nested tensors in and out of attention and layers, and the choice of shorter subsequences."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch
from torch import Tensor

from .attention import _fail
from .bias import RelativeBias

_SELECTIONS = ("recent", "random", "time")


def nested_attention(
    attention: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: None = None,
    max_seq_len: int | None = None,
    **options: object,
) -> Tensor:
    """`attention` (hstu_attention) of jagged tensors `[B, *, H, D]`; the result is jagged like q.

    Offsets are those of k, and those of q where they differ. `max_seq_len` defaults to the longest sequence of k (known
    to the tensor, or read from the device once). Timestamps of a RelativeBias may be jagged `[B, *]` too.
    """
    if seq_offsets is not None:
        _fail("seq_offsets", "None for nested q, k, v (it is theirs)", seq_offsets)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.is_nested or x.layout != torch.jagged:
            raise TypeError(
                f"hstu_ops: {name}: expected a nested tensor with layout=torch.jagged, as q is nested, got {x.layout}"
            )
        if x.dim() != 4 or x._ragged_idx != 1 or x.lengths() is not None:
            raise ValueError(
                f"hstu_ops: {name}: expected a contiguous jagged tensor [B, *, H, D], got shape {tuple(x.shape)}"
            )
    if v.size(1) != k.size(1):
        raise ValueError(f"hstu_ops: v: expected the offsets of k, got lengths {v.size(1)} and {k.size(1)}")
    if options.get("seq_offsets_q") is not None:
        raise ValueError("hstu_ops: seq_offsets_q: expected None for nested q, k, v (it is theirs), got a tensor")
    options["seq_offsets_q"] = None if q.size(1) == k.size(1) else q.offsets()

    bias = options.get("bias")
    if isinstance(bias, RelativeBias):
        flat = {
            x: t.values()
            for x in ("timestamps", "query_timestamps")
            if (t := getattr(bias, x)) is not None and t.is_nested
        }
        options["bias"] = replace(bias, **flat)
    longest = k._get_max_seqlen() if max_seq_len is None else max_seq_len
    out = attention(q.values(), k.values(), v.values(), k.offsets(), max(longest, 1), **options)
    return torch.nested.nested_tensor_from_jagged(
        out, q.offsets(), min_seqlen=q._maybe_min_seqlen, max_seqlen=q._maybe_max_seqlen
    )


def takes_nested(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same function for jagged tensors, too: see nested_attention."""

    @wraps(attention)
    def either(q: Tensor, *arguments: object, **options: object) -> Tensor:
        if q.is_nested:
            return nested_attention(attention, q, *arguments, **options)
        return attention(q, *arguments, **options)

    return either


def nested_rows(
    module: Callable[..., Tensor],
    x: Tensor,
    seq_offsets: Tensor | None,
    times: dict[str, Tensor | None],
    **options: object,
) -> Tensor:
    """`module` (a layer or a stack) of a jagged tensor `[B, *, D]`; `times`, by name, may be jagged `[B, *]` too."""
    if x.layout != torch.jagged or x.dim() != 3 or x._ragged_idx != 1 or x.lengths() is not None:
        raise ValueError(f"hstu_ops: x: expected a contiguous jagged tensor [B, *, D], got shape {tuple(x.shape)}")
    if seq_offsets is not None:
        raise ValueError("hstu_ops: seq_offsets: expected None for nested x (it is its own), got a tensor")
    times = {name: t.values() if t is not None and t.is_nested else t for name, t in times.items()}
    out = module(x.values(), x.offsets(), **times, **options)
    return torch.nested.nested_tensor_from_jagged(
        out, x.offsets(), min_seqlen=x._maybe_min_seqlen, max_seqlen=x._maybe_max_seqlen
    )


def stochastic_length(
    lengths: Tensor,
    alpha: float,
    max_seq_len: int,
    *,
    selection: str = "time",
    timestamps: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Stochastic Length of the HSTU paper: long sequences are cut to `L = floor(max_seq_len^(alpha / 2))` rows, most of
    the time. Training on the result costs `O(max_seq_len^alpha)` a sequence instead of `O(max_seq_len^2)`.

    A sequence of `n <= L` rows stays whole. A longer one stays whole with probability `max_seq_len^alpha / n^2`;
    otherwise L of its rows are kept, in their order.

        >>> rows, new_lengths = stochastic_length(lengths, 1.6, max_seq_len=8192, timestamps=timestamps)
        >>> items, timestamps = items[rows], timestamps[rows]

    Arguments:
        lengths: `[B]`, int32 or int64: the numbers of history rows. (Rows that must stay, such as targets, are appended
            afterwards.)
        alpha: in (1, 2]; 2 cuts nothing but what is longer than max_seq_len.
        max_seq_len: the length of the longest sequences, N of the paper.
        selection: how the L rows are chosen. "recent": the last ones. "random": any, each as likely as another. "time":
            at random without replacement, row i with weight `1 - f_i / sum_j f_j`, where `f_i = t_last - t_i` is the
            time since row i, so that recent rows are likelier; the paper found it the best of the three.
        timestamps: int64 `[T]` for `T = sum(lengths)`; for selection="time".
        generator: of the device of lengths. Default: torch's.

    Returns int64 `rows` `[T']`, which rows of the jagged buffer are kept, rising, and the new lengths `[B]`, of the
    type of `lengths`. Reads the number of rows on the host.

    Errors: ValueError or TypeError naming the argument.

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024, section 3.2 and its appendix on subsequence selection.
    """
    if lengths.dtype not in (torch.int32, torch.int64) or lengths.dim() != 1:
        raise ValueError(f"hstu_ops: lengths: expected int32 or int64 [B], got {lengths.dtype} {list(lengths.shape)}")
    if not 1 < alpha <= 2:
        raise ValueError(f"hstu_ops: alpha: expected a number in (1, 2], got {alpha}")
    if max_seq_len < 1:
        raise ValueError(f"hstu_ops: max_seq_len: expected at least 1, got {max_seq_len}")
    if selection not in _SELECTIONS:
        raise ValueError(f"hstu_ops: selection: expected one of {', '.join(_SELECTIONS)}, got {selection!r}")
    device, batch, n = lengths.device, len(lengths), lengths.long()
    sequence = torch.repeat_interleave(torch.arange(batch, device=device), n)
    total = len(sequence)
    if selection == "time" and (timestamps is None or timestamps.shape != (total,)):
        got = None if timestamps is None else list(timestamps.shape)
        raise ValueError(f"hstu_ops: timestamps: expected shape [{total}] for selection='time', got {got}")

    # Nudged, so that exact powers are not rounded down: 4096^(1/2) is 64.
    limit = int(max_seq_len ** (alpha / 2) * (1 + 1e-12))
    whole = torch.rand(batch, generator=generator, device=device, dtype=torch.float64) * n**2 < max_seq_len**alpha
    new_lengths = torch.where((n <= limit) | whole, n, limit)

    begin = n.cumsum(0) - n
    row = torch.arange(total, device=device)
    if selection == "recent":
        priority = (row - begin[sequence]).double()
    else:
        # The largest of log(weight) + Gumbel noise are a weighted draw without replacement.
        noise = torch.rand(total, generator=generator, device=device, dtype=torch.float64).clamp(min=1e-300)
        priority = -torch.log(-torch.log(noise))
        if selection == "time":
            last = (begin + n - 1)[sequence]
            elapsed = (timestamps[last] - timestamps).double()
            summed = torch.zeros(batch, dtype=torch.float64, device=device).index_add(0, sequence, elapsed)
            weight = 1 - elapsed / summed[sequence].clamp(min=1)
            priority = priority + torch.log(weight.clamp(min=1e-300))
    order = priority.argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]  # by sequence, within it by priority
    rank = row - begin[sequence]
    rows = order[rank < new_lengths[sequence]].sort().values
    return rows, new_lengths.to(lengths.dtype)
