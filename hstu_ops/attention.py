"""hstu_attention: turns its arguments into those of the op (see _library.attention) and says which one does not fit.

The kernels check their arguments themselves. Doing it here too takes longer than launching a kernel, so it is left for
calls that no kernel sees (graphs, fake and meta tensors) and for those that a kernel refused: the error is then in
terms of this function.
"""

from __future__ import annotations

import os
from operator import is_

import torch
from torch import Tensor

from . import _library
from .bias import RelativeBias, TimeBuckets, accumulation_dtype

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_INTS = (torch.int32, torch.int64)
_CHECK_CONTENT = os.environ.get("HSTU_OPS_CHECK", "0") not in ("", "0")


def hstu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor | None = None,
    max_seq_len: int | None = None,
    *,
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
    seq_offsets_q: Tensor | None = None,
) -> Tensor:
    """HSTU attention over `B` sequences of different lengths, stored back to back: `[total_q, H, Dv]`.

    For row `i` and column `j` of one sequence and one head, `keep` being the mask below:

        s_ij = alpha * <q_i, k_j> + bias_ij
        o_i  = scale_i * sum_j keep(i, j) * silu(s_ij) * v_j

    Example: two users with 3 and 2 items, 4 heads of 64.

        >>> q, k, v = torch.randn(3, 5, 4, 64, requires_grad=True).unbind()
        >>> out = hstu_attention(q, k, v, torch.tensor([0, 3, 5]), max_seq_len=3)
        >>> out.sum().backward()

    Arguments:
        q, k, v: `[total_q, H, Dqk]`, `[total_kv, H, Dqk]`, `[total_kv, H, Dv]` of one type, float64, float32, float16
            or bfloat16; the last dimension contiguous, rows and heads at any stride. Or jagged tensors of torch.nested
            `[B, *, H, D]`: the offsets are then theirs (leave out seq_offsets; max_seq_len may be left out), and the
            result is jagged too.
        seq_offsets: `[B + 1]`, int32 or int64. Starts at 0, never falls, ends at total_kv: sequence b has the `n` rows
            from `seq_offsets[b]` to `seq_offsets[b + 1]`.
        max_seq_len: the length that sequences are meant to stay within. Sets the default of scale, nothing else.
        alpha: factor of the products, a number. Default: `1 / sqrt(Dqk)`.
        scale: factor of the output, a number or a float tensor `[B]` or `[total_q]` (`[B]` where these are
            equal). Default: `1 / max_seq_len`.
        causal: False lets history rows look ahead.
        num_targets: `[B]`, int32 or int64. Default: no targets.
        target_group_size: consecutive targets that form a group; 1: a target sees no other.
        contextual_seq_len: an int, or int32 or int64 `[B]`.
        max_attn_len: the window, in logical positions (all targets share one, so do all contextual rows); 0: none.
        min_full_attn_seq_len: this many last history rows, and all targets, ignore the window; 0: none do.
        global_prefix_len: this many first columns are visible from outside their window too.
        bias: a `RelativeBias`, or a float tensor `[B or 1, H or 1, N, N]` with `N >= max_seq_len`, read at (row,
            column) of the sequence and 0 beyond N.
        seq_offsets_q: `[B + 1]`, offsets of the queries where these are fewer than the keys: the `m` queries of a
            sequence are its last `m` rows (cached keys, scoring of candidates). Default: seq_offsets.

    Mask: the last `t = num_targets[b]` rows of a sequence are targets, the `h = n - t` rows before them history, and
    the first `c = min(contextual_seq_len, h)` of the history contextual. Of the history columns a contextual row keeps
    all; any other history row those in its window and up to itself; a target those in its window. A target also keeps
    the targets of its own group up to itself.

    Gradients: of q, k, v, of a dense bias and of the tables of a RelativeBias (summed in float32, or float64 for
    float64). Not of alpha, scale and timestamps, which may not require one. There is no second derivative
    (RuntimeError); `hstu_ops.reference` has it.

    Numerics: float16 and bfloat16 are multiplied and summed in float32; a backend may round `silu(s)` and its
    gradient to the type of v before their products and sums, and sums of the first few of these for a bias table
    (CUDA does, CPU does not). float32 is full float32; on CUDA, up to 128 dimensions, the factors of its products are
    rounded to TF32 where torch allows it in products of its own (`torch.backends.cuda.matmul.allow_tf32` or
    `.fp32_precision`; a backward pass does as its forward did). Autocast casts q, k and v, not the tables. Rows that
    keep nothing are 0. The forward pass is bitwise reproducible, the backward pass under
    `torch.use_deterministic_algorithms(True)`.

    Memory grows with the number of rows, never with its square. Scratch of the backward: on CUDA 4 bytes an element
    of q, head dimensions rounded up to 32, 64, 128 or 256, up to 70 KB a table of many time buckets (the forward:
    35), and up to 1 MB, or the size of the tables, for their gradients; on CPU float32 copies of q, its gradient and
    the output's for one head of the longest sequence, a thread, and up to 8 of q's gradient in all where there are
    few sequences.

    Errors: TypeError or ValueError naming the argument, what was expected and what came. With `HSTU_OPS_CHECK=1` in the
    environment at import, the content of offsets and lengths is checked on every device (which waits for the device).

    Source: Zhai et al., "Actions Speak Louder than Words: Trillion-Parameter Sequential Transducers for Generative
    Recommendations", ICML 2024. `hstu_ops.reference` computes the same in plain PyTorch.
    """
    if isinstance(q, Tensor) and q.is_nested:
        from .jagged import nested_attention

        return nested_attention(
            hstu_attention,
            q,
            k,
            v,
            seq_offsets,
            max_seq_len,
            alpha=alpha,
            scale=scale,
            causal=causal,
            num_targets=num_targets,
            target_group_size=target_group_size,
            contextual_seq_len=contextual_seq_len,
            max_attn_len=max_attn_len,
            min_full_attn_seq_len=min_full_attn_seq_len,
            global_prefix_len=global_prefix_len,
            bias=bias,
            seq_offsets_q=seq_offsets_q,
        )

    options = (alpha, scale, causal, target_group_size, contextual_seq_len)
    options += (max_attn_len, min_full_attn_seq_len, global_prefix_len, bias, seq_offsets_q)
    call = (q, k, v, seq_offsets, max_seq_len, num_targets, *options)
    if _CHECK_CONTENT or not _library.kernel_will_check(q):
        return _library.attention(*op_arguments(*call))
    try:
        if all(map(is_, options, _NO_OPTIONS)):
            return _library.plain_attention(*plain_arguments(*call[:6]))
        return _library.attention(*op_arguments(*call, check=False))
    except Exception as error:
        refusal = error
    op_arguments(*call)
    raise refusal


