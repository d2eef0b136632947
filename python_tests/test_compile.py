"""What torch.library promises about the ops, torch.compile without graph breaks, torch.export with dynamic shapes."""

import shutil

import pytest
import torch
from cases import Case, make
from torch import nn

from hstu_ops import HSTULayer, RelativeAttentionBias, RelativeBias, TimeBuckets, _library, hstu_attention

pytestmark = pytest.mark.usefixtures("deterministic")
ops = torch.ops.hstu_ops
_BASE = (20, 0, 13)
_CASES = [
    Case("plain", _BASE),
    Case("targets", _BASE, num_targets=(2, 0, 13)),
    Case("contextual", _BASE, contextual_seq_len=3, max_attn_len=4, min_full_attn_seq_len=2, global_prefix_len=1),
    Case("contextual-per-sequence", _BASE, contextual_seq_len=(1, 2, 3), offsets=torch.int32),
    Case("queries", _BASE, queries=(5, 0, 13)),
    Case("scale-float", _BASE, scale=0.1, alpha=0.5, causal=False),
    Case("scale-per-sequence", _BASE, scale="sequence"),
    Case("scale-per-row", _BASE, scale="row", strided=True),
    Case("position", _BASE, bias="position"),
    Case("time", _BASE, bias="time/head"),
    Case("both", _BASE, bias="position/head+time", query_timestamps=True),
    Case("dense", _BASE, bias="dense/batch/head"),
    Case("dense-shared", _BASE, bias="dense"),
    Case("everything", _BASE, queries=(5, 0, 13), num_targets=(2, 0, 13), bias="position+time", query_timestamps=True),
]


def _raw_arguments(case: Case, device: str, **kwargs) -> tuple:
    """The arguments of attention_fwd, as hstu_attention would pass them."""
    inputs = make(case, device=device, **kwargs)
    o = inputs.options
    scale, context, bias = o["scale"], o["contextual_seq_len"], o["bias"]
    relative = (None,) * 5
    if isinstance(bias, RelativeBias):
        boundaries = None if bias.buckets is None else bias.buckets.boundaries
        relative = (bias.position_weight, bias.time_weight, boundaries, bias.timestamps, bias.query_timestamps)
    return (
        *(inputs.q, inputs.k, inputs.v, inputs.seq_offsets, o["seq_offsets_q"], inputs.max_seq_len, o["alpha"]),
        *((None, scale) if isinstance(scale, torch.Tensor) else (scale, None)),
        *(o["causal"], o["num_targets"], o["target_group_size"]),
        *((0, context) if isinstance(context, torch.Tensor) else (context, None)),
        *(o["max_attn_len"], o["min_full_attn_seq_len"], o["global_prefix_len"]),
        *(bias if isinstance(bias, torch.Tensor) else None, *relative, False),
    )


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_opcheck_forward(case, device):
    torch.library.opcheck(ops.attention_fwd.default, _raw_arguments(case, device))


@pytest.mark.parametrize("op", (ops.attention_bwd, ops.attention_bias_bwd), ids=("qkv", "bias"))
@pytest.mark.parametrize("case", _CASES, ids=str)
def test_opcheck_backward(case, op, device):
    args = _raw_arguments(case, device, grad=False)
    grad_out = torch.randn(args[0].shape[0], 2, 32, device=device)
    torch.library.opcheck(op.default, (grad_out, *args, True))


@pytest.mark.parametrize("case", _CASES[:2], ids=str)
def test_opcheck_plain(case, device):
    for grad in (True, False):
        x = make(case, device=device, grad=grad)
        args = (x.q, x.k, x.v, x.seq_offsets, x.max_seq_len, x.options["num_targets"], False)
        torch.library.opcheck(ops.attention_plain_fwd.default, args)
    torch.library.opcheck(ops.attention_plain_bwd.default, (torch.randn_like(x.v), *args, True))


def test_opcheck_without_gradients(device):
    torch.library.opcheck(ops.attention_fwd.default, _raw_arguments(_CASES[-1], device, grad=False))


def test_fake_backward_knows_its_types(device, dtype):
    """Shapes, types and strides of every result, checked against a real run."""
    inputs = make(_CASES[-1], dtype, device, grad=False)
    args = list(_raw_arguments(_CASES[-1], device, grad=False))
    args[:3] = inputs.q, inputs.k, inputs.v
    args[18:20] = inputs.options["bias"].position_weight, inputs.options["bias"].time_weight
    grad_out = torch.randn(len(inputs.q), 2, 32, device=device, dtype=dtype)
    torch.library.opcheck(ops.attention_bias_bwd.default, (grad_out, *args, False), test_utils="test_faketensor")


