"""Attention of Meta's generative-recommenders (`generative_recommenders.ops.hstu_attention`), computed by hstu_ops.

Two of its rules differ from the defaults of `hstu_ops.hstu_attention`: alpha has none, and where `attn_scale` is given
it replaces `1 / max_seq_len`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import _fail, hstu_attention


def hstu_mha(
    max_seq_len: int,
    alpha: float,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    causal: bool = True,
    dropout_pr: float = 0.0,
    training: bool = True,
    num_targets: Tensor | None = None,
    attn_scale: Tensor | float | None = None,
    max_attn_len: int | None = 0,
    contextual_seq_len: int = 0,
    min_full_attn_seq_len: int = 0,
    sort_by_length: bool = False,
    kernel: object = None,
    enable_tma: bool = False,
) -> Tensor:
    """`silu(alpha * q k) v / max_seq_len` under the causal mask: `[L, H, V]`.

    Arguments:
        max_seq_len: no sequence is longer; the denominator.
        alpha: factor of the products.
        q, k, v: `[L, H, D]`, `[L, H, D]`, `[L, H, V]`, float32, float16 or bfloat16 (float64 on CPU).
        seq_offsets: `[B + 1]`, int32 or int64.
        causal: True.
        dropout_pr, training: a dropout of 0, or not training: there is no dropout on attention here.
        num_targets: `[B]`, the last rows of each sequence that are candidates and see only themselves of each other.
        attn_scale: `[L]`, one factor a row, or a single one, in place of `1 / max_seq_len`; has no gradient.
        max_attn_len: the window, in logical positions; 0 or None: no window.
        contextual_seq_len: this many first rows of a sequence see its whole history.
        min_full_attn_seq_len: this many last history rows, and all targets, ignore the window.
        sort_by_length, kernel, enable_tma: taken and not needed; the kernels of hstu_ops order their work themselves.

    Gradients of q, k and v. Errors: TypeError or ValueError naming the argument.
    """
    if not causal:
        _fail("causal", "True, as in generative_recommenders (or hstu_ops.hstu_attention, which has both)", causal)
    if dropout_pr > 0 and training:
        _fail("dropout_pr", "0 while training: attention has no dropout here", dropout_pr)
    if isinstance(attn_scale, Tensor):
        if attn_scale.dim() == 0:
            attn_scale = attn_scale.expand(q.shape[0])
        elif attn_scale.shape != q.shape[:1]:
            _fail("attn_scale", f"shape [{q.shape[0]}], one factor a row, or a single one", attn_scale)
        if attn_scale.shape[0] == seq_offsets.shape[0] - 1:
            # The op would read it as one factor a sequence: an empty sequence more tells the two apart.
            seq_offsets = torch.cat((seq_offsets, seq_offsets[-1:]))
            num_targets = None if num_targets is None else F.pad(num_targets, (0, 1))
    return hstu_attention(
        *(_last_contiguous(x) for x in (q, k, v)),
        seq_offsets.contiguous(),
        max_seq_len,
        alpha=alpha,
        scale=attn_scale,
        num_targets=num_targets,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len or 0,
        min_full_attn_seq_len=min_full_attn_seq_len,
    )


def delta_hstu_mha(
    max_seq_len: int,
    alpha: float,
    delta_q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    num_targets: Tensor | None = None,
    max_attn_len: int | None = 0,
    contextual_seq_len: int = 0,
    kernel: object = None,
    enable_tma: bool = False,
) -> Tensor:
    """`hstu_mha` for the last rows of each sequence only, the same number in each: `[B * delta, H, V]`.

    Arguments:
        delta_q: `[B * delta, H, D]`, the queries of the last `delta` rows of each sequence.
        k, v: `[L, H, D]`, `[L, H, V]`, all rows.
        seq_offsets: `[B + 1]`, of k and v.
        the others: see `hstu_mha`.

    Gradients of delta_q, k and v. Errors: TypeError or ValueError naming the argument.
    """
    batch = seq_offsets.shape[0] - 1
    delta, rest = divmod(delta_q.shape[0], max(batch, 1))
    if rest:
        _fail("delta_q", f"as many rows for each of the {batch} sequences", delta_q)
    return hstu_attention(
        *(_last_contiguous(x) for x in (delta_q, k, v)),
        seq_offsets.contiguous(),
        max_seq_len,
        alpha=alpha,
        num_targets=num_targets,
        contextual_seq_len=contextual_seq_len,
        max_attn_len=max_attn_len or 0,
        seq_offsets_q=delta * torch.arange(batch + 1, dtype=seq_offsets.dtype, device=seq_offsets.device),
    )


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
