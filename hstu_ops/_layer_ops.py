"""What torch knows about the layer's ops (layer_norm, silu_split, norm_gate, layer_core): fake kernels, autograd.

As in _library.py: below autograd where nothing needs a gradient, a classic autograd.Function where something does, the
op itself in compiled graphs, whose Autograd kernel is then that Function.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import _apply, _lib, _needs_grad, _ops
from .bias import accumulation_dtype

_layer_norm_fwd, _layer_norm_bwd = _ops.layer_norm_fwd.default, _ops.layer_norm_bwd.default
_silu_split_fwd, _silu_split_bwd = _ops.silu_split_fwd.default, _ops.silu_split_bwd.default
_norm_gate_fwd, _norm_gate_bwd = _ops.norm_gate_fwd.default, _ops.norm_gate_bwd.default
_layer_core_fwd, _layer_core_bwd = _ops.layer_core_fwd.default, _ops.layer_core_bwd.default


def _places(op: torch._ops.OpOverload, *names: str) -> tuple[int, ...]:
    found = [x.name for x in op._schema.arguments]
    return tuple(found.index(x) for x in names)


def _tensors(op: torch._ops.OpOverload) -> tuple[int, ...]:
    return tuple(i for i, x in enumerate(op._schema.arguments) if "Tensor" in str(x.type))


# ---- shapes without data ---------------------------------------------------------------------------------


def _fake(name: str):
    return torch.library.register_fake(f"hstu_ops::{name}", lib=_lib)


def _norm_grads(x: Tensor, columns: int | torch.SymInt, wanted: bool) -> tuple[Tensor, Tensor]:
    shape = (columns if wanted else 0,)
    return tuple(x.new_empty(shape, dtype=accumulation_dtype(x.dtype)) for _ in range(2))


@_fake("layer_norm_fwd")
def _(x, weight, bias, eps):
    return x.new_empty(x.shape)


@_fake("layer_norm_bwd")
def _(grad_out, x, weight, eps, need_weight_grad):
    return (x.new_empty(x.shape), *_norm_grads(x, x.shape[1], need_weight_grad))


@_fake("silu_split_fwd")
def _(uvqk, *options):
    return uvqk.new_empty(uvqk.shape)


@_fake("silu_split_bwd")
def _(grad_u, grad_v, grad_q, grad_k, uvqk, *options):
    return uvqk.new_empty(uvqk.shape)


@_fake("norm_gate_fwd")
def _(a, u, silu_u, weight, norm_bias, groups, eps, dropout, seed_values, seed, concat):
    return a.new_empty((a.shape[0], a.shape[1] * (3 if concat else 1)))


@_fake("norm_gate_bwd")
def _(grad_out, a, u, *options):
    return (a.new_empty(a.shape), a.new_empty(a.shape), *_norm_grads(a, a.shape[1], options[-1]))


_CORE = [x.name for x in _layer_core_fwd._schema.arguments]


@_fake("layer_core_fwd")
def _(*args):
    given = dict(zip(_CORE, args, strict=True))
    uvqk, heads = given["uvqk"], given["num_heads"]
    rows, hidden_v, hidden_qk = uvqk.shape[0], heads * given["dim_v"], heads * given["dim_qk"]
    sizes = ((given["silu_v"], hidden_v), (given["silu_q"], hidden_qk), (given["silu_k"], hidden_qk))
    return (
        uvqk.new_empty((rows, hidden_v * (3 if given["concat"] else 1))),
        uvqk.new_empty((rows, sum(size for on, size in sizes if on))),
        uvqk.new_empty((rows, hidden_v)),
    )


@_fake("layer_core_bwd")
def _(grad_out, uvqk, activated, a, *rest):
    options, (need_weight_grad, need_bias_grad, _) = rest[:-3], rest[-3:]
    given = dict(zip(_CORE[1:], options, strict=False))
    tables = (given[x] if need_bias_grad else None for x in ("bias", "position_weight", "time_weight"))
    dtype = accumulation_dtype(uvqk.dtype)
    return (
        uvqk.new_empty(uvqk.shape),
        *_norm_grads(uvqk, given["num_heads"] * given["dim_v"], need_weight_grad),
        *(uvqk.new_empty((0,) if x is None else x.shape, dtype=dtype) for x in tables),
    )


# ---- autograd --------------------------------------------------------------------------------------------


def _contiguous_rows(grad: Tensor | None) -> Tensor | None:
    return grad if grad is None or grad.stride(-1) == 1 or grad.shape[-1] == 1 else grad.contiguous()


def _below(op: torch._ops.OpOverload, *args: object):
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


class _Once(torch.autograd.Function):
    """A backward op when somebody may want to differentiate it: they get an error instead of a wrong number."""

    @staticmethod
    def forward(op: torch._ops.OpOverload, *args: object):
        return _below(op, *args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: object) -> None:
        ctx.name = inputs[0]._schema.name.removeprefix("hstu_ops::").removesuffix("_bwd")

    @staticmethod
    def backward(ctx, *grads: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.name} has no second derivative: use hstu_ops.reference.{ctx.name}, the same in plain PyTorch"
        )


def _backward(op: torch._ops.OpOverload, *args: object):
    return _apply(_Once, (op, *args)) if _needs_grad(args) else _below(op, *args)


def _without(places: tuple[int, ...], args: tuple) -> tuple:
    return tuple(None if i in places else x for i, x in enumerate(args))


def _with(places: tuple[int, ...], others: tuple, tensors: tuple) -> list:
    args = list(others)
    for i, x in zip(places, tensors, strict=True):
        args[i] = x
    return args


def _results(count: int, places: tuple[int, ...], wanted: list[bool], grads: tuple[Tensor, ...]) -> tuple:
    result = [None] * count
    for i, want, grad in zip(places, wanted, grads, strict=True):
        result[i] = grad if want else None
    return tuple(result)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(*args: object) -> Tensor:
        return _below(_layer_norm_fwd, *args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        x, weight, _, eps = inputs
        ctx.save_for_backward(x, weight)
        ctx.eps = eps

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        grads = _backward(_layer_norm_bwd, _contiguous_rows(grad_out), x, weight, ctx.eps, need_weight or need_bias)
        return grads[0] if need_x else None, grads[1] if need_weight else None, grads[2] if need_bias else None, None


class _SiluSplit(torch.autograd.Function):
    """From uvqk to views of the one tensor that the op makes."""

    @staticmethod
    def forward(*args: object) -> tuple[Tensor, ...]:
        return _below(_silu_split_fwd, *args).split(list(args[1:5]), dim=1)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple:
        (uvqk,) = ctx.saved_tensors
        grads = [_contiguous_rows(x) for x in grads]
        return (_backward(_silu_split_bwd, *grads, uvqk, *ctx.options), *(None,) * 8)


class _SiluColumns(torch.autograd.Function):
    """The op as it stands in a graph: from uvqk to the one tensor."""

    @staticmethod
    def forward(*args: object) -> Tensor:
        return _below(_silu_split_fwd, *args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.options = inputs[1:]

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        (uvqk,) = ctx.saved_tensors
        grads = _contiguous_rows(grad_out).split(list(ctx.options[:4]), dim=1)
        return (_backward(_silu_split_bwd, *grads, uvqk, *ctx.options), *(None,) * 8)


class _NormGate(torch.autograd.Function):
    tensors = _tensors(_norm_gate_fwd)
    differentiable = _places(_norm_gate_fwd, "a", "u", "weight", "norm_bias")  # in the order of the backward's results

    @staticmethod
    def forward(*args: object) -> Tensor:
        return _below(_norm_gate_fwd, *args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*(inputs[i] for i in _NormGate.tensors))
        ctx.others = _without(_NormGate.tensors, inputs)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        args = _with(_NormGate.tensors, ctx.others, ctx.saved_tensors)
        need = [ctx.needs_input_grad[i] for i in _NormGate.differentiable]
        grads = _backward(_norm_gate_bwd, _contiguous_rows(grad_out), *args, need[2] or need[3])
        return _results(len(args), _NormGate.differentiable, need, grads)


class _LayerCore(torch.autograd.Function):
    tensors = _tensors(_layer_core_fwd)
    differentiable = _places(
        _layer_core_fwd, "uvqk", "weight", "norm_bias", "bias", "position_weight", "time_weight"
    )  # in the order of the backward's results

    @staticmethod
    def forward(*args: object) -> tuple[Tensor, ...]:
        return _below(_layer_core_fwd, *args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *_, recompute_silu, recompute_attention = inputs
        _, activated, a = output
        ctx.mark_non_differentiable(activated, a)
        ctx.set_materialize_grads(False)
        kept = (None if recompute_silu else activated, None if recompute_attention else a)
        ctx.save_for_backward(*kept, *(inputs[i] for i in _LayerCore.tensors))
        ctx.others = _without(_LayerCore.tensors, inputs)

    @staticmethod
    def backward(ctx, grad_out: Tensor | None, *unused: None) -> tuple:
        if grad_out is None:
            return (None,) * len(ctx.others)
        activated, a, *tensors = ctx.saved_tensors
        uvqk, *options, _, _ = _with(_LayerCore.tensors, ctx.others, tensors)
        need = [ctx.needs_input_grad[i] for i in _LayerCore.differentiable]
        wanted = (need[1] or need[2], any(need[3:]), torch.are_deterministic_algorithms_enabled())
        grads = _backward(_layer_core_bwd, _contiguous_rows(grad_out), uvqk, activated, a, *options, *wanted)
        return _results(len(ctx.others), _LayerCore.differentiable, need, grads)


# ---- what pointwise.py calls, and the same for a direct call of the ops ----------------------------------


def layer_norm(*args: object) -> Tensor:
    return _layer_norm_fwd(*args) if torch.compiler.is_compiling() else _layer_norm(*args)


def silu_split(*args: object) -> tuple[Tensor, ...]:
    if torch.compiler.is_compiling():
        return _silu_split_fwd(*args).split(list(args[1:5]), dim=1)
    return _apply(_SiluSplit, args) if _needs_grad(args) else _SiluSplit.forward(*args)


def norm_gate(*args: object) -> Tensor:
    return _norm_gate_fwd(*args) if torch.compiler.is_compiling() else _norm_gate(*args)


def layer_core(*args: object) -> Tensor:
    return (_layer_core_fwd if torch.compiler.is_compiling() else _layer_core)(*args)[0]


def _layer_norm(*args: object) -> Tensor:
    return _apply(_LayerNorm, args) if _needs_grad(args) else _LayerNorm.forward(*args)


def _silu_columns(*args: object) -> Tensor:
    return _apply(_SiluColumns, args) if _needs_grad(args) else _SiluColumns.forward(*args)


def _norm_gate(*args: object) -> Tensor:
    return _apply(_NormGate, args) if _needs_grad(args) else _NormGate.forward(*args)


def _layer_core(*args: object) -> tuple[Tensor, ...]:
    return _apply(_LayerCore, args) if _needs_grad(args) else _LayerCore.forward(*args)


def _autograd_kernel(op: torch._ops.OpOverload):
    return lambda *args: _backward(op, *args)


_lib.impl("layer_norm_fwd", _layer_norm, "Autograd")
_lib.impl("silu_split_fwd", _silu_columns, "Autograd")
_lib.impl("norm_gate_fwd", _norm_gate, "Autograd")
_lib.impl("layer_core_fwd", _layer_core, "Autograd")
for _op in (_layer_norm_bwd, _silu_split_bwd, _norm_gate_bwd, _layer_core_bwd):
    _lib.impl(_op._schema.name.removeprefix("hstu_ops::"), _autograd_kernel(_op), "Autograd")
