"""Loads the ops library and tells torch about it: fake kernels, autograd, autocast.

`attention(*args)` is what hstu_attention calls, with the arguments of the schema of `hstu_ops::attention_fwd`:

    nothing needs a gradient    the kernel, below autograd: no Python between the call and C++
    something does              _Attention, a classic autograd.Function around attention_fwd and its backward ops
    torch.compile, export       the op itself goes into the graph; autograd is traced later, through its Autograd kernel

A direct call of `torch.ops.hstu_ops.attention_fwd` behaves the same through the kernels registered here.

`plain_attention` is for eager calls without options, which are the most, and short on a GPU: `attention_plain_fwd` has
seven arguments instead of 24, of which torch takes up to 0.3 us each.
"""

from __future__ import annotations

import sys
from functools import partial
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
_fwd, _bwd, _bias_bwd = (x.default for x in (_ops.attention_fwd, _ops.attention_bwd, _ops.attention_bias_bwd))
_plain_fwd, _plain_bwd = _ops.attention_plain_fwd.default, _ops.attention_plain_bwd.default
_lib = torch.library.Library("hstu_ops", "IMPL")  # the registrations below live as long as this object

# Places of the bias among the arguments of attention_fwd. attention_bwd (gradients of q, k and v) and
# attention_bias_bwd (of these and of the bias) take grad_out, the same arguments, deterministic.
_ARGUMENTS = [x.name for x in _fwd._schema.arguments]
_TABLES = tuple(_ARGUMENTS.index(x) for x in ("bias", "position_weight", "time_weight"))


def build_info() -> dict[str, str]:
    """What this build holds, as the library reports it: instruction sets, CUDA architectures, versions."""
    return dict(line.split("=", 1) for line in _ops.build_info().splitlines() if "=" in line)


DEVICE_TYPES = ("cpu", "meta", *(("cuda",) if build_info().get("cuda_archs") else ()))


# ---- shapes without data ---------------------------------------------------------------------------------


@torch.library.register_fake("hstu_ops::attention_fwd", lib=_lib)
def _attention_fwd_fake(q: Tensor, k: Tensor, v: Tensor, *options: object) -> Tensor:
    _expect_one_device(q, k, v, *options)
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2]))


@torch.library.register_fake("hstu_ops::attention_bwd", lib=_lib)
def _attention_bwd_fake(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, *options: object) -> tuple[Tensor, ...]:
    _expect_one_device(q, grad_out, k, v, *options)
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@torch.library.register_fake("hstu_ops::attention_bias_bwd", lib=_lib)
def _attention_bias_bwd_fake(grad_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    q, tables, dtype = args[0], [args[i] for i in _TABLES], accumulation_dtype(args[0].dtype)
    table_grads = (q.new_empty((0,) if w is None else w.shape, dtype=dtype) for w in tables)
    return (*_attention_bwd_fake(grad_out, *args), *table_grads)


torch.library.register_fake("hstu_ops::attention_plain_fwd", _attention_fwd_fake, lib=_lib)
torch.library.register_fake("hstu_ops::attention_plain_bwd", _attention_bwd_fake, lib=_lib)


def _expect_one_device(q: Tensor, *others: object) -> None:
    """One meta tensor among real ones brings a call here, and the result would be memory that nobody has written."""
    for x in others:
        if isinstance(x, Tensor) and x.device.type != q.device.type:
            raise ValueError(f"hstu_ops: expected all tensors on {q.device}, the device of q, got one on {x.device}")


# ---- autograd --------------------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True  # a loop: the ops have no batching rule

    @staticmethod
    def forward(*args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*[x if isinstance(x, Tensor) else None for x in inputs])
        ctx.others = [None if isinstance(x, Tensor) else x for x in inputs]

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        args = [x if y is None else y for x, y in zip(ctx.others, ctx.saved_tensors, strict=True)]
        with_bias = any(ctx.needs_input_grad[i] for i in _TABLES)
        grads = _attention_bwd(_bias_bwd if with_bias else _bwd, grad_out, *args)
        result = [None] * len(args)
        for i, grad in zip((0, 1, 2, *_TABLES), grads):  # noqa: B905, as many as there are
            result[i] = grad if ctx.needs_input_grad[i] else None
        return tuple(result)


class _PlainAttention(torch.autograd.Function):
    """The same for calls without options."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: object) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _plain_fwd(*args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: Tensor) -> None:
        q, k, v, seq_offsets, ctx.max_seq_len, num_targets, ctx.allow_tf32 = inputs
        ctx.save_for_backward(q, k, v, seq_offsets, num_targets)

    @staticmethod
    def backward(ctx, grad_out: Tensor) -> tuple:
        *tensors, num_targets = ctx.saved_tensors
        args = (*tensors, ctx.max_seq_len, num_targets, ctx.allow_tf32)
        grads = _attention_bwd(_plain_bwd, grad_out, *args)
        return (*grads, None, None, None, None)


class _AttentionBackward(torch.autograd.Function):
    """A backward op when somebody may want to differentiate it: they get an error instead of a wrong number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(bwd: torch._ops.OpOverload, *args: object) -> tuple[Tensor, ...]:
        with torch._C._AutoDispatchBelowAutograd():
            return bwd(*args)

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx, *grads: Tensor) -> None:
        raise RuntimeError(
            "hstu_attention has no second derivative: use hstu_ops.reference.hstu_attention, the same in plain PyTorch"
        )


