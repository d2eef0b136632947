"""What the HSTU paper compares HSTU with, at the same size: HSTU with softmax attention, and a Transformer.

Both are built and called like `hstu_ops.HSTU`, on torch's FlashAttention2 and scaled_dot_product_attention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import _fail
from .bias import RelativeAttentionBias, RelativeBias
from .layer import HSTU, HSTULayer, head_dim
from .pointwise import norm_gate, silu_split
from .reference import attention_mask, logical_position, relative_bias


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    alpha: float | None = None,
    bias: RelativeBias | None = None,
    num_targets: Tensor | None = None,
    **masks: object,
) -> Tensor:
    """Softmax attention over jagged sequences, `[T, H, Dv]`; the arguments are those of `hstu_attention`.

    Causal without bias and other masks it is FlashAttention2 on CUDA in float16 and bfloat16 (torch's kernel for
    sequences of different lengths, where Dqk = Dv is a multiple of 8 up to 256), and elsewhere torch's
    scaled_dot_product_attention of one padded batch. With a bias or a mask these are built in full.
    max_seq_len is at least the longest length; only FlashAttention2 reads it.
    """
    plain = bias is None and num_targets is None and not masks
    dim = q.shape[-1]
    if (
        plain
        and q.is_cuda
        and q.dtype in (torch.float16, torch.bfloat16)
        and dim == v.shape[-1] <= 256
        and dim % 8 == 0
    ):
        # Not scaled_dot_product_attention of nested tensors, which is the same kernel after a millisecond of Python.
        offsets = (seq_offsets.int(),) * 2
        sizes = (max_seq_len,) * 2
        return torch.ops.aten._flash_attention_forward(q, k, v, *offsets, *sizes, 0.0, True, False, scale=alpha)[0]

    lengths = seq_offsets.diff().long()
    batch, size = len(lengths), int(lengths.max()) if len(lengths) else 0
    sequence = torch.repeat_interleave(torch.arange(batch, device=q.device), lengths, output_size=len(q))
    at = (sequence, torch.arange(len(q), device=q.device) - seq_offsets[sequence])

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(batch, size, *x.shape[1:]).index_put(at, x)

    mask = None
    if not plain:
        targets = torch.zeros_like(lengths) if num_targets is None else num_targets.long()
        keep = attention_mask(lengths, num_targets=targets, size=size, device=q.device, **masks)
        keep = keep | torch.eye(size, dtype=torch.bool, device=q.device)  # padding: a softmax of nothing is NaN
        mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill(~keep, -torch.inf)[:, None]
        if bias is not None:
            position = logical_position(lengths, targets, torch.zeros_like(lengths), size)
            key_time = None if bias.timestamps is None else pad(bias.timestamps)
            query_time = key_time if bias.query_timestamps is None else pad(bias.query_timestamps)
            added = relative_bias(bias, position, query_time, key_time)
            mask = mask + (added[:, None] if added.dim() == 3 else added.movedim(0, 1)).to(q.dtype)
    heads_first = (pad(x).transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(*heads_first, attn_mask=mask, is_causal=plain, scale=alpha)
    return out.transpose(1, 2)[at]


class SoftmaxHSTULayer(HSTULayer):
    """`hstu_ops.HSTULayer` with softmax in place of SiLU in its attention; nothing divides by max_seq_len."""

    def _core(self, uvqk: Tensor, seq_offsets: Tensor, *, scale: object = None, **options: object) -> Tensor:
        if scale is not None:
            _fail("scale", "None (softmax has none)", scale)
        hidden_v, hidden_qk = self.num_heads * self.dim_v, self.num_heads * self.dim_qk
        u, v, q, k = silu_split(uvqk, (hidden_v, hidden_v, hidden_qk, hidden_qk), self.silu)
        heads = (x.unflatten(1, (self.num_heads, -1)) for x in (q, k, v))
        a = softmax_attention(*heads, seq_offsets, self.max_seq_len, alpha=self.alpha, **options)
        return norm_gate(a.flatten(1), u, self.output_norm_weight, self.output_norm_bias, **self._gate_options())


class SoftmaxHSTU(HSTU):
    """`hstu_ops.HSTU` of softmax layers."""

    layer_class = SoftmaxHSTULayer


class TransformerLayer(nn.Module):
    """A pre-norm Transformer layer over jagged sequences: attention, then a feed-forward part with GELU.

    The feed-forward part is `hidden_dim` wide, by default `embedding_dim / 2`: the layer then has as many weights as an
    HSTU layer of its size, 5 embedding_dim^2 where heads times their dimension is embedding_dim.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dim_qk: int | None = None,
        dim_v: int | None = None,
        *,
        max_seq_len: int,
        hidden_dim: int | None = None,
        dropout: float = 0.0,
        relative_bias: RelativeAttentionBias | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if relative_bias is not None:
            _fail("relative_bias", "None (the Transformer has none)", type(relative_bias).__name__)
        self.dim_qk = head_dim("dim_qk", dim_qk, embedding_dim, num_heads)
        self.dim_v = head_dim("dim_v", dim_v, embedding_dim, num_heads)
        self.num_heads, self.max_seq_len = num_heads, max_seq_len
        hidden_qk, hidden_v, where = num_heads * self.dim_qk, num_heads * self.dim_v, dict(device=device, dtype=dtype)
        hidden_dim = max(1, embedding_dim // 2) if hidden_dim is None else hidden_dim
        self.qkv_sizes = (hidden_qk, hidden_qk, hidden_v)
        self.attention_norm = nn.LayerNorm(embedding_dim, eps=1e-6, **where)
        self.qkv = nn.Linear(embedding_dim, sum(self.qkv_sizes), **where)
        self.output = nn.Linear(hidden_v, embedding_dim, **where)
        self.forward_norm = nn.LayerNorm(embedding_dim, eps=1e-6, **where)
        self.widen = nn.Linear(embedding_dim, hidden_dim, **where)
        self.narrow = nn.Linear(hidden_dim, embedding_dim, **where)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor,
        *,
        timestamps: Tensor | None = None,
        query_timestamps: Tensor | None = None,
        bias: object = None,
        **masks: object,
    ) -> Tensor:
        """As `hstu_ops.HSTULayer.forward`; timestamps are not read."""
        parts = self.qkv(self.attention_norm(x)).split(self.qkv_sizes, dim=1)
        heads = (part.unflatten(1, (self.num_heads, -1)) for part in parts)
        a = softmax_attention(*heads, seq_offsets, self.max_seq_len, bias=bias, **masks)
        x = x + self.dropout(self.output(a.flatten(1)))
        return x + self.dropout(self.narrow(F.gelu(self.widen(self.forward_norm(x)))))


class Transformer(HSTU):
    """A stack of `TransformerLayer`, built and called like `hstu_ops.HSTU`."""

    layer_class = TransformerLayer
