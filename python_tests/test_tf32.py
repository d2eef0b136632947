"""Float32 on CUDA where torch allows TF32 in products, beside plain PyTorch with the same switch (rule: checks.py)."""

import pytest
import torch
from cases import Case, devices, make
from checks import check, forward_backward

from hstu_ops import hstu_attention

pytestmark = pytest.mark.skipif("cuda" not in devices(), reason="a CUDA device is needed")
LENGTHS = (500, 0, 333)


@pytest.fixture
def switch():
    before = torch.backends.cuda.matmul.fp32_precision
    yield lambda on: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32" if on else "ieee")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("bias", ("none", "position+time", "dense/batch/head"))
@pytest.mark.parametrize("dim", (24, 64, 128))
def test_tf32(dim, bias, switch):
    switch(True)
    check(Case("", LENGTHS, dim_qk=dim, dim_v=dim, bias=bias, num_targets=(9, 0, 30)), torch.float32, "cuda")


def test_masks_scales_and_strides(switch):
    switch(True)
    options = dict(contextual_seq_len=3, max_attn_len=100, min_full_attn_seq_len=20, target_group_size=2)
    case = Case("", LENGTHS, dim_qk=50, dim_v=35, num_targets=(9, 0, 30), scale="row", strided=True, **options)
    check(case, torch.float32, "cuda")


@pytest.mark.parametrize("dim", (64, 128))
def test_only_where_torch_allows_it(dim, switch, deterministic):
    """The default is full float32. What held in the forward pass holds in its backward pass."""
    inputs = make(Case("", LENGTHS, dim_qk=dim, dim_v=dim), device="cuda")
    grad = torch.randn_like(inputs.v)
    true = forward_backward(hstu_attention, inputs, grad)
    switch(True)
    rounded = forward_backward(hstu_attention, inputs, grad)
    out = inputs.call(hstu_attention)
    switch(False)
    later = dict(zip(inputs.leaves, torch.autograd.grad(out, list(inputs.leaves.values()), grad), strict=True))
    again = forward_backward(hstu_attention, inputs, grad)
    for name, x in true.items():
        assert torch.equal(x, again[name])
        assert 1e-5 < (rounded[name] - x).norm() / x.norm() < 1e-2
        assert name == "out" or torch.equal(rounded[name], later[name])
