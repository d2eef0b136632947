"""torch.nested jagged tensors in and out of an attention over `[total, H, D]` and offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from .bias import RelativeBias


def nested_attention(
    attention: Callable[..., Tensor], q: Tensor, k: Tensor, v: Tensor, max_seq_len: int | None = None, **options: object
) -> Tensor:
    """`attention` (hstu_attention) of jagged tensors `[B, *, H, D]`; the result is jagged like q.

    Offsets are those of k, and those of q where they differ. `max_seq_len` defaults to the longest sequence of k (known
    to the tensor, or read from the device once). Timestamps of a RelativeBias may be jagged `[B, *]` too.
    """
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
