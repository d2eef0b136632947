"""What hstu_ops computes, in plain PyTorch: short, slow, any float type, any device, differentiable twice.

`hstu_attention` has the arguments of `hstu_ops.hstu_attention` and defines its result; the other functions are its
parts. `padded_hstu_attention` computes the same as one padded batch, which is how it is done without a fused kernel.

With `h` history rows (rows before the targets) and `c` leading contextual rows, row `i` keeps column `j` if
`keep(i, j)` of `attention_mask`, and

    s_ij = alpha * <q_i, k_j> + bias_ij,    o_i = scale_i * sum_j keep(i, j) * silu(s_ij) * v_j

Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
Recommendations", ICML 2024.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..bias import RelativeBias, accumulation_dtype
from ..jagged import takes_nested


def attention_mask(
    length: int | Tensor,
    *,
    causal: bool = True,
    num_targets: int | Tensor = 0,
    target_group_size: int = 1,
    contextual_seq_len: int | Tensor = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    global_prefix_len: int = 0,
    size: int | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which columns each row of a sequence keeps: bool `[size, size]`, or `[B, size, size]` for tensors of lengths.

    `length`, `num_targets` and `contextual_seq_len` are ints or integer tensors `[B]`; `size` (default: the length)
    pads rows and columns, which keep nothing. The other options are those of `hstu_ops.hstu_attention`.

        >>> attention_mask(4, num_targets=2).int()
        tensor([[1, 0, 0, 0],
                [1, 1, 0, 0],
                [1, 1, 1, 0],
                [1, 1, 0, 1]], dtype=torch.int32)
    """
    size = int(length) if size is None else size
    n, t, c = (_per_sequence(x, device)[..., None, None] for x in (length, num_targets, contextual_seq_len))
    h = n - t
    c = torch.minimum(c, h)
    i = torch.arange(size, device=device)[:, None]
    j = torch.arange(size, device=device)[None, :]

    seen = torch.ones_like(i == j)
    if max_attn_len > 0:
        seen = (_position(i, h, c) - _position(j, h, c)).abs() <= max_attn_len
        seen = seen | (j < global_prefix_len)
        if min_full_attn_seq_len > 0:
            seen = seen | (i >= h - min_full_attn_seq_len)
    if causal:
        seen = seen & (j <= i)
    history = (j < h) & ((i < c) | seen)
    own_group = (h <= j) & (j <= i) & ((i - h) // target_group_size == (j - h) // target_group_size)
    return (history | own_group) & (i < n)


def logical_position(length: Tensor, num_targets: Tensor, contextual_seq_len: Tensor, size: int) -> Tensor:
    """`pos(i)` for `i` in `[0, size)`: contextual rows share position 0, targets the one after the history. int64."""
    h = length - num_targets
    rows = torch.arange(size, device=length.device)
    return _position(rows, h[..., None], torch.minimum(contextual_seq_len, h)[..., None])


def _position(rows: Tensor, h: Tensor, c: Tensor) -> Tensor:
    return (torch.minimum(rows, h) - (c - 1).clamp(min=0)).clamp(min=0)


def _per_sequence(value: int | Tensor, device: torch.device | str | None) -> Tensor:
    return torch.as_tensor(value, device=device).long()


def relative_bias(bias: RelativeBias, position: Tensor, query_time: Tensor | None, key_time: Tensor | None) -> Tensor:
    """`position_weight[pos(j) - pos(i) + P - 1] + time_weight[bucket(tq_i - tk_j)]` for one sequence or a padded batch.

    `position`, `query_time`, `key_time`: `[..., n]`, one value per row. Result `[..., n, n]`, or `[H, ..., n, n]` when
    a table is per head, in the type of the tables.
    """
    terms = []
    if bias.position_weight is not None:
        last = bias.position_weight.shape[-1] - 1
        distance = position[..., None, :] - position[..., :, None] + last // 2
        terms.append(bias.position_weight[..., distance.clamp(0, last)])
    if bias.time_weight is not None:
        bucket = bias.buckets(query_time[..., :, None] - key_time[..., None, :])
        terms.append(bias.time_weight[..., bucket])
    if len(terms) == 2 and terms[0].dim() != terms[1].dim():  # one table per head, the other shared
        terms = [x if x.dim() == max(y.dim() for y in terms) else x[None] for x in terms]
    return sum(terms)


@takes_nested
def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    alpha: float | None = None,
    scale: float | Tensor | None = None,
    causal: bool = True,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    contextual_seq_len: int | Tensor = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    global_prefix_len: int = 0,
    bias: Tensor | RelativeBias | None = None,
    seq_offsets_q: Tensor | None = None,
) -> Tensor:
    """`hstu_ops.hstu_attention`, one sequence at a time; of jagged tensors of torch.nested, too. Reads the offsets on
    the host; checks nothing."""
    offsets = seq_offsets.tolist()
    offsets_q = offsets if seq_offsets_q is None else seq_offsets_q.tolist()
    batch = len(offsets) - 1
    targets = [0] * batch if num_targets is None else num_targets.tolist()
    context = contextual_seq_len.tolist() if isinstance(contextual_seq_len, Tensor) else [contextual_seq_len] * batch
    alpha = q.shape[-1] ** -0.5 if alpha is None else alpha
    scale = _scale_per_row(scale, max_seq_len, torch.tensor(offsets_q, device=q.device), q)
    bias = _in_dtype(bias, accumulation_dtype(q.dtype))

    # Differentiable even when the batch is empty.
    outputs = [q[:0].sum(-1, keepdim=True) * k[:0].sum(-1, keepdim=True) * v[:0]]
    for b in range(batch):
        keys, queries = slice(*offsets[b : b + 2]), slice(*offsets_q[b : b + 2])
        n, m = offsets[b + 1] - offsets[b], offsets_q[b + 1] - offsets_q[b]
        rows = slice(n - m, n)  # the queries are the last rows of the sequence
        mask = attention_mask(
            n,
            causal=causal,
            num_targets=targets[b],
            target_group_size=target_group_size,
            contextual_seq_len=context[b],
            max_attn_len=max_attn_len,
            min_full_attn_seq_len=min_full_attn_seq_len,
            global_prefix_len=global_prefix_len,
            device=q.device,
        )[rows]
        s = alpha * torch.einsum("ihd,jhd->hij", q[queries], k[keys])
        if isinstance(bias, RelativeBias):
            position = logical_position(*(_per_sequence(x, q.device) for x in (n, targets[b], context[b])), size=n)
            key_time = None if bias.timestamps is None else bias.timestamps[keys]
            query_time = key_time
            if bias.query_timestamps is not None:
                query_time = F.pad(bias.query_timestamps[queries], (n - m, 0))
            s = s + relative_bias(bias, position, query_time, key_time)[..., rows, :]
        elif bias is not None:
            dense = bias[b % bias.shape[0]]
            outside = max(n - dense.shape[-1], 0)  # rows and columns beyond the given bias have none
            s = s + F.pad(dense, (0, outside, 0, outside))[:, rows, :n]
        p = F.silu(s).masked_fill(~mask, 0.0).to(v.dtype)
        o = scale[queries, None, None] * torch.einsum("hij,jhd->ihd", p, v[keys])
        outputs.append(o.to(q.dtype))
    return torch.cat(outputs).to(q.dtype)  # under autocast the sums above are float32


