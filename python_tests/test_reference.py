"""The reference itself: against numbers worked out by hand, and against loops that share no code with it."""

import math

import numpy as np
import pytest
import torch
from cases import CORNER, SMALL, Case, make, random_case
from checks import exact, forward_backward

from hstu_ops import RelativeBias, TimeBuckets, reference


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def _one_dim(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1)


def test_two_rows_by_hand():
    out = reference.hstu_attention(_one_dim(1, 2), _one_dim(3, -1), _one_dim(10, 100), torch.tensor([0, 2]), 4)
    assert out.flatten().tolist() == pytest.approx([silu(3) * 10 / 4, (silu(6) * 10 + silu(-2) * 100) / 4])


def test_two_sequences_alpha_and_scale_by_hand():
    q, k, v, offsets = _one_dim(1, 2, 3), _one_dim(1, 1, 2), _one_dim(1, 1, 1), torch.tensor([0, 1, 3])
    out = reference.hstu_attention(q, k, v, offsets, 2, alpha=0.5, scale=torch.tensor([1.0, 10.0], dtype=torch.float64))
    assert out.flatten().tolist() == pytest.approx([silu(0.5), 10 * silu(1), 10 * (silu(1.5) + silu(3))])


def test_bias_by_hand():
    """The last row of a sequence of 3, queried at time 100."""
    bias = RelativeBias(
        position_weight=torch.tensor([0.1, 0.2, 0.3, 9.0, 9.0]),
        time_weight=torch.tensor([1.0, 2.0, 4.0]),
        timestamps=torch.tensor([10, 80, 100]),
        query_timestamps=torch.tensor([100]),
        buckets=TimeBuckets.from_boundaries([20, 90]),
    )
    zero, one, offsets = torch.zeros(1, 1, 1).double(), torch.ones(3, 1, 1).double(), torch.tensor([0, 3])
    out = reference.hstu_attention(zero, one, one, offsets, 1, bias=bias, seq_offsets_q=torch.tensor([0, 1]))
    assert out.item() == pytest.approx(silu(4.1) + silu(2.2) + silu(1.3))


def test_mask_by_hand():
    """Six rows: one contextual, three of history, two targets; the window reaches one position back."""
    mask = reference.attention_mask(6, num_targets=2, contextual_seq_len=1, max_attn_len=1)
    assert mask.int().tolist() == [
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0, 1],
    ]


def test_gradient_by_hand():
    """At s = 0 silu is 0 and its slope 1/2; masked pairs have no gradient."""
    q, k, v = (_one_dim(*x).requires_grad_() for x in ((0.0, 0.0), (3.0, 5.0), (2.0, 7.0)))
    out = reference.hstu_attention(q, k, v, torch.tensor([0, 2]), 1)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.flatten().tolist() for x in grads] == [[3.0, 3.0 + 17.5], [0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("case", [*SMALL, *CORNER, *map(random_case, range(1000, 1030))], ids=str)
def test_matches_loops(case):
    """float64 PyTorch against extended precision: they differ by rounding only."""
    inputs = make(case, torch.float64)
    grad_out = torch.randn(inputs.q.shape[0], inputs.q.shape[1], inputs.v.shape[2], dtype=torch.float64)
    got, true = forward_backward(reference.hstu_attention, inputs, grad_out), exact(inputs, grad_out)
    for name in got:
        error = np.abs(got[name].numpy() - true[name]).max(initial=0)
        assert error <= 1e-13 * max(np.abs(true[name]).max(initial=0), 1), name


_PADDED = [
    x for x in (*SMALL, *CORNER, *map(random_case, range(2000, 2030))) if x.queries is None and x.max_seq_len is None
]


@pytest.mark.parametrize("case", _PADDED, ids=str)
def test_padded_matches(case):
    inputs = make(case, torch.float64)
    grad_out = torch.randn(inputs.q.shape[0], inputs.q.shape[1], inputs.v.shape[2], dtype=torch.float64)
    inputs.options.pop("seq_offsets_q")
    got = forward_backward(reference.padded_hstu_attention, inputs, grad_out)
    want = forward_backward(reference.hstu_attention, inputs, grad_out)
    for name in got:
        torch.testing.assert_close(got[name], want[name], rtol=1e-11, atol=1e-11)


def test_second_derivatives():
    inputs = make(
        Case("", (3, 0, 4), heads=1, dim_qk=2, dim_v=3, bias="position+time", num_targets=(1, 0, 2)), torch.float64
    )
    leaves = inputs.leaves

    def attention(*tensors):
        return inputs.with_leaves(dict(zip(leaves, tensors, strict=True))).call(reference.hstu_attention)

    assert torch.autograd.gradcheck(attention, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(attention, tuple(leaves.values()))
