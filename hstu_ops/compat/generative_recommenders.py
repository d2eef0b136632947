"""Meta's generative-recommenders: its attention (`generative_recommenders.ops.hstu_attention`) computed by hstu_ops,
and its layers' weights in an `HSTULayer`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention import _expect_tensors, _fail, hstu_attention
from ..bias import RelativeAttentionBias, TimeBuckets
from ..layer import HSTULayer


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
    _expect_tensors(q=q, k=k, v=v, seq_offsets=seq_offsets)
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
    _expect_tensors(delta_q=delta_q, k=k, v=v, seq_offsets=seq_offsets)
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


# ---- layers ------------------------------------------------------------------------------------------------


def research_layer(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    attention_dim: int,
    *,
    max_seq_len: int | None = None,
    linear_activation: str = "silu",
    prefix: str = "",
    **options: object,
) -> HSTULayer:
    """An `HSTULayer` with the weights of a research layer (`SequentialTransductionUnitJagged`), on their device.

        >>> layer = research_layer(model.state_dict(), 8, 64, prefix="_hstu._attention_layers.0.")
        >>> y = layer(x, x_offsets, timestamps=timestamps, query_timestamps=next_timestamps)

    Arguments:
        state_dict: `_uvqk` `[E, C]`, `_o.weight`, `_o.bias` and, where there is a relative bias,
            `_rel_attn_bias._pos_w` (or `_w`) `[2N - 1]` and `_rel_attn_bias._ts_w` `[129]`.
        num_heads, attention_dim: heads and their dimension of q and k; that of u and v follows.
        max_seq_len: N, the padded length, by which the output is divided. Default: that of the position table.
        linear_activation: "silu" or "none", of u, v, q and k.
        prefix: of the layer's names in state_dict.
        options: recompute and dropout of `HSTULayer`.

    The query time of a row is there that of the next row, and of the last row of a sequence that of the next item: pass
    both as shown. Timestamps of a sequence never fall (the buckets are of `|t|` there, of `max(t, 1)` here).

    Errors: ValueError naming what is missing, unknown or does not fit; for layers with `concat_ua`, whose second
    part is the normed output of attention, where `HSTULayer` has the output itself.
    """
    weights = _under(state_dict, prefix, ("_uvqk", "_o.weight", "_o.bias"), _RESEARCH_BIAS)
    if linear_activation not in ("silu", "none"):
        _fail("linear_activation", '"silu" or "none"', linear_activation)
    dim_v = _dim_v("_uvqk", weights["_uvqk"], num_heads, attention_dim)
    if weights["_o.weight"].shape[1] == 3 * num_heads * dim_v:
        _fail("_o.weight", "a layer without concat_ua (its normed attention has no place here)", weights["_o.weight"])
    converted = {"uvqk.weight": weights["_uvqk"].T, "output.weight": weights["_o.weight"]}
    converted["output.bias"] = weights["_o.bias"]

    position, time = weights.get("_rel_attn_bias._pos_w", weights.get("_rel_attn_bias._w")), None
    relative = None
    if position is not None:
        time = weights.get("_rel_attn_bias._ts_w")
        longest = (len(position) + 1) // 2
        buckets = None if time is None else TimeBuckets.log(len(time) - 1)
        relative = RelativeAttentionBias(longest, buckets, device=position.device, dtype=position.dtype)
        converted |= {"relative_bias.position_weight": position}
        converted |= {} if time is None else {"relative_bias.time_weight": time}
        max_seq_len = longest if max_seq_len is None else max_seq_len
    if max_seq_len is None:
        _fail("max_seq_len", "the padded length, as there is no position table to tell", None)
    return _layer(
        converted,
        num_heads,
        attention_dim,
        dim_v,
        max_seq_len=max_seq_len,
        silu=(linear_activation == "silu",) * 4,
        alpha=1.0,
        relative_bias=relative,
        **options,
    )


def stu_layer(
    state_dict: Mapping[str, Tensor],
    num_heads: int,
    attention_dim: int,
    *,
    max_seq_len: int,
    attn_alpha: float | None = None,
    output_dropout_ratio: float = 0.3,
    prefix: str = "",
    **options: object,
) -> HSTULayer:
    """An `HSTULayer` with the weights of a production layer (`STULayer`), on their device.

        >>> layer = stu_layer(model.state_dict(), 4, 128, max_seq_len=4096, prefix="_stu_layers.0.")
        >>> y = layer(x, x_offsets, num_targets=num_targets, max_attn_len=0, contextual_seq_len=0)

    Arguments:
        state_dict: `_uvqk_weight` `[E, C]`, `_uvqk_beta`, `_input_norm_weight`, `_input_norm_bias`, `_output_weight`
            `[3 H Dv, E]`, `_output_norm_weight`, `_output_norm_bias` (`[H]` each with use_group_norm).
        num_heads, attention_dim: heads and their dimension of q and k; that of u and v follows.
        max_seq_len: by which the output is divided. There it is an argument of each call: pass `scale=1 / max_seq_len`
            to the layer's call where it changes.
        attn_alpha: factor of the products; default `1 / sqrt(attention_dim)`.
        output_dropout_ratio: the dropout, in training mode.
        prefix: of the layer's names in state_dict.
        options: recompute of `HSTULayer`.

    The masks of its configuration (max_attn_len, contextual_seq_len, target_aware) are arguments of the layer's call.

    Errors: ValueError naming what is missing, unknown or does not fit.
    """
    weights = _under(state_dict, prefix, _STU)
    dim_v = _dim_v("_uvqk_weight", weights["_uvqk_weight"], num_heads, attention_dim)
    converted = {
        "uvqk.weight": weights["_uvqk_weight"].T,
        "uvqk.bias": weights["_uvqk_beta"],
        "output.weight": weights["_output_weight"].T,
        **{x: weights[f"_{x}"] for x in _NORMS},
    }
    return _layer(
        converted,
        num_heads,
        attention_dim,
        dim_v,
        max_seq_len=max_seq_len,
        silu=(True, False, False, False),
        norm_affine=True,
        norm_per_head=weights["_output_norm_weight"].shape[0] == num_heads != num_heads * dim_v,
        concat=True,
        dropout=output_dropout_ratio,
        uvqk_bias=True,
        output_bias=False,
        alpha=attn_alpha,
        **options,
    )


_RESEARCH_BIAS = ("_rel_attn_bias._pos_w", "_rel_attn_bias._ts_w", "_rel_attn_bias._w")
_NORMS = ("input_norm_weight", "input_norm_bias", "output_norm_weight", "output_norm_bias")
_STU = ("_uvqk_weight", "_uvqk_beta", "_output_weight", *(f"_{x}" for x in _NORMS))


def _under(
    state_dict: Mapping[str, Tensor], prefix: str, needed: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    found = {x.removeprefix(prefix): w for x, w in state_dict.items() if x.startswith(prefix)}
    if missing := [prefix + x for x in needed if x not in found]:
        _fail("state_dict", f"the names {', '.join(missing)}", f"{', '.join(state_dict)}"[:200] or "none")
    if unknown := [prefix + x for x in found if x not in needed + optional]:
        _fail("state_dict", f"no other names than {', '.join(needed + optional)}", ", ".join(unknown)[:200])
    return found


def _dim_v(name: str, uvqk: Tensor, num_heads: int, attention_dim: int) -> int:
    dim_v, rest = divmod(uvqk.shape[1], 2 * num_heads)
    if rest or dim_v <= attention_dim:
        _fail(name, f"2 * {num_heads} * ({attention_dim} + Dv) columns", uvqk)
    return dim_v - attention_dim


def _layer(converted: dict[str, Tensor], num_heads: int, dim_qk: int, dim_v: int, **options: object) -> HSTULayer:
    weight = converted["uvqk.weight"]
    layer = HSTULayer(weight.shape[1], num_heads, dim_qk, dim_v, device=weight.device, dtype=weight.dtype, **options)
    try:
        layer.load_state_dict(converted)
    except RuntimeError as error:
        raise ValueError(f"hstu_ops: state_dict: {error}") from None
    return layer
