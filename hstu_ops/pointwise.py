"""What an HSTU layer does between its matrix products: layer norm, SiLU with the split, norm and gate, all around the
attention. Tensors are jagged, `[T, ...]`: rows of all sequences back to back, the last dimension contiguous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _layer_ops, _library
from .attention import _check_int, _expect_tensors, _fail, _is_number, op_arguments
from .bias import RelativeBias, accumulation_dtype

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_ALL_FOUR = (True, True, True, True)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`(x - mean) / sqrt(variance + eps) * weight + bias` of each row, in the type of x: `[T, D]`.

    Arguments:
        x: `[T, D]`, float64 (CPU only), float32, float16 or bfloat16; rows at any stride.
        weight, bias: `[D]`, any float type; each may be absent.
        eps: added to the variance, a number.

    Mean and variance (the biased one) in float32, float64 for float64. Gradients of x, weight and bias, those of the
    last two summed in float32 in an order of their own: the same bits every time. No second derivative.

    Errors: TypeError or ValueError naming the argument.
    """
    _check_rows("x", x)
    weight, bias = (_affine(name, w, x, None, x.shape[1]) for name, w in (("weight", weight), ("bias", bias)))
    _check_number("eps", eps)
    return _layer_ops.layer_norm(x, weight, bias, eps)


