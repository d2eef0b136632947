"""HSTULayer and HSTU: the layer of the HSTU paper around `hstu_ops.layer_core`, and a stack of them.

`hstu_ops.reference` has both in plain PyTorch, with the same constructor and state dict.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn

from .attention import _check_int, _fail
from .bias import RelativeAttentionBias
from .jagged import nested_rows
from .pointwise import layer_core, layer_norm

_RECOMPUTE = ("norm", "projection", "silu", "attention")


class HSTULayer(nn.Module):
    """One HSTU layer over jagged sequences: `[T, embedding_dim]` in and out, rows of all sequences back to back.

        u, v, q, k = split(silu(uvqk(norm(x))))
        y = x + output(dropout(norm(attention(q, k, v)) * u))

    Example: two users with 3 and 2 items.

        >>> layer = HSTULayer(64, num_heads=2, dim_qk=32, dim_v=32, max_seq_len=200)
        >>> y = layer(torch.randn(5, 64), torch.tensor([0, 3, 5]))

    Arguments:
        embedding_dim: columns of x.
        num_heads, dim_qk, dim_v: heads, and the dimensions of each one's q and k, and v and u. Default of both
            dimensions: `embedding_dim / num_heads`.
        max_seq_len: what the attention's output is divided by; see `scale`.
        silu: which of u, v, q, k get SiLU.
        norm_affine: both norms have a weight and a bias.
        norm_per_head: the norm of the attention's output is over each head by itself (its weight and bias have one
            number a head), not over all jointly.
        concat: the output projection reads `[u, a, norm(a) * u]` for the attention's output a, not the product alone;
            dropout is then applied to all three.
        dropout: probability, in [0, 1), in training mode. Drawn from torch's generator of the device.
        uvqk_bias, output_bias: whether the two projections have a bias.
        alpha, scale: those of `hstu_attention`; default `1 / sqrt(dim_qk)` and `1 / max_seq_len`.
        relative_bias: a `RelativeAttentionBias` of this layer's own.
        eps: of both norms.
        recompute: what the backward pass computes again instead of keeping it, any of "norm" (the normed input),
            "projection" (u, v, q and k before SiLU, and the normed input), "silu" (v, q and k after SiLU) and
            "attention" (its output). Gradients are the same bits. torch.compile decides about the first two itself.

    The published variants:

    | | research models (the defaults) | production models |
    |---|---|---|
    | silu | all four | (True, False, False, False) |
    | norm_affine, concat, uvqk_bias | False | True |
    | output_bias | True | False |
    | norm_per_head | False | either |
    | alpha | 1.0 | 1 / sqrt(dim_qk) |
    | relative_bias | position and time (`TimeBuckets.log()`) | none |

    State dict: `uvqk.weight` `[C, embedding_dim]` with rows u, v (`num_heads * dim_v` each), q, k (`num_heads * dim_qk`
    each), `output.weight`, `uvqk.bias` and `output.bias` where they exist; with norm_affine `input_norm_weight`,
    `input_norm_bias`, `output_norm_weight`, `output_norm_bias`; `relative_bias.*`.

    Kept for the backward pass, in numbers a row with `d = num_heads * dim_v = num_heads * dim_qk = embedding_dim`: x
    (d), the normed input (d), uvqk (4d), v, q and k after SiLU (3d), the attention's output (d) and what the output
    projection reads (d). That is 22d bytes in bfloat16, 14d with recompute=("norm", "silu"), 6d with "projection" too.

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int,
        dim_qk: int | None = None,
        dim_v: int | None = None,
        *,
        max_seq_len: int,
        silu: Sequence[bool] = (True, True, True, True),
        norm_affine: bool = False,
        norm_per_head: bool = False,
        concat: bool = False,
        dropout: float = 0.0,
        uvqk_bias: bool = False,
        output_bias: bool = True,
        alpha: float | None = None,
        scale: float | None = None,
        relative_bias: RelativeAttentionBias | None = None,
        eps: float = 1e-6,
        recompute: Collection[str] = (),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim_qk = head_dim("dim_qk", dim_qk, embedding_dim, num_heads)
        self.dim_v = head_dim("dim_v", dim_v, embedding_dim, num_heads)
        _check_int("max_seq_len", max_seq_len, 1)
        recompute = (recompute,) if isinstance(recompute, str) else tuple(recompute)
        if not set(recompute) <= set(_RECOMPUTE):
            _fail("recompute", f"names among {', '.join(_RECOMPUTE)}", recompute)
        self.embedding_dim, self.num_heads, self.max_seq_len = embedding_dim, num_heads, max_seq_len
        self.silu, self.norm_per_head, self.concat, self.dropout = tuple(silu), norm_per_head, concat, dropout
        self.alpha, self.scale, self.eps, self.recompute = alpha, scale, eps, recompute

        hidden_v, hidden_qk, where = num_heads * self.dim_v, num_heads * self.dim_qk, dict(device=device, dtype=dtype)
        self.uvqk = nn.Linear(embedding_dim, 2 * hidden_v + 2 * hidden_qk, bias=uvqk_bias, **where)
        self.output = nn.Linear((3 if concat else 1) * hidden_v, embedding_dim, bias=output_bias, **where)
        for name, size in (("input", embedding_dim), ("output", num_heads if norm_per_head else hidden_v)):
            for kind in ("weight", "bias"):
                parameter = nn.Parameter(torch.empty(size, **where)) if norm_affine else None
                self.register_parameter(f"{name}_norm_{kind}", parameter)
        self.relative_bias = relative_bias
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """uvqk normal(0, 0.02), output Xavier uniform, norms and biases the identity, as published."""
        nn.init.normal_(self.uvqk.weight, std=0.02)
        nn.init.xavier_uniform_(self.output.weight)
        for bias in (self.uvqk.bias, self.output.bias, self.input_norm_bias, self.output_norm_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for weight in (self.input_norm_weight, self.output_norm_weight):
            if weight is not None:
                nn.init.ones_(weight)
        if self.relative_bias is not None:
            self.relative_bias.reset_parameters()

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
        """`[T, embedding_dim]`, of the type of x (under autocast, the wider of it and autocast's).

        Arguments:
            x: `[T, embedding_dim]`, or a jagged tensor of torch.nested `[B, *, embedding_dim]` (leave out seq_offsets;
                the result is jagged too).
            seq_offsets: `[B + 1]`, int32 or int64, as in `hstu_attention`.
            timestamps, query_timestamps: int64 `[T]`, for the time table of relative_bias, if there is one.
            bias: as in `hstu_attention`, for a layer without relative_bias of its own.
            masks: num_targets, target_group_size, contextual_seq_len, max_attn_len, min_full_attn_seq_len,
                global_prefix_len, causal and scale of `hstu_attention`.
        """
        if x.is_nested:
            times = dict(timestamps=timestamps, query_timestamps=query_timestamps)
            return nested_rows(self, x, seq_offsets, times, bias=bias, **masks)
        if x.dim() != 2 or x.shape[1] != self.embedding_dim:
            _fail("x", f"shape [T, {self.embedding_dim}]", x)
        if self.relative_bias is not None:
            if bias is not None:
                _fail("bias", "None, as the layer has a relative_bias", type(bias).__name__)
            bias = self.relative_bias(timestamps, query_timestamps)

        normed = self._normed(x)
        with self._kept_unless(("norm", "projection"), normed, lambda: self._normed(x), x):
            uvqk = self.uvqk(normed)
        with self._kept_unless(("projection",), uvqk, lambda: self.uvqk(self._normed(x)), x):
            y = self._core(uvqk, seq_offsets, scale=masks.pop("scale", self.scale), bias=bias, **masks)
        return x + self.output(y)

    def extra_repr(self) -> str:
        return f"{self.embedding_dim}, num_heads={self.num_heads}, dim_qk={self.dim_qk}, dim_v={self.dim_v}"

    def _normed(self, x: Tensor) -> Tensor:
        """In autocast's type, so that what the projection keeps is this very tensor."""
        normed = layer_norm(x, self.input_norm_weight, self.input_norm_bias, self.eps)
        device = x.device.type
        autocast = device in ("cpu", "cuda") and torch.is_autocast_enabled(device) and x.dtype != torch.float64
        return normed.to(torch.get_autocast_dtype(device)) if autocast else normed

    def _core(self, uvqk: Tensor, seq_offsets: Tensor, **options: object) -> Tensor:
        return layer_core(
            uvqk,
            seq_offsets,
            self.max_seq_len,
            num_heads=self.num_heads,
            dim_qk=self.dim_qk,
            dim_v=self.dim_v,
            silu=self.silu,
            alpha=self.alpha,
            norm_weight=self.output_norm_weight,
            norm_bias=self.output_norm_bias,
            **self._gate_options(),
            recompute_silu="silu" in self.recompute,
            recompute_attention="attention" in self.recompute,
            **options,
        )

    def _gate_options(self) -> dict[str, object]:
        """Of `norm_gate`, beside weight and bias."""
        return dict(
            groups=self.num_heads if self.norm_per_head else 1,
            eps=self.eps,
            dropout=self.dropout,
            training=self.training,
            concat=self.concat,
        )

    def _kept_unless(self, reasons: tuple[str, ...], tensor: Tensor, compute: Callable[[], Tensor], x: Tensor):
        wanted = torch.is_grad_enabled() and any(reason in self.recompute for reason in reasons)
        if not wanted or torch.compiler.is_compiling():
            return contextlib.nullcontext()
        read = (x, self.input_norm_weight, self.input_norm_bias, *self.uvqk.parameters())
        return _recomputed(tensor, compute, [t for t in read if t is not None])


class HSTU(nn.Module):
    """A stack of `HSTULayer`, each with its residual: `[T, embedding_dim]` in and out.

        >>> rab = RelativeAttentionBias(200, TimeBuckets.log())
        >>> encoder = HSTU(4, 64, num_heads=2, max_seq_len=200, relative_bias=rab)
        >>> y = encoder(torch.randn(5, 64), torch.tensor([0, 3, 5]), timestamps=torch.arange(5))

    Arguments:
        num_layers: how many.
        relative_bias: a `RelativeAttentionBias` that all layers share, or a function that makes one for each.
        The others: those of `HSTULayer`.

    State dict: `layers.0.*` and so on, `relative_bias.*` where it is shared.
    """

    layer_class: type[nn.Module] = HSTULayer

    def __init__(
        self,
        num_layers: int,
        embedding_dim: int,
        num_heads: int,
        dim_qk: int | None = None,
        dim_v: int | None = None,
        *,
        max_seq_len: int,
        relative_bias: RelativeAttentionBias | Callable[[], RelativeAttentionBias] | None = None,
        **layer_options: object,
    ) -> None:
        super().__init__()
        _check_int("num_layers", num_layers, 1)
        shared = relative_bias is None or isinstance(relative_bias, nn.Module)
        self.relative_bias = relative_bias if shared else None
        self.layers = nn.ModuleList(
            self.layer_class(
                embedding_dim,
                num_heads,
                dim_qk,
                dim_v,
                max_seq_len=max_seq_len,
                relative_bias=None if shared else relative_bias(),
                **layer_options,
            )
            for _ in range(num_layers)
        )

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
        """Arguments and result are those of `HSTULayer.forward`; every layer gets the same bias and masks."""
        times = dict(timestamps=timestamps, query_timestamps=query_timestamps)
        if x.is_nested:
            return nested_rows(self, x, seq_offsets, times, bias=bias, **masks)
        if self.relative_bias is not None:
            if bias is not None:
                _fail("bias", "None, as the stack has a relative_bias", type(bias).__name__)
            bias = self.relative_bias(**times)
        for layer in self.layers:
            x = layer(x, seq_offsets, **times, bias=bias, **masks)
        return x


def head_dim(name: str, given: int | None, embedding_dim: int, num_heads: int) -> int:
    """The dimension of a head, `embedding_dim / num_heads` unless given."""
    _check_int("embedding_dim", embedding_dim, 1)
    _check_int("num_heads", num_heads, 1)
    if given is None:
        if embedding_dim % num_heads != 0:
            _fail(name, f"an int, as {num_heads} heads do not divide embedding_dim {embedding_dim}", None)
        return embedding_dim // num_heads
    _check_int(name, given, 1)
    return given


class _recomputed(torch.autograd.graph.saved_tensors_hooks):
    """Within it, autograd keeps `compute` in place of `tensor` and of views of it, and calls it in the backward pass.

    `tensor` has to live as long as the context: it is told by its address. `read`: what `compute` reads, which may not
    be changed in place until then, nor may what is kept.
    """

    def __init__(self, tensor: Tensor, compute: Callable[[], Tensor], read: list[Tensor]) -> None:
        versions = [x._version for x in read]
        address, device = tensor.untyped_storage().data_ptr(), tensor.device.type
        autocast = dict(enabled=False)
        if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
            autocast = dict(dtype=torch.get_autocast_dtype(device))

        def pack(x: Tensor) -> tuple:
            if x.numel() == 0 or x.untyped_storage().data_ptr() != address:
                return x.detach(), x._version  # an output kept as it is would own itself
            return x.shape, x.stride(), x.storage_offset()

        def unpack(kept: tuple) -> Tensor:
            if isinstance(kept[0], Tensor):
                _expect_unchanged(kept[0]._version == kept[1])
                return kept[0]
            _expect_unchanged([x._version for x in read] == versions)
            with torch.no_grad(), torch.autocast(device, **autocast):
                return compute().as_strided(*kept)

        super().__init__(pack, unpack)


def _expect_unchanged(good: bool) -> None:
    if not good:
        raise RuntimeError(
            "hstu_ops: a weight or an input was changed in place between the forward and the backward pass"
        )