_NO_OPTIONS = (None, None, True, 1, 0, 0, 0, 0, None, None)


def plain_arguments(
    q: Tensor, k: Tensor, v: Tensor, seq_offsets: Tensor, max_seq_len: int, num_targets: Tensor | None
) -> tuple:
    """The arguments of attention_plain_fwd for those of a call without options. The kernels check them."""
    q, k, v = _library.autocast(q, k, v)
    _check_int("max_seq_len", max_seq_len, 1)  # torch would take more than ints
    return q, k, v, seq_offsets, max_seq_len, num_targets, _allow_tf32(q)


def op_arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seq_offsets: Tensor,
    max_seq_len: int,
    num_targets: Tensor | None,
    alpha: float | None,
    scale: float | Tensor | None,
    causal: bool,
    target_group_size: int,
    contextual_seq_len: int | Tensor,
    max_attn_len: int,
    min_full_attn_seq_len: int,
    global_prefix_len: int,
    bias: Tensor | RelativeBias | None,
    seq_offsets_q: Tensor | None,
    check: bool = True,
) -> tuple:
    """The arguments of attention_fwd for those of hstu_attention. `check=False` leaves out what the kernels check."""
    if check:
        _expect_tensors(q=q, k=k, v=v)
    q, k, v = _library.autocast(q, k, v)
    if check:
        _check_tensors(q, k, v, seq_offsets, num_targets, contextual_seq_len, seq_offsets_q)
    if not isinstance(causal, (bool, torch.SymBool)):
        _fail("causal", "a bool", causal, TypeError)
    _check_int("max_seq_len", max_seq_len, 1)
    _check_int("target_group_size", target_group_size, 1)
    _check_int("max_attn_len", max_attn_len, 0)
    _check_int("min_full_attn_seq_len", min_full_attn_seq_len, 0)
    _check_int("global_prefix_len", global_prefix_len, 0)

    contextual_seq_lens = None
    if isinstance(contextual_seq_len, Tensor):
        contextual_seq_len, contextual_seq_lens = 0, contextual_seq_len
    else:
        _check_int("contextual_seq_len", contextual_seq_len, 0)

    device, accumulate = q.device, accumulation_dtype(q.dtype)
    batch, total_q, total_kv = seq_offsets.shape[0] - 1, q.shape[0], k.shape[0]
    if alpha is not None and not _is_number(alpha):
        _fail("alpha", "a number (it has no gradient)", alpha, TypeError)
    scale_values = None
    if isinstance(scale, Tensor):
        scale, scale_values = None, _check_scale(scale, batch, total_q, device).to(accumulate)
    elif scale is not None and not _is_number(scale):
        _fail("scale", "a number or a tensor", scale, TypeError)

    dense, relative = None, _NO_BIAS
    if isinstance(bias, RelativeBias):
        if check:
            _check_relative(bias, q, total_q, total_kv)
        relative = _relative_arguments(bias, accumulate)
    elif bias is not None:
        dense = _check_dense(bias, batch, q, max_seq_len).to(accumulate)

    if _CHECK_CONTENT and not torch.compiler.is_compiling():
        _check_content(seq_offsets, seq_offsets_q, total_q, total_kv, num_targets, contextual_seq_lens)
    return (
        *(q, k, v, seq_offsets, seq_offsets_q, max_seq_len, alpha, scale, scale_values),
        *(causal, num_targets, target_group_size, contextual_seq_len, contextual_seq_lens),
        *(max_attn_len, min_full_attn_seq_len, global_prefix_len, dense),
        *relative,
        _allow_tf32(q),
    )


