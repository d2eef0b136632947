"""hstu_attention against plain PyTorch: forward and gradients, every type, every case (the rule: checks.py)."""

from dataclasses import replace

import pytest
import torch
from cases import BIASES, CORNER, DTYPES, SMALL, Case, make, random_case
from checks import check, forward_backward

from hstu_ops import hstu_attention, reference


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_small(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("case", CORNER, ids=str)
def test_corner(case, dtype, device):
    check(case, dtype, device)


@pytest.mark.parametrize("bias", BIASES)
def test_bias(bias, dtype, device):
    case = Case(bias, (50, 0, 90), bias=bias, heads=3, num_targets=(4, 0, 9), contextual_seq_len=2)
    check(case, dtype, device)


@pytest.mark.parametrize("block", range(10))
def test_random(block, device):
    for seed in range(20 * block, 20 * block + 20):
        check(random_case(seed), DTYPES[1 + seed % 3], device, seed=seed)


@pytest.mark.parametrize("dim", (64, 128, 256))
def test_few_queries_against_many_keys(dim, device):
    """Kernels split the keys where there are too few queries to fill the device."""
    for queries in (40, 200):
        check(
            Case("", (1100,), queries=(queries,), heads=1, dim_qk=dim, dim_v=dim, num_targets=(30,)), DTYPES[3], device
        )


@pytest.mark.parametrize("bias", ("none", "position+time"))
def test_long_sums(bias, dtype, device):
    """Rounding errors of a sum grow with its length no faster than plain PyTorch's."""
    if dtype != torch.float64:
        check(Case("long", (2500,), heads=1, dim_qk=64, dim_v=64, bias=bias), dtype, device)


_ONE_BY_ONE = {  # lengths and dimension
    "many": ([37 * i % 131 for i in range(300)], 64),
    "long-64": ([6600, 300, 4500, 70], 64),
    "long-128": ([6600, 300, 4500, 70], 128),
    "long-256": ([4096, 4500, 3900], 256),
}


@pytest.mark.parametrize("name", _ONE_BY_ONE)
def test_sequences_one_by_one(name, dtype, device):
    """A batch gives what each of its sequences gives by itself. Kernels may walk a batch in groups of sequences, and of
    heads where these are long: no block of rows is left out, and none is taken twice."""
    lengths, dim = _ONE_BY_ONE[name]
    if name != "many" and "cuda" not in device:
        lengths = [300, 70, 260]
    inputs = make(Case("batch", tuple(lengths), heads=4 - 2 * (name == "many"), dim_qk=dim, dim_v=dim), dtype, device)
    grad_out = torch.randn_like(inputs.v)
    together = forward_backward(hstu_attention, inputs, grad_out)
    apart = []
    for q, k, v, g in zip(*(x.detach().split(lengths) for x in (inputs.q, inputs.k, inputs.v, grad_out)), strict=True):
        q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
        one = replace(inputs, q=q, k=k, v=v, seq_offsets=inputs.seq_offsets.new_tensor((0, len(q))))
        apart.append(forward_backward(hstu_attention, one, g))
    for name, x in together.items():
        y = torch.cat([parts[name] for parts in apart]).double()
        assert (x.double() - y).norm() <= (0.25 * torch.finfo(dtype).eps + 1e-6) * y.norm(), name


@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("dim", (64, 128, 256))
def test_all_rows_are_written(dim, deterministic, device):
    """Whatever memory held, and whatever is in the offsets; calls end even where these make no sense."""
    if device == "cpu":
        pytest.skip("nonsense raises on CPU")
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False
    total, heads = 4000, 4
    inputs = make(Case("", (total,), heads=heads, dim_qk=dim, dim_v=dim), DTYPES[3], device)
    for sense, offsets, offsets_q, window in (
        (True, (0, 1500, 1500, total), None, 0),
        (True, (0, 1500, 1500, total), None, 100),
        (True, (0, 0, 1000, total), (0, 500, 1000, total), 0),  # queries without keys
        (False, (0, 3000, 1000, total), None, 0),
        (False, (0, -9, total + 9, 7), None, 100),
        (False, (0, 10, 20, total), (0, 3000, 500, total), 0),
    ):
        offsets, offsets_q = (x and torch.tensor(x, device=device) for x in (offsets, offsets_q))
        poison = torch.full((16 * total * heads * dim,), float("nan"), device=device)
        del poison  # torch hands this memory out next
        out = hstu_attention(inputs.q, inputs.k, inputs.v, offsets, total, seq_offsets_q=offsets_q, max_attn_len=window)
        grads = torch.autograd.grad(out, (inputs.q, inputs.k, inputs.v), torch.ones_like(out))
        torch.cuda.synchronize()
        if sense:
            assert all(x.isfinite().all() for x in (out, *grads)), (offsets, window)


@pytest.mark.parametrize("bias", ("none", "position+time"))
@pytest.mark.parametrize("dims", ((60, 52), (100, 124), (196, 252)), ids=str)
def test_heads_end_within_16_bytes(dims, bias, device):
    """In rows that start on 16 bytes, what lies behind each head is neither read nor multiplied."""
    case = Case("", (300, 0, 500), heads=2, dim_qk=dims[0], dim_v=dims[1], bias=bias, num_targets=(9, 0, 0))
    inputs = make(case, DTYPES[3], device)

    def widen(x):
        room = torch.nn.functional.pad(x.detach(), (0, -x.shape[2] % 8), value=float("nan"))
        return room[..., : x.shape[2]].requires_grad_(x.requires_grad)

    grad_out = torch.randn_like(inputs.v, requires_grad=False)
    expected = forward_backward(reference.hstu_attention, inputs.double(), grad_out.double())
    wide = replace(inputs, q=widen(inputs.q), k=widen(inputs.k), v=widen(inputs.v))
    for name, x in forward_backward(hstu_attention, wide, widen(grad_out)).items():
        error = (x.double() - expected[name]).norm()
        assert error <= torch.finfo(DTYPES[3]).eps * expected[name].norm(), name


def test_padding_changes_nothing(device):
    """max_seq_len sets the default scale and nothing else."""
    inputs = make(SMALL[5], device=device, grad=False)
    far = hstu_attention(
        inputs.q, inputs.k, inputs.v, inputs.seq_offsets, 100_000, **{**inputs.options, "scale": 1 / 128}
    )
    assert torch.equal(far, inputs.call(hstu_attention, scale=1 / 128))


def test_rows_without_keys_are_zero(device):
    """A window that ends before the targets' position, with no group partner, leaves only the row itself."""
    inputs = make(Case("", (8,), num_targets=(8,), target_group_size=1), device=device, grad=False)
    inputs.v[3] = 0
    out = inputs.call(hstu_attention)
    assert (out[3] == 0).all() and (out[4] != 0).any()


def test_additive_over_keys(device64):
    """No softmax: attention over all keys is the sum of attentions over parts of them."""
    q, k, v = torch.randn(3, 30, 2, 16, device=device64, dtype=torch.float64).unbind()
    full = torch.tensor([0, 30], device=device64)

    def part(keys):
        targets = torch.tensor([5], device=device64)
        return hstu_attention(
            q[25:],
            k[keys],
            v[keys],
            full.new_tensor([0, len(k[keys])]),
            30,
            num_targets=targets,
            seq_offsets_q=full.new_tensor([0, 5]),
        )

    whole, first = part(slice(None)), part(torch.cat([torch.arange(10), torch.arange(25, 30)]).to(device64))
    second = part(torch.cat([torch.arange(10, 25), torch.arange(25, 30)]).to(device64))
    own = part(torch.arange(25, 30, device=device64))
    torch.testing.assert_close(whole, first + second - own, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("deterministic")
def test_gradient_of_a_broadcast(device, dtype):
    """Incoming gradients with stride 0 (of a sum) and transposed ones."""
    inputs = make(SMALL[5], dtype, device)
    for weigh in (
        lambda out: out.sum(),
        lambda out: (out.transpose(0, 2) * torch.ones(2, len(out), device=device, dtype=dtype)).sum(),
    ):
        got = torch.autograd.grad(weigh(inputs.call(hstu_attention)), inputs.q)[0]
        ones = torch.ones(len(got), 2, 32, device=device, dtype=dtype)
        assert torch.equal(got, torch.autograd.grad(inputs.call(hstu_attention), inputs.q, ones)[0])


def test_overlapping_views_and_shared_tensors(device64):
    """One tensor as q, k and v: its gradient is the sum of three."""
    x = torch.randn(40, 2, 16, device=device64, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([0, 15, 40], device=device64)
    got = torch.autograd.grad(hstu_attention(x, x, x, offsets, 25).square().sum(), x)[0]
    want = torch.autograd.grad(reference.hstu_attention(x, x, x, offsets, 25).square().sum(), x)[0]
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_broadcast_heads_are_views(device):
    """k and v expanded over heads (stride 0), as in multi-query attention."""
    q = torch.randn(40, 4, 16, device=device)
    k, v = torch.randn(2, 40, 1, 16, device=device).expand(2, 40, 4, 16)
    offsets = torch.tensor([0, 15, 40], device=device)
    assert torch.equal(
        hstu_attention(q, k, v, offsets, 25), hstu_attention(q, k.contiguous(), v.contiguous(), offsets, 25)
    )


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("float16", "bfloat16"))
def test_autocast(dtype, device):
    """q, k, v are cast, tables are not; gradients have the types of the arguments."""
    inputs = make(SMALL[16], device=device)
    with torch.autocast(device, dtype):
        out = inputs.call(hstu_attention)
    assert out.dtype == dtype
    low = inputs.with_leaves({x: t.to(dtype) if x in "qkv" else t for x, t in inputs.leaves.items()})
    assert torch.equal(out, low.call(hstu_attention))
    grads = torch.autograd.grad(out.float().square().sum(), list(inputs.leaves.values()))
    assert {x.dtype for x in grads} == {torch.float32} and all((x != 0).any() for x in grads)
    with torch.autocast(device, dtype, enabled=False):
        assert inputs.call(hstu_attention).dtype == torch.float32


def test_autocast_leaves_float64(device64):
    with torch.autocast(device64, torch.bfloat16):
        assert make(SMALL[0], torch.float64, device64).call(hstu_attention).dtype == torch.float64
