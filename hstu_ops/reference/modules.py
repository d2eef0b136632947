"""HSTULayer and HSTU in plain PyTorch: constructor, state dict and results are those of `hstu_ops`."""

from __future__ import annotations

from torch import Tensor

from .. import layer
from ..jagged import nested_rows
from .attention import padded_hstu_attention
from .pointwise import layer_norm, norm_gate, silu_split


class HSTULayer(layer.HSTULayer):
    """`hstu_ops.HSTULayer` in plain PyTorch, its attention as one padded batch; `recompute` has no effect."""

    def forward(
        self,
        x: Tensor,
        seq_offsets: Tensor | None = None,
        *,
        timestamps: Tensor | None = None,
        query_timestamps: Tensor | None = None,
        bias: object = None,
        **masks: object,
    ) -> Tensor:
        if x.is_nested:
            times = dict(timestamps=timestamps, query_timestamps=query_timestamps)
            return nested_rows(self, x, seq_offsets, times, bias=bias, **masks)
        heads, hidden_v, hidden_qk = self.num_heads, self.num_heads * self.dim_v, self.num_heads * self.dim_qk
        if self.relative_bias is not None:
            bias = self.relative_bias(timestamps, query_timestamps)
        uvqk = self.uvqk(layer_norm(x, self.input_norm_weight, self.input_norm_bias, self.eps))
        u, v, q, k = silu_split(uvqk, (hidden_v, hidden_v, hidden_qk, hidden_qk), self.silu)
        scale = masks.pop("scale", self.scale)
        a = padded_hstu_attention(
            *(part.unflatten(1, (heads, -1)) for part in (q, k, v)),
            seq_offsets,
            int(seq_offsets.diff().max()) if len(seq_offsets) > 1 else 0,
            alpha=self.alpha,
            scale=1 / self.max_seq_len if scale is None else scale,
            bias=bias,
            **masks,
        )
        y = norm_gate(a.flatten(1), u, self.output_norm_weight, self.output_norm_bias, **self._gate_options())
        return x + self.output(y)


class HSTU(layer.HSTU):
    """`hstu_ops.HSTU` of plain PyTorch layers."""

    layer_class = HSTULayer