def _allow_tf32(q: Tensor) -> bool:
    return q.dtype == torch.float32 and q.is_cuda and _library.allow_tf32()


_NO_BIAS = (None,) * 5  # position_weight, time_weight, time_boundaries, timestamps, query_timestamps


def _fail(name: str, expected: str, got: object, error: type[Exception] = ValueError) -> None:
    if isinstance(got, Tensor):
        got = f"{got.dtype} {list(got.shape)} on {got.device}".removeprefix("torch.")
    elif error is TypeError:
        got = type(got).__name__
    raise error(f"hstu_ops: {name}: expected {expected}, got {got}")


def _expect_tensors(**arguments: object) -> None:
    for name, x in arguments.items():
        if not isinstance(x, Tensor):
            _fail(name, "a tensor", x, TypeError)


def _is_number(x: object) -> bool:
    return isinstance(x, (float, int, torch.SymFloat, torch.SymInt))


def _check_int(name: str, value: object, minimum: int) -> None:
    if not isinstance(value, (int, torch.SymInt)):
        _fail(name, "an int", value, TypeError)
    if value < minimum:
        _fail(name, f"at least {minimum}", value)
    if isinstance(value, int) and value >= 2**63:
        _fail(name, "less than 2^63", value)


def _check_ints(name: str, x: Tensor, size: int, device: torch.device) -> None:
    if not isinstance(x, Tensor):
        _fail(name, f"an integer tensor [{size}]", x, TypeError)
    if x.dtype not in _INTS:
        _fail(name, "int32 or int64", x, TypeError)
    if x.dim() != 1 or x.shape[0] != size:
        _fail(name, f"shape [{size}]", x)
    if x.device != device:
        _fail(name, f"a tensor on {device}, the device of q", x)
    if size > 1 and x.stride(0) != 1:
        _fail(name, "a contiguous tensor", f"stride {x.stride(0)}")