class Layer(nn.Module):
    """A projection, the attention with tables of its own, and something after it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(16, 2 * 3 * 8)
        self.bias = RelativeAttentionBias(32, TimeBuckets.log(), num_heads=2)

    def forward(self, x, seq_offsets, num_targets, timestamps):
        q, k, v = (y.unflatten(1, (2, 8)) for y in self.projection(x).chunk(3, dim=1))
        out = hstu_attention(q, k, v, seq_offsets, 32, num_targets=num_targets, bias=self.bias(timestamps))
        return out.flatten(1).relu()


def _batch(lengths, device):
    total = sum(lengths)
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    return torch.randn(total, 16, device=device), offsets, offsets.diff() // 2, torch.arange(total, device=device) * 100


_BATCHES = [(5, 7, 3), (20, 1), (9, 9, 9, 9, 9, 2), (32, 31, 30, 1, 5)]


@pytest.mark.parametrize("dynamic", (False, True, None), ids=("static", "dynamic", "automatic"))
def test_compile(dynamic, device):
    """One graph, forward and backward, and the gradients of eager mode."""
    torch._dynamo.reset()
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for lengths in _BATCHES[: 2 if dynamic is False else None]:
        batch = _batch(lengths, device)
        got, want = compiled(*batch), layer(*batch)
        assert torch.equal(got, want)
        got = torch.autograd.grad(got.square().sum(), list(layer.parameters()))
        want = torch.autograd.grad(want.square().sum(), list(layer.parameters()))
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compile_does_not_recompile(device):
    torch._dynamo.reset()
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    layer = Layer().to(device)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for lengths in _BATCHES:
        compiled(*_batch(lengths, device)).sum().backward()
    assert count.frame_count == 1


def test_compile_with_symbols(device):
    """Sizes that are compared with sizes: a norm's weight, an expanded dense bias."""
    torch._dynamo.reset()
    layer = HSTULayer(16, 2, max_seq_len=9, norm_affine=True, norm_per_head=True).to(device)

    def call(x, offsets, bias):
        y = layer(x, offsets)
        q = y.view(len(y), 2, 8)
        return hstu_attention(q, q, q, offsets, 9, bias=bias.expand(len(offsets) - 1, 2, 9, 9))

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for offsets in (torch.tensor([0, 4, 9]), torch.tensor([0, 1, 3, 11])):
        given = torch.randn(int(offsets[-1]), 16, device=device), offsets.to(device), torch.randn(1, 1, 9, 9).to(device)
        assert torch.equal(compiled(*given), call(*given))


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_compile_options(case, device):
    """Every kind of argument, given from outside the compiled function."""
    torch._dynamo.reset()
    inputs = make(case, device=device)
    leaves = list(inputs.leaves.values())
    compiled = torch.compile(hstu_attention, fullgraph=True, backend="aot_eager")
    got, want = inputs.call(compiled), inputs.call(hstu_attention)
    assert torch.equal(got, want)
    got, want = (torch.autograd.grad(x.square().sum(), leaves) for x in (got, want))
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


def test_compile_with_dynamic_max_seq_len(device):
    torch._dynamo.reset()
    inputs = make(_CASES[0], device=device, grad=False)
    count = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(hstu_attention, fullgraph=True, dynamic=True, backend=count)
    for longest in (20, 30, 77):
        args = (inputs.q, inputs.k, inputs.v, inputs.seq_offsets, longest)
        assert torch.equal(compiled(*args), hstu_attention(*args))
    assert count.frame_count == 1


def test_compile_autocast(device):
    torch._dynamo.reset()
    layer, batch = Layer().to(device), _batch(_BATCHES[0], device)

    def run(layer):
        with torch.autocast(device, torch.bfloat16):
            return layer(*batch)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(run(compiled), run(layer))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compile_inductor(device):
    torch._dynamo.reset()
    layer, batch = Layer().to(device), _batch(_BATCHES[0], device)
    got, want = torch.compile(layer, fullgraph=True)(*batch), layer(*batch)
    torch.testing.assert_close(got, want)
    got, want = (torch.autograd.grad(x.sum(), list(layer.parameters())) for x in (got, want))
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("strict", (False, True))
def test_export(strict, device):
    """Batch and total are dynamic; the exported program runs on other batches, also when decomposed."""
    layer = Layer().to(device)
    total, batch = torch.export.Dim("total", max=10_000), torch.export.Dim("batch", max=1000)
    shapes = ({0: total}, {0: batch + 1}, {0: batch}, {0: total})
    program = torch.export.export(layer, _batch(_BATCHES[0], device), dynamic_shapes=shapes, strict=strict)
    assert "hstu_ops.attention_fwd" in str(program.graph)
    for exported in (program, program.run_decompositions()):
        for lengths in _BATCHES:
            args = _batch(lengths, device)
            assert torch.equal(exported.module()(*args), layer(*args))


def test_export_bias_as_argument(device):
    """A RelativeBias is a pytree, so it can be an input of an exported module."""

    class Module(nn.Module):
        def forward(self, q, offsets, bias):
            return hstu_attention(q, q, q, offsets, 40, bias=bias)

    inputs = make(Case("", (20, 13), bias="position+time"), device=device, grad=False)
    args = (inputs.q, inputs.seq_offsets, inputs.options["bias"])
    assert torch.equal(torch.export.export(Module(), args).module()(*args), Module()(*args))


def test_meta_device():
    """Shapes can be worked out without data."""
    q = torch.empty(18, 2, 32, device="meta", dtype=torch.bfloat16)
    out = hstu_attention(q, q, q[:, :, :7], torch.empty(4, device="meta", dtype=torch.int64), 20)
    assert out.shape == (18, 2, 7) and out.dtype == torch.bfloat16 and out.is_meta


def test_tf32_switch_is_a_constant_of_compiled_code():
    def read(x):
        return x + 1 if _library.allow_tf32() else x - 1

    assert torch.compile(read, fullgraph=True, backend="aot_eager")(torch.zeros(1)).item() == -1