def silu_split(
    uvqk: Tensor, sizes: Sequence[int], silu: Sequence[bool] = _ALL_FOUR
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Splits a projection into u, v, q and k and applies `silu(x) = x * sigmoid(x)` to those for which `silu` says so.

    Arguments:
        uvqk: `[T, C]`, float64 (CPU only), float32, float16 or bfloat16; rows at any stride.
        sizes: columns of u, v, q and k; their sum is C.
        silu: whether u, v, q and k get SiLU. The paper: all four. Production models: u only, (True, False, False,
            False).

    Result: four views, `[T, sizes[i]]`, of one buffer. Their gradients are read where they are and become one
    `[T, C]` gradient of uvqk. No second derivative.

    Errors: TypeError or ValueError naming the argument.
    """
    _check_rows("uvqk", uvqk)
    return _layer_ops.silu_split(uvqk, *_check_sizes(sizes, uvqk), *_check_flags(silu))


def norm_gate(
    a: Tensor,
    u: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    concat: bool = False,
) -> Tensor:
    """The output side of an HSTU layer: `dropout(norm(a) * u)`, `[T, D]`, or with `concat`
    `dropout([u, a, norm(a) * u])`, `[T, 3 D]`.

    Arguments:
        a: `[T, D]`, the attention's output, heads side by side; float64 (CPU only), float32, float16 or bfloat16.
        u: `[T, D]`, the gate, of the type of a. Rows of both at any stride.
        weight, bias: of the norm, `[D]` or `[groups]` (one number for a whole group), any float type; each may be
            absent.
        groups: `norm` has mean 0 and variance 1 over each of this many equal parts of a row. 1: all heads jointly. The
            number of heads: per head.
        eps: added to the variance, a number.
        dropout: the probability, in [0, 1), with which an element becomes 0, to the nearest multiple of 2^-15; the
            others are divided by `1 - dropout`.
        seed: an int, or an int64 tensor of one element on the device of a. What is dropped follows from it, the row
            and the column alone, and is the same on every device. Default: drawn from torch's generator of the device.
        training: False switches dropout off.
        concat: see above; the norm applies to the product only.

    Gradients of a, u, weight and bias, those of the last two summed in float32 in an order of their own: the same bits
    every time. No second derivative.

    Errors: TypeError or ValueError naming the argument.
    """
    _check_rows("a", a)
    _check_rows("u", u)
    if u.shape != a.shape:
        _fail("u", f"shape {list(a.shape)}, that of a", u)
    _check_like("u", u, "a", a)
    _check_groups(groups, a.shape[1])
    weight = _affine("weight", weight, a, groups, a.shape[1])
    bias = _affine("bias", bias, a, groups, a.shape[1])
    _check_number("eps", eps)
    dropped = _dropout_arguments(dropout, seed, training, a.device)
    return _layer_ops.norm_gate(a, u, False, weight, bias, groups, eps, *dropped, concat)


def layer_core(
    uvqk: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    *,
    num_heads: int,
    dim_qk: int,
    dim_v: int,
    silu: Sequence[bool] = _ALL_FOUR,
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
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    groups: int = 1,
    eps: float = 1e-6,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    training: bool = True,
    concat: bool = False,
    recompute_silu: bool = False,
    recompute_attention: bool = False,
) -> Tensor:
    """An HSTU layer from its first projection to its second, as one step of autograd:

        u, v, q, k = silu_split(uvqk, ...)
        a = hstu_attention(q, k, v, ...)
        y = norm_gate(a, u, norm_weight, norm_bias, ...)

    `[T, num_heads * dim_v]`, or three times as wide with `concat`. u has SiLU applied where it is read, all gradients
    are written into one `[T, C]` buffer, and what the backward pass needs may be recomputed instead of kept.

    Arguments:
        uvqk: `[T, C]`: u, v (`num_heads * dim_v` columns each), q, k (`num_heads * dim_qk` columns each).
        num_heads, dim_qk, dim_v: the shape of heads.
        silu: as in `silu_split`.
        alpha to bias: those of `hstu_attention`; `bias` is the attention's. (Queries are as many as keys, so there is
            no seq_offsets_q.)
        norm_weight, norm_bias: weight and bias of `norm_gate`; groups to concat: as there.
        recompute_silu: apply SiLU to v, q and k again in the backward pass instead of keeping the results.
        recompute_attention: compute the attention again instead of keeping its output.

    Kept for the backward pass, in elements a token: C of uvqk, the columns of those of v, q and k that have SiLU unless
    recompute_silu, and `num_heads * dim_v` unless recompute_attention.

    Gradients of uvqk, norm_weight, norm_bias and of the attention's bias. No second derivative. Autocast casts uvqk.

    Errors: TypeError or ValueError naming the argument.
    """
    _expect_tensors(uvqk=uvqk)
    (uvqk,) = _library.autocast(uvqk)
    _check_rows("uvqk", uvqk)
    for name, value in (("num_heads", num_heads), ("dim_qk", dim_qk), ("dim_v", dim_v)):
        _check_int(name, value, 1)
    hidden_v, hidden_qk = num_heads * dim_v, num_heads * dim_qk
    if uvqk.shape[1] != 2 * (hidden_v + hidden_qk):
        _fail("uvqk", f"{2 * (hidden_v + hidden_qk)} columns, 2 num_heads (dim_v + dim_qk)", uvqk)
    silu = _check_flags(silu)
    q = uvqk[:, :hidden_qk].unflatten(1, (num_heads, dim_qk))  # has the shape that the checks look at
    _, _, _, *options = op_arguments(
        *(q, q, q, seq_offsets, max_seq_len, num_targets, alpha, scale, causal, target_group_size),
        *(contextual_seq_len, max_attn_len, min_full_attn_seq_len, global_prefix_len, bias, None),
    )
    _check_groups(groups, hidden_v)
    norm_weight = _affine("norm_weight", norm_weight, uvqk, groups, hidden_v)
    norm_bias = _affine("norm_bias", norm_bias, uvqk, groups, hidden_v)
    _check_number("eps", eps)
    dropped = _dropout_arguments(dropout, seed, training, uvqk.device)
    return _layer_ops.layer_core(
        *(uvqk, *options, num_heads, dim_qk, dim_v, *silu, norm_weight, norm_bias, groups, eps),
        *(*dropped, concat, recompute_silu, recompute_attention),
    )


# ---- checks ------------------------------------------------------------------------------------------------


def _check_rows(name: str, x: Tensor) -> None:
    _expect_tensors(**{name: x})
    if x.dtype not in _FLOATS:
        _fail(name, "float64, float32, float16 or bfloat16", x, TypeError)
    if x.device.type not in _library.DEVICE_TYPES:
        _fail(name, f"a device this build has kernels for ({', '.join(_library.DEVICE_TYPES)})", x)
    if x.is_nested or x.dim() != 2 or x.shape[1] < 1:
        _fail(name, "shape [T, D] with at least one column", x)
    if x.stride(1) != 1 and x.shape[1] != 1:
        _fail(name, "a contiguous last dimension", f"strides {x.stride()}")


def _check_like(name: str, x: Tensor, other: str, like: Tensor) -> None:
    if x.dtype != like.dtype:
        _fail(name, f"{like.dtype}, the type of {other}", x, TypeError)
    if x.device != like.device:
        _fail(name, f"a tensor on {like.device}, the device of {other}", x)


def _affine(name: str, w: Tensor | None, x: Tensor, groups: int | None, columns: int) -> Tensor | None:
    """Weight or bias of a norm as one number a column, in the accumulation type. Given: one a column, or a group."""
    if w is None:
        return None
    if not isinstance(w, Tensor) or not w.is_floating_point():
        _fail(name, "None or a float tensor", w, TypeError)
    if w.dim() != 1 or not (w.shape[0] == columns or w.shape[0] == groups):  # `in` fails for symbols
        _fail(name, f"shape [{columns}]" + ("" if groups is None else f" or [{groups}]"), w)
    if w.device != x.device:
        _fail(name, f"a tensor on {x.device}, the device of the rows", w)
    w = w.to(accumulation_dtype(x.dtype))
    return (w if w.shape[0] == columns else w[:, None].expand(groups, columns // groups).flatten()).contiguous()


def _check_sizes(sizes: Sequence[int], uvqk: Tensor) -> list[int]:
    sizes = list(sizes)
    if len(sizes) != 4 or not all(isinstance(x, (int, torch.SymInt)) for x in sizes):
        _fail("sizes", "four ints, the columns of u, v, q and k", sizes)
    if min(sizes) < 0 or sum(sizes) != uvqk.shape[1]:
        _fail("sizes", f"at least 0 each, {uvqk.shape[1]} together, the columns of uvqk", sizes)
    return sizes


def _check_flags(silu: Sequence[bool]) -> tuple[bool, bool, bool, bool]:
    silu = tuple(silu)
    if len(silu) != 4 or not all(isinstance(x, bool) for x in silu):
        _fail("silu", "four bools, for u, v, q and k", silu)
    return silu


def _check_number(name: str, value: object) -> None:
    if not _is_number(value):
        _fail(name, "a number", value, TypeError)


def _check_groups(groups: int, columns: int) -> None:
    if not isinstance(groups, (int, torch.SymInt)):
        _fail("groups", "an int", groups, TypeError)
    if groups < 1 or columns % groups != 0:
        _fail("groups", f"a divisor of {columns}, the columns of a", groups)


def _dropout_arguments(
    dropout: float, seed: int | Tensor | None, training: bool, device: torch.device
) -> tuple[float, Tensor | None, int]:
    """The probability, the seed as a tensor, the seed as a number."""
    _check_number("dropout", dropout)
    if not 0 <= dropout < 1:
        _fail("dropout", "at least 0 and less than 1", dropout)
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            _fail("seed", "an int or an int64 tensor", seed, TypeError)
        if seed.numel() != 1 or seed.device != device:
            _fail("seed", f"one element on {device}, the device of the rows", seed)
    elif seed is not None and not isinstance(seed, (int, torch.SymInt)):
        _fail("seed", "None, an int or an int64 tensor", seed, TypeError)
    if dropout == 0 or not training:
        return 0.0, None, 0
    if seed is None:
        seed = torch.randint(_SEEDS, (1,), device=device)
    return (dropout, seed.reshape(1), 0) if isinstance(seed, Tensor) else (dropout, None, _as_int64(seed))


_SEEDS = 2**62


def _as_int64(seed: int) -> int:
    """The same 64 bits as a signed number."""
    return (seed + 2**63) % 2**64 - 2**63
