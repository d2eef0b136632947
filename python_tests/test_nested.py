"""torch.nested jagged tensors as q, k, v: the op on their values and offsets, jagged out, with gradients."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make

from hstu_ops import hstu_attention, reference

pytestmark = pytest.mark.usefixtures("deterministic")
_CASE = Case("", (20, 0, 13, 1), bias="position+time", num_targets=(3, 0, 2, 1))


def _jagged(values, offsets, **bounds):
    return torch.nested.nested_tensor_from_jagged(values, offsets, **bounds)


@pytest.mark.parametrize("attention", (hstu_attention, reference.hstu_attention), ids=("op", "reference"))
def test_same_as_offsets(attention, device):
    inputs = make(_CASE, device=device)
    del inputs.options["seq_offsets_q"]
    q, k, v = (_jagged(x, inputs.seq_offsets) for x in (inputs.q, inputs.k, inputs.v))
    out = attention(q, k, v, max_seq_len=20, **inputs.options)
    want = inputs.call(attention)
    assert out.is_nested and out.layout == torch.jagged and out.shape == (4, q.shape[1], 2, 32)
    assert torch.equal(out.offsets(), inputs.seq_offsets) and torch.equal(out.values(), want)
    leaves = list(inputs.leaves.values())
    got = torch.autograd.grad(out.values().square().sum(), leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, torch.autograd.grad(want.square().sum(), leaves), strict=True))
    assert (out + v).shape == out.shape  # jagged along the very dimension of q
    with pytest.raises(ValueError, match="seq_offsets: expected None for nested"):
        attention(q, k, v, inputs.seq_offsets, 20)


def test_gradient_is_jagged(device):
    q, k, v = (
        torch.nested.nested_tensor([torch.randn(n, 2, 8) for n in (5, 2)], layout=torch.jagged, device=device).values()
        for _ in range(3)
    )
    offsets = torch.tensor([0, 5, 7], device=device)
    q = _jagged(q, offsets).detach().requires_grad_()
    hstu_attention(q, _jagged(k, offsets), _jagged(v, offsets)).sum().backward()
    want = q.values().detach().requires_grad_()
    hstu_attention(want, k, v, offsets, 5).sum().backward()
    assert q.grad.is_nested and torch.equal(q.grad.values(), want.grad)


@pytest.mark.parametrize("known", (True, False))
def test_max_seq_len_defaults_to_the_longest(known, device):
    inputs = make(replace(_CASE, bias="none", num_targets=None), device=device, grad=False)
    bounds = {"min_seqlen": 0, "max_seqlen": 20} if known else {}
    q, k, v = (_jagged(x, inputs.seq_offsets, **bounds) for x in (inputs.q, inputs.k, inputs.v))
    assert torch.equal(hstu_attention(q, k, v).values(), inputs.call(hstu_attention))


def test_fewer_queries(device):
    inputs = make(replace(_CASE, queries=(5, 0, 13, 0)), device=device, grad=False)
    q = _jagged(inputs.q, inputs.options.pop("seq_offsets_q"))
    k, v = (_jagged(x, inputs.seq_offsets) for x in (inputs.k, inputs.v))
    out = hstu_attention(q, k, v, max_seq_len=20, **inputs.options)
    want = make(replace(_CASE, queries=(5, 0, 13, 0)), device=device, grad=False).call(hstu_attention)
    assert torch.equal(out.values(), want) and torch.equal(out.offsets(), q.offsets())


def test_jagged_timestamps(device):
    inputs = make(_CASE, device=device, grad=False)
    del inputs.options["seq_offsets_q"]
    q, k, v = (_jagged(x, inputs.seq_offsets) for x in (inputs.q, inputs.k, inputs.v))
    bias = inputs.options["bias"]
    inputs.options["bias"] = replace(bias, timestamps=_jagged(bias.timestamps, inputs.seq_offsets))
    out = hstu_attention(q, k, v, max_seq_len=20, **inputs.options)
    inputs.options["bias"] = bias
    assert torch.equal(out.values(), inputs.call(hstu_attention))


def test_compile(device):
    torch._dynamo.reset()
    inputs = make(replace(_CASE, bias="none", num_targets=None), device=device)
    q, k, v = (_jagged(x, inputs.seq_offsets) for x in (inputs.q, inputs.k, inputs.v))

    def attention(q, k, v):
        return hstu_attention(q, k, v, max_seq_len=20)

    got, want = torch.compile(attention, fullgraph=True, backend="aot_eager")(q, k, v), attention(q, k, v)
    assert torch.equal(got.values(), want.values())
    got, want = (torch.autograd.grad(x.values().square().sum(), inputs.q)[0] for x in (got, want))
    assert torch.equal(got, want)


def test_errors():
    inputs = make(replace(_CASE, bias="none", num_targets=None), grad=False)
    q, k, v = (_jagged(x, inputs.seq_offsets) for x in (inputs.q, inputs.k, inputs.v))
    with pytest.raises(TypeError, match=r"k: expected a nested tensor with layout=torch\.jagged"):
        hstu_attention(q, inputs.k, v)
    with pytest.raises(ValueError, match=r"k: expected shape \[total_kv, 2, D\]"):
        hstu_attention(inputs.q, k, v, inputs.seq_offsets, 20)
    with pytest.raises(ValueError, match="seq_offsets_q: expected None for nested"):
        hstu_attention(q, k, v, seq_offsets_q=inputs.seq_offsets)
    other = _jagged(inputs.v, torch.tensor([0, 10, 20, 30, 34]))
    with pytest.raises(ValueError, match="v: expected the offsets of k"):
        hstu_attention(q, k, other)
    with pytest.raises(ValueError, match="q: expected a contiguous jagged tensor"):
        hstu_attention(q.transpose(1, 2), k, v)
