"""Loads the ops library and tells torch about it: fake kernels, autograd, autocast.

`attention(*args)` is what hstu_attention calls, with the arguments of the schema of `hstu_ops::attention_fwd`:

    nothing needs a gradient    the kernel, below autograd: no Python between the call and C++
    something does              _Attention, a classic autograd.Function around attention_fwd and attention_bwd
    torch.compile, export       the op itself goes into the graph; autograd is traced later, through its Autograd kernel

A direct call of `torch.ops.hstu_ops.attention_fwd` behaves the same through the kernels registered here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from .bias import accumulation_dtype

_MIN_TORCH = (2, 10)


def _load() -> None:
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < _MIN_TORCH:
        raise ImportError(
            f"hstu_ops needs torch >= 2.10, found {torch.__version__}: run `pip install --upgrade 'torch>=2.10'`"
        )
    # More than one folder in a source tree beside an installed copy; see __init__.py.
    built = [x for folder in sys.modules[__package__].__path__ if (x := Path(folder, "libhstu_ops.so")).exists()]
    if not built:
        raise ImportError(
            f"hstu_ops is not built (nothing in {Path(__file__).parent}): run `pip install .` in its repository"
        )
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        raise ImportError(
            f"{built[0]} does not load ({error}): rebuild it on this machine with `pip install --force-reinstall .`"
        ) from error


_load()
_ops = torch.ops.hstu_ops
_fwd, _bwd = _ops.attention_fwd.default, _ops.attention_bwd.default
_lib = torch.library.Library("hstu_ops", "IMPL")  # the registrations below live as long as this object

# Places among the arguments of attention_fwd. attention_bwd takes grad_out, these, need_bias_grad, deterministic.
_ARGUMENTS = [x.name for x in _fwd._schema.arguments]
_TENSORS = tuple(i for i, x in enumerate(_fwd._schema.arguments) if "Tensor" in str(x.type))
_TABLES = tuple(_ARGUMENTS.index(x) for x in ("bias", "position_weight", "time_weight"))
_DIFFERENTIABLE = (*(_ARGUMENTS.index(x) for x in "qkv"), *_TABLES)  # in the order of attention_bwd's results


def build_info() -> dict[str, str]:
    """What this build holds, as the library reports it: instruction sets, CUDA architectures, versions."""
    return dict(line.split("=", 1) for line in _ops.build_info().splitlines() if "=" in line)


DEVICE_TYPES = ("cpu", "meta", *(("cuda",) if build_info().get("cuda_archs") else ()))


# ---- shapes without data ---------------------------------------------------------------------------------


@torch.library.register_fake("hstu_ops::attention_fwd", lib=_lib)
def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.register_fake("hstu_ops::attention_bwd", lib=_lib)
def _attention_bwd_fake(grad_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    need_bias_grad = args[len(_ARGUMENTS)]
    q, k, v = args[:3]
    tables = (args[i] if need_bias_grad else None for i in _TABLES)
    dtype = accumulation_dtype(q.dtype)
    table_grads = (q.new_empty((0,) if w is None else w.shape, dtype=dtype) for w in tables)
    return (*(x.new_empty(x.shape) for x in (q, k, v)), *table_grads)


# ---- autograd --------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*(inputs[i] for i in _TENSORS))
        ctx.others = tuple(None if i in _TENSORS else x for i, x in enumerate(inputs))

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        args = list(ctx.others)
        for i, x in zip(_TENSORS, ctx.saved_tensors, strict=True):
            args[i] = x
        if grad_out.stride(-1) != 1:
            grad_out = grad_out.contiguous()
        need_bias_grad = any(ctx.needs_input_grad[i] for i in _TABLES)
        grads = _attention_bwd(grad_out, *args, need_bias_grad, torch.are_deterministic_algorithms_enabled())
        result = [None] * len(_ARGUMENTS)
        for i, grad in zip(_DIFFERENTIABLE, grads, strict=True):
            result[i] = grad if ctx.needs_input_grad[i] else None
        return tuple(result)


class _AttentionBackward(torch.autograd.Function):
    """attention_bwd when somebody may want to differentiate it: they get an error instead of a wrong number."""

    @staticmethod
    def forward(*args: object) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return _bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> None:
        raise RuntimeError(
            "hstu_attention has no second derivative: use hstu_ops.reference.hstu_attention, the same in plain PyTorch"
        )


def _needs_grad(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in args if isinstance(x, Tensor))


def _apply(function: type[torch.autograd.Function], args: tuple):
    """function.apply(*args), without the 10 us that binding its signature costs outside of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    args = tuple(torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args)
    return super(torch.autograd.Function, function).apply(*args)


def _attention_fwd(*args: object) -> Tensor:
    return _apply(_Attention, args) if _needs_grad(args) else _Attention.forward(*args)


def _attention_bwd(*args: object) -> tuple[Tensor, ...]:
    return _apply(_AttentionBackward, args) if _needs_grad(args) else _AttentionBackward.forward(*args)


def attention(*args: object) -> Tensor:
    return _fwd(*args) if torch.compiler.is_compiling() else _attention_fwd(*args)


_lib.impl("attention_fwd", _attention_fwd, "Autograd")
_lib.impl("attention_bwd", _attention_bwd, "Autograd")


@torch.compiler.assume_constant_result
def allow_tf32() -> bool:
    """Whether torch allows TF32 in products of float32 on CUDA; compiled code keeps what held when it was compiled."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# ---- autocast --------------------------------------------------------------------------------------------


def autocast(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type of an enabled autocast, as scaled_dot_product_attention does; float64 is left alone."""
    device = q.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
        return q, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) for x in (q, *others))


def _autocast_kernel(key: torch._C.DispatchKey):
    below = torch._C.DispatchKeySet(key)

    def attention_fwd(*args: object) -> Tensor:
        qkv = autocast(*args[:3])
        with torch._C._ExcludeDispatchKeyGuard(below):
            return _fwd(*qkv, *args[3:])

    return attention_fwd


for _device in ("CPU", "CUDA"):
    _lib.impl(
        "attention_fwd", _autocast_kernel(getattr(torch._C.DispatchKey, f"Autocast{_device}")), f"Autocast{_device}"
    )