def padded_hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    alpha: float | None = None,
    scale: float | Tensor | None = None,
    causal: bool = True,
    num_targets: Tensor | None = None,
    target_group_size: int = 1,
    contextual_seq_len: int | Tensor = 0,
    max_attn_len: int = 0,
    min_full_attn_seq_len: int = 0,
    global_prefix_len: int = 0,
    bias: Tensor | RelativeBias | None = None,
) -> Tensor:
    """`hstu_attention` as one batch padded to `[B, max_seq_len]`: time and memory grow with `B * max_seq_len^2`.

    The eager baseline of `python -m hstu_ops` and of the benchmarks. Needs every length <= `max_seq_len`, and as many
    queries as keys.
    """
    size = max_seq_len
    lengths = seq_offsets.diff().long()
    targets = torch.zeros_like(lengths) if num_targets is None else num_targets.long()
    context = _per_sequence(contextual_seq_len, q.device).expand_as(lengths)
    alpha = q.shape[-1] ** -0.5 if alpha is None else alpha
    scale = _scale_per_row(scale, max_seq_len, seq_offsets, q)
    bias = _in_dtype(bias, accumulation_dtype(q.dtype))
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=q.device), lengths)
    row = torch.arange(len(q), device=q.device) - seq_offsets[:-1].long()[sequence]

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(len(lengths), size, *x.shape[1:]).index_put((sequence, row), x)

    mask = attention_mask(
        lengths,
        causal=causal,
        num_targets=targets,
        target_group_size=target_group_size,
        contextual_seq_len=context,
        max_attn_len=max_attn_len,
        min_full_attn_seq_len=min_full_attn_seq_len,
        global_prefix_len=global_prefix_len,
        size=size,
        device=q.device,
    )
    s = alpha * torch.einsum("bihd,bjhd->bhij", pad(q), pad(k))
    if isinstance(bias, RelativeBias):
        position = logical_position(lengths, targets, context, size)
        key_time = None if bias.timestamps is None else pad(bias.timestamps)
        query_time = key_time if bias.query_timestamps is None else pad(bias.query_timestamps)
        relative = relative_bias(bias, position, query_time, key_time)
        s = s + (relative[:, None] if relative.dim() == 3 else relative.movedim(0, 1))
    elif bias is not None:
        s = s + bias[..., :size, :size]
    p = F.silu(s).masked_fill(~mask[:, None], 0.0).to(v.dtype)
    o = torch.einsum("bhij,bjhd->bihd", p, pad(v))[sequence, row]
    return (scale[:, None, None] * o).to(q.dtype)


def _scale_per_row(scale: float | Tensor | None, max_seq_len: int, offsets: Tensor, q: Tensor) -> Tensor:
    """One factor per query row; a tensor as long as the batch is per sequence."""
    lengths = offsets.diff().long()
    if not isinstance(scale, Tensor):
        scale = 1.0 / max_seq_len if scale is None else scale
        return torch.full((len(q),), scale, device=q.device, dtype=accumulation_dtype(q.dtype))
    return torch.repeat_interleave(scale, lengths) if len(scale) == len(lengths) else scale


def _in_dtype(bias: Tensor | RelativeBias | None, dtype: torch.dtype) -> Tensor | RelativeBias | None:
    if bias is None or isinstance(bias, Tensor):
        return None if bias is None else bias.to(dtype)
    return bias.with_tables_in(dtype)
