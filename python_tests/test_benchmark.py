"""pytest-benchmark cases: shapes of bench/attention.py, kept small. Run with `pytest python_tests --benchmark-only`."""

import sys
from pathlib import Path

import pytest
import torch
from cases import REAL

from hstu_ops import hstu_attention

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

from problems import draw, type_named

pytest.importorskip("pytest_benchmark")

CASES = {x.name: x for x in REAL if x.name in ("dense-512", "dense-1024", "users", "ml-1m", "candidates")}


@pytest.fixture(autouse=True)
def _only_when_asked_for(request: pytest.FixtureRequest) -> None:
    options = request.config.option
    if not (getattr(options, "benchmark_only", False) or getattr(options, "benchmark_enable", False)):
        pytest.skip("a benchmark: run with --benchmark-only")


@pytest.fixture(params=["fp32", "bf16"])
def problem(request: pytest.FixtureRequest, case: str, device: str):
    return draw(CASES[case], type_named(request.param), device)


def timed(benchmark, device: str, call) -> None:
    def finished() -> None:
        call()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = benchmark.name.split("[")[0]
    benchmark(finished)


@pytest.mark.parametrize("case", CASES)
def test_forward(benchmark, problem, device):
    with torch.no_grad():
        timed(benchmark, device, lambda: problem.call(hstu_attention))


@pytest.mark.parametrize("case", CASES)
def test_backward(benchmark, problem, device):
    out = problem.call(hstu_attention)
    grad_out, leaves = torch.randn_like(out), list(problem.leaves.values())
    timed(benchmark, device, lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True))
