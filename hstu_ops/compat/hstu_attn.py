"""Attention of NVIDIA's HSTU kernels (`hstu_attn`, `fbgemm_gpu.experimental.hstu`), computed by hstu_ops.

What differs from `hstu_ops.hstu_attention`: alpha is 1 unless given and multiplies the bias too, the denominator is
`scaling_seqlen`, and slots of the buffer may hold fewer rows than they have room for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..attention import _expect_tensors, _fail, hstu_attention
from ..bias import accumulation_dtype


def hstu_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    scaling_seqlen: int,
    num_contexts: Tensor | None,
    num_targets: Tensor | None,
    target_group_size: int = 1,
    window_size: tuple[int, int] = (-1, -1),
    alpha: float = 1.0,
    rab: Tensor | None = None,
    has_drab: bool = False,
    kv_cache: Tensor | None = None,
    page_offsets: Tensor | None = None,
    page_ids: Tensor | None = None,
    last_page_lens: Tensor | None = None,
    func: Tensor | None = None,
    quant_mode: int | None = -1,
) -> Tensor:
    """`silu(alpha * (q k + rab)) v / scaling_seqlen`: `[total_q, H, Dv]`.

    Arguments:
        q, k, v: `[total_q, H, D]`, `[total_k, H, D]`, `[total_k, H, Dv]`, float32, float16 or bfloat16 (float64 on
            CPU).
        cu_seqlens_q, cu_seqlens_k: `[B + 1]`, int32 or int64. Where there are fewer queries than keys, the queries of a
            sequence are its last rows.
        seqused_q, seqused_k: `[B]`, how many first rows of each sequence's slot are used; the rest is padding, read by
            nobody, with outputs and gradients of 0. None: all of them.
        max_seqlen_q, max_seqlen_k: no sequence is longer.
        scaling_seqlen: the denominator; -1: max_seqlen_q.
        num_contexts, num_targets: `[B]`, how many first and last rows of each sequence are contextual and targets.
            Causal attention only.
        target_group_size: consecutive targets that see each other causally.
        window_size: (left, right). (-1, -1): every row sees all; (-1, 0): causal; (w, 0): causal, at most w rows back;
            (w, w): at most w rows to either side.
        alpha: factor of the sum of product and bias.
        rab: `[B or 1, H or 1, N, N]` with `N >= max_seqlen_k`, any float type.
        has_drab: whether rab gets a gradient (summed in float32).
        kv_cache to quant_mode: None and -1; paged caches, masks as functions and float8 are not offered.

    Gradients of q, k, v and, with has_drab, rab. Errors: TypeError or ValueError naming the argument.
    """
    _expect_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    for name, value in (("kv_cache", kv_cache), ("page_offsets", page_offsets), ("page_ids", page_ids)):
        if value is not None:
            _fail(name, "None: paged caches are not supported; pass keys and values as k and v", value)
    if last_page_lens is not None:
        _fail("last_page_lens", "None: paged caches are not supported", last_page_lens)
    if func is not None:
        _fail("func", "None: masks given as functions are not supported", func)
    if quant_mode not in (None, -1):
        _fail("quant_mode", "-1: float8 is not supported", quant_mode)
    if has_drab and rab is None:
        _fail("rab", "a tensor, as has_drab is set", rab)
    if max_seqlen_q > max_seqlen_k:
        _fail("max_seqlen_q", f"at most max_seqlen_k = {max_seqlen_k}", max_seqlen_q)
    if scaling_seqlen != -1 and scaling_seqlen <= 0:
        _fail("scaling_seqlen", "a positive number, or -1 for max_seqlen_q", scaling_seqlen)
    causal, max_attn_len = _window(window_size, max_seqlen_k, num_contexts, num_targets)

    if rab is not None:
        batch, heads = cu_seqlens_k.shape[0] - 1, q.shape[1]
        fits = rab.dim() == 4 and rab.shape[0] in (1, batch) and rab.shape[1] in (1, heads)
        if not fits or not max_seqlen_k <= rab.shape[2] == rab.shape[3]:
            _fail("rab", f"shape [{batch} or 1, {heads} or 1, N, N] with N >= {max_seqlen_k}", rab)
        rab = rab if has_drab else rab.detach()
        rab = rab if alpha == 1 else alpha * rab.to(accumulation_dtype(q.dtype))
    if seqused_q is not None or seqused_k is not None:
        same = cu_seqlens_q is cu_seqlens_k and seqused_q is seqused_k
        queries = _Slots(cu_seqlens_q, seqused_q, q)
        slots = queries, queries if same else _Slots(cu_seqlens_k, seqused_k, k, queries)
        q, k, v = slots[0].without_padding(q), slots[1].without_padding(k), slots[1].without_padding(v)
        cu_seqlens_q, cu_seqlens_k = slots[0].offsets, slots[1].offsets  # one tensor if they are the same
        # Padding is made of targets, of which each sees itself or its group: next to no work.
        num_targets = slots[1].interleave(num_targets, cu_seqlens_k.diff()[1::2])
        num_contexts = None if num_contexts is None else slots[1].interleave(num_contexts, None)
        rab = rab if rab is None or rab.shape[0] == 1 else rab.repeat_interleave(2, dim=0)
    return hstu_attention(
        q,
        k,
        v,
        cu_seqlens_k,
        max(max_seqlen_k, 1),
        alpha=alpha,
        scale=1 / max(max_seqlen_q if scaling_seqlen == -1 else scaling_seqlen, 1),
        causal=causal,
        num_targets=num_targets,
        target_group_size=target_group_size,
        contextual_seq_len=0 if num_contexts is None else num_contexts,
        max_attn_len=max_attn_len,
        bias=rab,
        seq_offsets_q=None if cu_seqlens_q is cu_seqlens_k else cu_seqlens_q,
    )


def _window(
    window_size: tuple[int, int], longest: int, num_contexts: Tensor | None, num_targets: Tensor | None
) -> tuple[bool, int]:
    """`causal` and `max_attn_len` of `hstu_attention`."""
    left, right = (x if 0 <= x < longest else None for x in window_size)
    for name, value in (("num_contexts", num_contexts), ("num_targets", num_targets)):
        if value is not None and (left, right) != (None, 0) and longest > 0:
            _fail("window_size", f"(-1, 0), causal without a window, as {name} is given", tuple(window_size))
    if left == 0:
        _fail("window_size", "a window of at least one row to the left, or -1 for all of them", tuple(window_size))
    if right == 0 or left == right:
        return right == 0, left or 0
    _fail("window_size", "(left, 0), or as many rows to the left as to the right", tuple(window_size))


class _Slots:
    """Slots of a buffer that are used in part, as twice as many sequences: used rows and padding in turn.

    `others`: the slots of the queries, if these are the keys'. Queries need as many keys, so padding of keys is longer
    by that of the queries; of the added rows, one for each query, the last slot's padding has those that are left.
    Nothing here depends on what the tensors hold, so the device is not waited for.
    """

    def __init__(self, cu_seqlens: Tensor, used: Tensor | None, rows: Tensor, others: _Slots | None = None) -> None:
        begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
        used = ends - begins if used is None else torch.minimum(used.to(cu_seqlens.dtype), ends - begins)
        self.padding_lengths = ends - begins - used
        total, self.rows = rows.shape[0], None
        if others is None:
            self.offsets = torch.cat((cu_seqlens[:1], torch.stack((begins + used, ends), dim=1).flatten()))
        else:
            lengths = torch.stack((used, self.padding_lengths + others.padding_lengths), dim=1).flatten()
            self.offsets = torch.cat((cu_seqlens[:1], lengths.cumsum(0).to(cu_seqlens.dtype)))
            total += others.padding.shape[0]
            self.offsets[-1:] = total
        at = torch.arange(total, device=rows.device)
        sequence = torch.bucketize(at, self.offsets[1:], right=True)
        self.padding = (sequence % 2 == 1)[:, None, None]
        if others is not None and total > 0:
            source = (at - self.offsets[sequence] + begins[sequence // 2]).masked_fill(self.padding[:, 0, 0], 0)
            self.rows = source.clamp(0, max(rows.shape[0] - 1, 0))  # whatever the lengths are

    def without_padding(self, x: Tensor) -> Tensor:
        """Zeros in place of padding, which thus adds 0 to everything and gets gradients of 0, even if it is NaN."""
        if self.rows is not None:
            x = x[self.rows] if x.shape[0] > 0 else x.new_zeros(self.rows.shape[0], *x.shape[1:])
        return x.masked_fill(self.padding, 0)

    def interleave(self, of_used: Tensor | None, of_padding: Tensor | None) -> Tensor:
        """One number a sequence, where there was one a slot; None: 0."""
        given = of_padding if of_used is None else of_used
        parts = [torch.zeros_like(given) if x is None else x.to(given.dtype) for x in (of_used, of_padding)]
        return torch.stack(parts, dim=1).flatten()
