"""Same bits every time: two runs, any number of threads, whatever the memory held and whatever the neighbours hold."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from cases import CORNER, SMALL, Case, make
from checks import check, forward_backward

from hstu_ops import hstu_attention

_dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
# Tables of few entries that every sequence and head adds to: where a race would show.
_CONTENDED = Case("contended", (200, 0, 150, 170, 1, 90, 130), heads=4, bias="position+time", positions=8)
_CONTENDED_WIDE = [replace(_CONTENDED, name=f"contended-{d}", dim_qk=d, dim_v=d) for d in (64, 128, 256)]
_WIDE = Case("wide", (200, 0, 150, 170, 1), heads=2, dim_qk=256, dim_v=256, bias="dense")
# Several blocks of keys; blocks of targets that later targets do not keep.
_BLOCKS = [
    Case(f"{name}-{dim}", (700, 900), heads=2, dim_qk=dim, dim_v=dim, num_targets=(450, 20), **options)
    for dim in (64, 128)
    for name, options in (("causal", {}), ("window", {"max_attn_len": 100}), ("dense", {"bias": "dense"}))
]
_CASES = [*SMALL, _CONTENDED, *_CONTENDED_WIDE, _WIDE]


def _run(inputs):
    grad_out = torch.ones(inputs.q.shape[0], inputs.q.shape[1], inputs.v.shape[2]).to(inputs.q)
    return forward_backward(hstu_attention, inputs, grad_out)


def _assert_same_bits(got, want):
    for name in want:
        same = torch.equal(got[name], want[name])
        assert same, f"{name} differs by up to {(got[name] - want[name]).abs().max()}"


def _assert_same_but_for_rounding(got, want):
    """The same numbers, summed in another order in fp32."""
    for name, x in want.items():
        eps = torch.finfo(x.dtype).eps
        least = 0.01 * eps * x.float().square().mean().sqrt()
        difference = (got[name].float() - x.float()).abs()
        assert (difference <= eps * x.float().abs() + least).all(), f"{name} differs by up to {difference.max()}"


@_dtypes
@pytest.mark.parametrize("case", [*_CASES, *_BLOCKS], ids=str)
def test_two_runs(case, dtype, device):
    torch.use_deterministic_algorithms(True)
    inputs = make(case, dtype, device)
    first = _run(inputs)
    for _ in range(3):
        _assert_same_bits(_run(inputs), first)


@_dtypes
@pytest.mark.parametrize("case", _BLOCKS, ids=str)
def test_many_blocks(case, dtype, device):
    """A kernel may add up parts of a gradient in an order of its own here: the result obeys the rule as well."""
    torch.use_deterministic_algorithms(True)
    check(case, dtype, device)


@pytest.mark.parametrize("dim", (64, 128))
def test_many_items(dim, device):
    """More blocks than a GPU works on at a time: who waits for whom differs from run to run."""
    lengths = tuple(37 * i % 1031 for i in range(200 if "cuda" in device else 8))
    inputs = make(Case("", lengths, heads=4, dim_qk=dim, dim_v=dim), torch.bfloat16, device)
    usual = _run(inputs)
    torch.use_deterministic_algorithms(True)
    first = _run(inputs)
    _assert_same_but_for_rounding(first, usual)
    for _ in range(10 if "cuda" in device else 1):
        _assert_same_bits(_run(inputs), first)


@pytest.mark.parametrize("deterministic", (False, True), ids=("default", "deterministic"))
@pytest.mark.parametrize("dim", (64, 128))
def test_processors_taken(dim, deterministic, device):
    """Blocks of a call wait for others of it, but for none without a processor: other work may hold some."""
    if device == "cpu":
        pytest.skip("processors are a GPU's")
    torch.use_deterministic_algorithms(deterministic)
    inputs = make(Case("", (1024,) * 60, heads=4, dim_qk=dim, dim_v=dim), torch.bfloat16, device)
    alone = _run(inputs)
    torch.cuda.synchronize()
    held = []
    for stream in [torch.cuda.Stream() for _ in range(3)]:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10**9)  # clocks, on one processor, where no block of ours fits beside it
        held.append(stream.record_event())
    got = _run(inputs)
    torch.cuda.current_stream().synchronize()
    assert not any(event.query() for event in held), "waited for what it had no processors for"
    torch.cuda.synchronize()
    _assert_same_but_for_rounding(got, alone)


def test_forward_needs_no_switch(device):
    inputs = make(_CONTENDED, device=device, grad=False)
    first = inputs.call(hstu_attention)
    assert all(torch.equal(inputs.call(hstu_attention), first) for _ in range(5))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@_dtypes
@pytest.mark.parametrize("case", [*_CASES, *CORNER], ids=str)
def test_threads(case, dtype, threads):
    inputs = make(case, dtype)
    threads(1)
    alone = _run(inputs)
    for count in (2, 3, 8):
        threads(count)
        _assert_same_bits(_run(inputs), alone)


@_dtypes
@pytest.mark.parametrize("bad", (float("nan"), float("inf")), ids=str)
@pytest.mark.parametrize("bias", ("none", "position+time", "dense/batch"))
def test_one_sequence_never_reaches_another(bias, bad, dtype, device):
    """Rows of the middle sequence are poisoned; results of all others keep their bits."""
    case = Case("", (33, 70, 1, 64, 0, 50), bias=bias, num_targets=(3, 5, 1, 0, 0, 7), contextual_seq_len=2)
    torch.use_deterministic_algorithms(True)
    clean = _run(make(case, dtype, device))
    inputs = make(case, dtype, device)
    sick = slice(33, 103)
    with torch.no_grad():
        for x in (inputs.q, inputs.k, inputs.v):
            x[sick] = bad
        if "dense" in bias:
            inputs.options["bias"][1] = bad
    got = _run(inputs)
    assert not got["out"][sick].isfinite().all()
    for name in ("out", "q", "k", "v"):
        assert torch.equal(got[name][:33], clean[name][:33]) and torch.equal(got[name][103:], clean[name][103:]), name
    if "dense" in bias:
        others = [0, 2, 3, 4, 5]
        assert torch.equal(got["bias"][others], clean["bias"][others])


@_dtypes
@pytest.mark.parametrize("case", [*_CASES, *CORNER], ids=str)
def test_uninitialised_memory_is_never_read(case, dtype, device):
    """torch fills new tensors, outputs and workspaces alike, with NaN; nothing may come through."""
    clean = _run(make(case, dtype, device))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    poisoned = _run(make(case, dtype, device))
    for name, x in poisoned.items():
        assert x.isfinite().all(), name
    _assert_same_bits({"out": poisoned["out"]}, {"out": clean["out"]})


def test_memory_grows_with_rows_only():
    """8192 rows of two heads: scores alone would be 512 MiB in float32."""
    code = """
import resource, torch, hstu_ops
x = torch.randn(8192, 2, 32, requires_grad=True)
offsets = torch.tensor([0, 8192])
bias = hstu_ops.RelativeAttentionBias(8192, hstu_ops.TimeBuckets.log())
hstu_ops.hstu_attention(x[:64], x[:64], x[:64], torch.tensor([0, 64]), 64, bias=bias(torch.arange(64))).sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
hstu_ops.hstu_attention(x, x, x, offsets, 8192, bias=bias(torch.arange(8192))).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    grown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert float(grown) < 64, f"{grown} MiB"