def _check_tensors(q, k, v, seq_offsets, num_targets, contextual_seq_len, seq_offsets_q) -> None:
    _check_qkv(q, k, v)
    if not isinstance(seq_offsets, Tensor) or seq_offsets.dim() != 1 or seq_offsets.shape[0] < 1:
        error = ValueError if isinstance(seq_offsets, Tensor) else TypeError
        _fail("seq_offsets", "an integer tensor [B + 1]", seq_offsets, error)
    batch, device, total_q, total_kv = seq_offsets.shape[0] - 1, q.device, q.shape[0], k.shape[0]
    _check_ints("seq_offsets", seq_offsets, batch + 1, device)
    if seq_offsets_q is not None:
        _check_ints("seq_offsets_q", seq_offsets_q, batch + 1, device)
    elif total_q != total_kv:
        _fail("q", f"{total_kv} rows, those of k (or seq_offsets_q)", f"{total_q} rows")
    if num_targets is not None:
        _check_ints("num_targets", num_targets, batch, device)
    if isinstance(contextual_seq_len, Tensor):
        _check_ints("contextual_seq_len", contextual_seq_len, batch, device)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dtype not in _FLOATS:
        _fail("q", "float64, float32, float16 or bfloat16", q, TypeError)
    if q.device.type not in _library.DEVICE_TYPES:
        _fail("q", f"a device this build has kernels for ({', '.join(_library.DEVICE_TYPES)})", q)
    if q.dim() != 3:
        _fail("q", "shape [total_q, H, Dqk]", q)
    _, heads, dim = q.shape
    if heads < 1 or dim < 1:
        _fail("q", "at least one head and one dimension", q)
    for name, x in (("k", k), ("v", v)):
        if x.is_nested or x.dim() != 3 or x.shape[1] != heads:
            _fail(name, f"shape [total_kv, {heads}, D]", x)
        if x.dtype != q.dtype:
            _fail(name, f"{q.dtype}, the type of q", x, TypeError)
        if x.device != q.device:
            _fail(name, f"a tensor on {q.device}, the device of q", x)
    if k.shape[2] != dim:
        _fail("k", f"head dimension {dim}, that of q", k)
    if v.shape[2] < 1 or v.shape[0] != k.shape[0]:
        _fail("v", f"shape [{k.shape[0]}, {heads}, Dv], the rows of k", v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(2) != 1 and x.shape[2] != 1:
            _fail(name, "a contiguous last dimension", f"strides {x.stride()}")


def _check_scale(scale: Tensor, batch: int, total_q: int, device: torch.device) -> Tensor:
    if not scale.is_floating_point():
        _fail("scale", "a float tensor", scale, TypeError)
    if scale.requires_grad:
        _fail("scale", "a tensor that needs no gradient (it has none)", "requires_grad=True")
    if scale.dim() != 1 or (scale.shape[0] != batch and scale.shape[0] != total_q):
        _fail("scale", f"shape [{batch}], one per sequence, or [{total_q}], one per query row", scale)
    if scale.device != device:
        _fail("scale", f"a tensor on {device}, the device of q", scale)
    return scale.contiguous()


def _check_dense(bias: Tensor, batch: int, q: Tensor, max_seq_len: int) -> Tensor:
    if not isinstance(bias, Tensor):
        _fail("bias", "None, a tensor or a RelativeBias", bias, TypeError)
    if not bias.is_floating_point():
        _fail("bias", "a float tensor", bias, TypeError)
    heads = q.shape[1]
    fits = bias.dim() == 4 and all(n == 1 or n == m for n, m in zip(bias.shape[:2], (batch, heads)))  # noqa: B905
    if not fits or bias.shape[2] != bias.shape[3]:
        _fail("bias", f"shape [{batch} or 1, {heads} or 1, N, N]", bias)
    if bias.shape[3] < max_seq_len:
        _fail("bias", f"N >= max_seq_len = {max_seq_len}", bias)
    if bias.device != q.device:
        _fail("bias", f"a tensor on {q.device}, the device of q", bias)
    for dim in (0, 1):  # expanded: one slice, whose gradient is the sum over the others
        if bias.stride(dim) == 0 and bias.shape[dim] > 1:
            bias = bias.narrow(dim, 0, 1)
    return bias if bias.stride(3) == 1 else bias.contiguous()


def _check_relative(bias: RelativeBias, q: Tensor, total_q: int, total_kv: int) -> None:
    position_weight, time_weight = bias.position_weight, bias.time_weight
    if position_weight is not None:
        _check_table("bias.position_weight", position_weight, q)
        if position_weight.shape[-1] % 2 != 1:
            _fail("bias.position_weight", "an odd number of entries, 2P - 1", position_weight)
    if time_weight is None:
        return
    if bias.buckets is None:
        _fail("bias.buckets", "TimeBuckets, as bias.time_weight is given", None)
    if not isinstance(bias.buckets, TimeBuckets):
        _fail("bias.buckets", "TimeBuckets", bias.buckets, TypeError)
    boundaries, timestamps, query_timestamps = bias.buckets.boundaries, bias.timestamps, bias.query_timestamps
    _check_table("bias.time_weight", time_weight, q)
    if time_weight.shape[-1] != boundaries.shape[0] + 1:
        _fail("bias.time_weight", f"{boundaries.shape[0] + 1} entries, one more than boundaries", time_weight)
    _check_times("bias.buckets.boundaries", boundaries, boundaries.shape[0], q.device)
    if timestamps is None:
        _fail("bias.timestamps", "an int64 tensor, as bias.time_weight is given", None)
    _check_times("bias.timestamps", timestamps, total_kv, q.device)
    if query_timestamps is not None:
        _check_times("bias.query_timestamps", query_timestamps, total_q, q.device)


def _relative_arguments(bias: RelativeBias, accumulate: torch.dtype) -> tuple:
    position_weight, time_weight = _table(bias.position_weight, accumulate), _table(bias.time_weight, accumulate)
    if time_weight is None:
        return position_weight, None, None, None, None
    return position_weight, time_weight, bias.buckets.boundaries, bias.timestamps, bias.query_timestamps


def _table(table: Tensor | None, accumulate: torch.dtype) -> Tensor | None:
    """In the accumulation type; one row for all heads where the rows are the same memory: its gradient is their sum."""
    if table is None:
        return None
    if not table.is_floating_point():
        raise TypeError("a table of integers")  # _check_table says which
    if table.dim() == 2 and table.stride(0) == 0:
        table = table[0]
    return table if table.dtype == accumulate else table.to(accumulate)


def _check_table(name: str, table: Tensor, q: Tensor) -> None:
    if not isinstance(table, Tensor) or not table.is_floating_point():
        _fail(name, "a float tensor", table, TypeError)
    heads = q.shape[1]
    if table.dim() not in (1, 2) or table.shape[-1] < 1 or (table.dim() == 2 and table.shape[0] != heads):
        _fail(name, f"shape [entries] or [{heads}, entries]", table)
    if table.device != q.device:
        _fail(name, f"a tensor on {q.device}, the device of q", table)
    if table.stride(-1) != 1 and table.shape[-1] != 1:
        _fail(name, "a contiguous last dimension", f"strides {table.stride()}")


def _check_times(name: str, x: Tensor, size: int, device: torch.device) -> None:
    _check_ints(name, x, size, device)
    if x.dtype != torch.int64:
        _fail(name, "int64", x, TypeError)


def _check_content(seq_offsets, seq_offsets_q, total_q, total_kv, num_targets, contextual_seq_lens) -> None:
    """What the shapes cannot tell. Reads the tensors on the host, so it waits for the device."""

    def lengths(name: str, offsets: Tensor, total: int) -> Tensor:
        offsets = offsets.cpu().long()
        if offsets[0] != 0 or offsets[-1] != total or (offsets.diff() < 0).any():
            _fail(name, f"offsets that start at 0, never fall and end at {total}", offsets.tolist())
        return offsets.diff()

    n = lengths("seq_offsets", seq_offsets, total_kv)
    if seq_offsets_q is not None:
        m = lengths("seq_offsets_q", seq_offsets_q, total_q)
        if (m > n).any():
            _fail(
                "seq_offsets_q", "at most as many queries as keys in every sequence", f"{m.tolist()} for {n.tolist()}"
            )
    if num_targets is not None:
        t = num_targets.cpu().long()
        if (t < 0).any() or (t > n).any():
            _fail("num_targets", f"0 to the length of each sequence, {n.tolist()}", t.tolist())
    if contextual_seq_lens is not None and (contextual_seq_lens < 0).any():
        _fail("contextual_seq_len", "at least 0", contextual_seq_lens.tolist())