def _needs_grad(args: tuple) -> bool:
    if not torch.is_grad_enabled():
        return False
    for x in args:
        if isinstance(x, Tensor) and x.requires_grad:
            return True
    return torch._C._are_functorch_transforms_active()  # vmap hides requires_grad


def _apply(function: type[torch.autograd.Function], args: tuple):
    """function.apply(*args), without the 10 us that binding its signature costs outside of torch.func."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*args)
    args = [torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in args]
    return super(torch.autograd.Function, function).apply(*args)


def _attention_fwd(*args: object) -> Tensor:
    return _apply(_Attention, args) if _needs_grad(args) else _Attention.forward(*args)


def _attention_bwd(bwd: torch._ops.OpOverload, grad_out: Tensor, *args: object) -> tuple[Tensor, ...]:
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    return _backward_kernel(bwd, grad_out, *args, torch.are_deterministic_algorithms_enabled())


def _backward_kernel(bwd: torch._ops.OpOverload, *args: object) -> tuple[Tensor, ...]:
    return _apply(_AttentionBackward, (bwd, *args)) if _needs_grad(args) else _AttentionBackward.forward(bwd, *args)


def attention(*args: object) -> Tensor:
    return _fwd(*args) if torch.compiler.is_compiling() else _attention_fwd(*args)


def plain_attention(*args: object) -> Tensor:
    return _apply(_PlainAttention, args) if _needs_grad(args) else _PlainAttention.forward(*args)


def kernel_will_check(q: Tensor) -> bool:
    """Whether a call with this q goes to a kernel, which checks its arguments, and not into a graph or to a fake."""
    return (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and (q.is_cuda or q.is_cpu)
        and torch._C._len_torch_dispatch_stack() == 0
    )


_lib.impl("attention_fwd", _attention_fwd, "Autograd")
_lib.impl("attention_plain_fwd", plain_attention, "Autograd")
for _op in (_bwd, _plain_bwd, _bias_bwd):
    _lib.impl(_op._schema.name.removeprefix("hstu_ops::"), partial(_backward_kernel, _op), "Autograd")


@torch.compiler.assume_constant_result
def allow_tf32() -> bool:
    """Whether torch allows TF32 in products of float32 on CUDA; compiled code keeps what held when it was compiled."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


# ---- autocast --------------------------------------------------------------------------------------------


def autocast(q: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the type of an enabled autocast, as scaled_dot_product_attention does; float64 is left alone."""
    device = "cuda" if q.is_cuda else "cpu" if q.is_cpu else None
    if device is None or not torch.is_autocast_enabled(device) or q.dtype == torch.float64:
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
