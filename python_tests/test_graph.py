"""A captured CUDA graph may be replayed on other contents of its tensors: kernels read offsets and times themselves."""

from dataclasses import replace

import pytest
import torch
from cases import Case, make
from checks import Errors, forward_backward

from hstu_ops import hstu_attention, reference

CASE = Case("graph", (300, 20, 0, 131), heads=3, max_seq_len=300, contextual_seq_len=3)
# Of as many rows, the last after offsets that make no sense: what was wrong must not outlive its replay.
OTHERS = ([0, 50, 300, 301, 451], [0, 451, 451, 451, 451], [0, 200, -5, 900, 451], [0, 1, 130, 260, 451])


@pytest.mark.parametrize("dim", (64, 128, 256))
@pytest.mark.parametrize("bias", ("none", "position+time", "position/head+time/head", "dense"))
def test_replay_on_other_offsets(bias, dim, device):
    if device == "cpu":
        pytest.skip("graphs are of GPUs")
    inputs = make(replace(CASE, bias=bias, dim_qk=dim, dim_v=dim), torch.bfloat16, device)
    grad_out = torch.randn(inputs.v.shape, device=device).to(inputs.v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        forward_backward(hstu_attention, inputs, grad_out)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(hstu_attention, inputs, grad_out)
    for offsets in OTHERS:
        inputs.seq_offsets.copy_(torch.tensor(offsets))
        graph.replay()
        torch.cuda.synchronize()
        if min(offsets) < 0:
            continue
        plain = forward_backward(reference.hstu_attention, inputs, grad_out)
        true = forward_backward(reference.hstu_attention, inputs.double(), grad_out.double())
        for name in captured:
            errors = Errors(name)
            errors.add(captured[name], plain[name], true[name])
            assert not errors.complaint(), f"offsets {offsets}: {errors.complaint()}"
