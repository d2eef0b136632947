"""First derivatives in every way torch asks for them; second ones end in an error that says what to use instead."""

import pytest
import torch
from cases import Case, make
from torch.utils.checkpoint import checkpoint

from hstu_ops import hstu_attention, reference

pytestmark = pytest.mark.usefixtures("deterministic")
_NO_SECOND = r"no second derivative: use hstu_ops\.reference"

_CASES = [
    Case("plain", (3, 0, 4), heads=2, dim_qk=3, dim_v=2),
    Case("targets-position", (5, 4), heads=2, dim_qk=2, dim_v=3, num_targets=(2, 1), bias="position"),
    Case("window-time", (6, 2), heads=2, dim_qk=2, dim_v=2, max_attn_len=2, bias="time/head", query_timestamps=True),
    Case("queries-both", (5, 4), queries=(2, 3), heads=2, dim_qk=2, dim_v=2, bias="position/head+time", scale="row"),
    Case("dense", (3, 4), heads=2, dim_qk=2, dim_v=2, bias="dense/head"),
    Case("dense-batch", (3, 4), heads=2, dim_qk=2, dim_v=2, bias="dense/batch", causal=False, contextual_seq_len=1),
]


def _function(inputs):
    names = list(inputs.leaves)

    def attention(*tensors):
        return inputs.with_leaves(dict(zip(names, tensors, strict=True))).call(hstu_attention)

    return attention, tuple(inputs.leaves.values())


@pytest.mark.parametrize("case", _CASES, ids=str)
def test_gradcheck(case, device64):
    attention, leaves = _function(make(case, torch.float64, device64))
    assert torch.autograd.gradcheck(attention, leaves)


def test_second_derivative_is_an_error(device):
    attention, (q, *rest) = _function(make(_CASES[1], device=device))
    out = attention(q, *rest)
    first = torch.autograd.grad(out.square().sum(), q, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=_NO_SECOND):
        torch.autograd.grad(first.sum(), q)
    # also through the incoming gradient alone
    weight = torch.ones_like(out).requires_grad_()
    first = torch.autograd.grad(attention(q, *rest), q, weight, create_graph=True)[0]
    with pytest.raises(RuntimeError, match=_NO_SECOND):
        torch.autograd.grad(first.sum(), weight)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (0, 3), (1, 2, 4), (0, 1, 2, 3, 4)], ids=str)
def test_only_what_is_asked_for(wanted, device):
    """Gradients of some leaves equal those computed together with all others."""
    inputs = make(Case("", (30, 40), bias="position+time"), device=device)
    attention, leaves = _function(inputs)
    everything = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    some = tuple(x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves))
    grads = torch.autograd.grad(attention(*some).square().sum(), [some[i] for i in wanted])
    assert all(torch.equal(x, everything[i]) for x, i in zip(grads, wanted, strict=True))


@pytest.mark.parametrize("queries", (None, (0,)))
def test_nothing_to_differentiate(queries, device):
    """Gradients of a sum have strides of 0, also without elements."""
    inputs = make(Case("", (0,) if queries is None else (3,), queries=queries, heads=2), device=device)
    grads = torch.autograd.grad(inputs.call(hstu_attention).sum(), (inputs.q, inputs.k, inputs.v))
    assert all(not x.any() for x in grads)


def test_no_grad_modes(device):
    attention, leaves = _function(make(_CASES[0], device=device))
    with torch.no_grad():
        assert not attention(*leaves).requires_grad
    with torch.inference_mode():
        out = attention(*leaves)
        assert out.is_inference()
    assert not attention(*(x.detach() for x in leaves)).requires_grad
    assert torch.equal(out, attention(*leaves))


def test_changing_an_input_is_noticed(device):
    attention, (q, *rest) = _function(make(_CASES[0], device=device))
    x = q.detach().clone().requires_grad_()
    y = x * 1
    out = attention(y, *rest)
    y.data.add_(0)  # allowed
    y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpoint(reentrant, device):
    attention, leaves = _function(make(Case("", (30, 40), bias="position+time"), device=device))
    want = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    for x in leaves:
        x.grad = None
    checkpoint(attention, *leaves, use_reentrant=reentrant).square().sum().backward()
    assert all(torch.equal(x.grad, y) for x, y in zip(leaves, want, strict=True))


def test_func_grad(device):
    attention, leaves = _function(make(Case("", (30, 40), bias="position+time"), device=device))
    want = torch.autograd.grad(attention(*leaves).square().sum(), leaves)
    everything = tuple(range(len(leaves)))
    got = torch.func.grad(lambda *x: attention(*x).square().sum(), argnums=everything)(*leaves)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    _, pullback = torch.func.vjp(attention, *leaves)
    out = attention(*leaves)
    assert torch.equal(pullback(out)[0], torch.autograd.grad(out, leaves[0], out)[0])
    with pytest.raises(RuntimeError, match=_NO_SECOND):
        torch.func.grad(lambda q: torch.func.grad(lambda q: attention(q, *leaves[1:]).sum())(q).sum())(leaves[0])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("options", ({}, {"max_attn_len": 2}), ids=("plain", "window"))
def test_vmap(options, device):
    """A loop, with gradients: into what is mapped, into what is not, and for each sample."""
    q = torch.randn(3, 5, 2, 8, device=device, requires_grad=True)
    k, v = (torch.randn(5, 2, 8, device=device, requires_grad=True) for _ in range(2))
    offsets = torch.tensor([0, 2, 5], device=device)

    def attention(q):
        return hstu_attention(q, k, v, offsets, 5, **options)

    got, want = torch.vmap(attention)(q), torch.stack([attention(x) for x in q])
    assert torch.equal(got, want)
    weight = torch.randn_like(want)
    got, wanted = (torch.autograd.grad(x, (q, k, v), weight) for x in (got, want))
    torch.testing.assert_close(got, wanted)
    each = torch.vmap(torch.func.grad(lambda q, weight: (attention(q) * weight).sum()))(q, weight)
    torch.testing.assert_close(each.detach(), wanted[0])
    with torch.no_grad():
        assert torch.equal(torch.vmap(attention)(q), want)


def test_raw_op_is_differentiable(device):
    """torch.ops.hstu_ops.attention_fwd, called directly."""
    inputs = make(Case("", (30, 40)), device=device)
    options = (None, None, None, True, None, 1, 0, None, 0, 0, 0, *(None,) * 6, False)
    args = (inputs.q, inputs.k, inputs.v, inputs.seq_offsets, None, 40, *options)
    out = torch.ops.hstu_ops.attention_fwd(*args)
    assert torch.equal(out, inputs.call(hstu_attention))
    got = torch.autograd.grad(out.square().sum(), args[:3])
    want = torch.autograd.grad(inputs.call(hstu_attention).square().sum(), args[:3])
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))
    with torch.autocast(device, torch.bfloat16):
        assert torch.ops.hstu_ops.attention_fwd(*args).dtype == torch.bfloat16


def test_training_step_lowers_a_loss(device):
    """Ten steps of gradient descent on all leaves, in float32, follow the reference's."""
    losses = []
    for attention in (hstu_attention, reference.hstu_attention):
        inputs = make(Case("", (20, 30), bias="position+time", num_targets=(3, 4)), device=device)
        optimizer = torch.optim.SGD(list(inputs.leaves.values()), lr=100.0)
        losses.append([])
        for _ in range(10):
            loss = (inputs.call(attention) - 1).square().mean()
            losses[-1].append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert losses[0][-1] < 0.95 * losses[0][0]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))
