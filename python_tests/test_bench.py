"""The bench harness: what it counts, times, compares and writes. No speed is asserted."""

import contextlib
import csv
import math
import os
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import CORNER, REAL, SMALL, Case

import hstu_ops
from hstu_ops import RelativeBias, reference

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import attention
import compare
import harness
import measure
import peaks
import problems
import providers
import readme
import report
import suites

BOTH_BIASES = ["--bias=relative,none"]


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# ---- timing ----------------------------------------------------------------------------------------------


def test_summary_of_times():
    timing = harness.summarise([4.0, 1.0, 2.0, 3.0, 5.0], "cpu")
    assert (timing.median, timing.minimum, timing.runs) == (3.0, 1.0, 5)
    assert timing.spread == pytest.approx((4 - 2) / 3)
    assert harness.quantile([1.0, 2.0], 0.5) == 1.5
    assert harness.summarise([2.0], "cpu").spread == 0


class Clock:
    """Every call that is timed takes the next of `seconds`, the last one from then on."""

    def __init__(self, *seconds: float) -> None:
        self.now, self.seconds, self.calls = 0.0, seconds, 0

    def call(self) -> None:
        self.now += self.seconds[min(self.calls, len(self.seconds) - 1)]
        self.calls += 1

    def __call__(self) -> float:
        return self.now


def test_warm_up_is_not_timed():
    clock = Clock(1.0, 0.1)
    timing = harness.time_cpu(clock.call, budget=1.0, clock=clock)
    assert timing.median == pytest.approx(0.1)
    assert 9 <= timing.runs <= 10


def test_a_slow_first_call_is_warm_up():
    clock = Clock(9.0, 0.1)
    assert harness.time_cpu(clock.call, budget=1.0, clock=clock).median == pytest.approx(0.1)


def test_slow_calls_run_twice():
    clock = Clock(9.0, 8.0)
    timing = harness.time_cpu(clock.call, budget=1.0, clock=clock)
    assert (clock.calls, timing.runs, timing.minimum) == (2, 2, 8.0)


def test_short_cuda_calls_are_timed_in_a_graph_and_fall_back_to_events(monkeypatch):
    monkeypatch.setattr(harness, "_elapsed", lambda calls, count: 1e-5 * count)
    monkeypatch.setattr(harness, "_time_events", lambda calls, estimate, budget, note="": ("events", note))
    monkeypatch.setattr(harness, "_time_graph", lambda calls, estimate, budget: ("graph", ""))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert harness.time_cuda([id], 0.1) == ("graph", "")
    assert harness.time_cuda([id], 0.1, graph="never") == ("events", "")

    def cannot(*args):
        raise RuntimeError("capture failed\nbecause")

    monkeypatch.setattr(harness, "_time_graph", cannot)
    assert harness.time_cuda([id], 0.1) == ("events", "no graph: RuntimeError: capture failed")
    monkeypatch.setattr(harness, "_elapsed", lambda calls, count: 1.0 * count)
    assert harness.time_cuda([id], 0.1).runs == 2


def test_copies_reach_past_the_cache(monkeypatch):
    gpu = types.SimpleNamespace(L2_cache_size=50 * 2**20)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert harness.copies_past_l2(2**30) == 1
    assert harness.copies_past_l2(50 * 2**20) == 3
    assert harness.copies_past_l2(1) == harness.MAX_COPIES


def test_peak_memory_sees_what_a_call_holds():
    peak = harness.peak_memory(lambda: torch.ones(2**24).sum(), "cpu")
    assert peak is None or 0.9 * 2**26 < peak < 3 * 2**26


# ---- counting --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL + CORNER, ids=str)
def test_kept_pairs_are_those_of_the_mask(case: Case):
    expected = 0
    for b, n in enumerate(case.lengths):
        context = case.contextual_seq_len
        mask = reference.attention_mask(
            n,
            causal=case.causal,
            num_targets=case.num_targets[b] if case.num_targets else 0,
            target_group_size=case.target_group_size,
            contextual_seq_len=context[b] if isinstance(context, tuple) else context,
            max_attn_len=case.max_attn_len,
            min_full_attn_seq_len=case.min_full_attn_seq_len,
            global_prefix_len=case.global_prefix_len,
        )
        expected += int(mask[n - (n if case.queries is None else case.queries[b]) :].sum())
    assert problems.kept_pairs(case) == expected


def test_kept_pairs_without_the_core(monkeypatch):
    case = next(x for x in SMALL if x.name == "everything")
    fast = problems.kept_pairs(case)
    monkeypatch.setattr(problems, "_core", None)
    problems._kept_pairs.cache_clear()
    assert problems.kept_pairs(case) == fast
    problems._kept_pairs.cache_clear()


def test_flops_and_bytes():
    case = problems.dense(100, 3, 64, heads=4)
    pairs = 3 * 100 * 101 // 2
    assert problems.flops(case, "fwd") == 2 * 128 * pairs * 4
    assert problems.flops(case, "bwd") == 2.5 * problems.flops(case, "fwd")
    assert problems.flops(case, "fwd+bwd") == 3.5 * problems.flops(case, "fwd")
    row = 300 * 4 * 64
    assert problems.moved_bytes(case, torch.bfloat16, "fwd") == 2 * 4 * row
    assert problems.moved_bytes(case, torch.float32, "bwd") == 4 * 7 * row
    assert problems.moved_bytes(replace(case, bias="dense"), torch.float32, "fwd") == 4 * 4 * row + 4 * pairs // 3


def test_deterministic_backward():
    """The direction "det" is the backward pass in deterministic mode, which stays behind it as it was before."""
    seen, x = [], torch.ones(3, requires_grad=True)

    def forward():
        out = x * 2
        out.register_hook(lambda grad: seen.append(torch.are_deterministic_algorithms_enabled()))
        return out

    provider, case = types.SimpleNamespace(bind=lambda inputs, case: (forward, [x])), problems.dense(100, 3, 64)
    for direction, wanted in (("det", True), ("bwd", False)):
        measure.make_call(provider, problems.Problem(case, torch.float32), direction, "cpu", 0)()
        assert seen.pop() is wanted and not torch.are_deterministic_algorithms_enabled()
    assert problems.flops(case, "det") == problems.flops(case, "bwd")


def test_roofline_is_the_slower_of_products_and_memory():
    top = peaks.Peaks("cuda", {torch.bfloat16: 100.0}, copy=10.0)
    assert top.bound(200.0, 10.0, torch.bfloat16) == 2.0
    assert top.bound(200.0, 50.0, torch.bfloat16) == 5.0
    on_cpu = peaks.Peaks("cpu", {torch.float32: 100.0}, copy=10.0)
    assert on_cpu.of(torch.bfloat16) == 100.0
    assert on_cpu.drift(replace(on_cpu, copy=12.0)) == pytest.approx(0.2)


# ---- cases and tensors -----------------------------------------------------------------------------------


def test_jagged_lengths_are_uniform_and_repeatable():
    case = problems.jagged(1000, 500, 64, targets=20)
    assert case == problems.jagged(1000, 500, 64, targets=20)
    assert min(case.lengths) >= 100 and max(case.lengths) <= 1000
    assert 500 < problems.mean_length(case) < 600
    assert case.num_targets == (20,) * 500


@pytest.mark.parametrize("case", [*SMALL, *CORNER], ids=str)
def test_drawn_tensors_fit_the_op(case: Case):
    inputs = problems.draw(case, torch.float32, "cpu")
    assert inputs.call(reference.hstu_attention).shape == (len(inputs.q), case.heads, case.dim_v)
    assert all(x.requires_grad and x.is_leaf for x in inputs.leaves.values())
    assert inputs.q.is_contiguous() or case.strided


def test_gaps_are_log_normal_around_an_hour():
    bias = problems.draw(problems.dense(2000, 4, 8, bias="relative"), torch.bfloat16, "cpu").options["bias"]
    assert isinstance(bias, RelativeBias) and bias.time_weight.dtype == torch.float32
    logs = bias.timestamps.diff().double().clamp(min=1).log()
    assert float(logs.median()) == pytest.approx(math.log(3600), abs=0.2)
    assert float(logs.std()) == pytest.approx(2, abs=0.2)


def test_suites_hold_the_stated_cases():
    cpu = suites.choose(attention.parse([]), "cpu")
    shapes = {(x.problem.case.name, problems.type_name(x.problem.dtype)) for x in cpu}
    assert {(f"dense-{n}{b}", t) for n in (512, 4096) for b in ("", "-bias") for t in ("fp32", "bf16")} <= shapes
    assert {("quarter", "fp32"), ("quarter-bias", "fp32")} <= shapes
    assert not cpu[0].compare and all(x.compare for x in suites.choose(attention.parse(["--providers=padded"]), "cpu"))
    cuda = suites.choose(attention.parse([]), "cuda")
    assert {("N8192 B16 D128", 128), ("N1024 B32 D256", 256)} <= {
        (x.problem.case.name, x.problem.case.dim_qk) for x in cuda
    }
    labels = {x.problem.label for x in cuda}
    assert all(other in labels for x in cuda for _, other in x.problem.against)
    assert len(labels) == len(cuda)


def test_cases_by_option():
    args = attention.parse([*BOTH_BIASES, "--lengths=64,128", "--dims=8", "--jagged", "--targets=3", "--dtype=fp16"])
    entries = suites.choose(args, "cpu")
    assert len(entries) == 4
    assert entries[1].problem.against == (("no bias", entries[0].problem.label),)
    assert [x.problem.case.name for x in suites.choose(attention.parse(["--cases", "REAL"]), "cuda")] == [
        x.name for x in REAL
    ]
    with pytest.raises(ValueError, match="--bias: expected"):
        suites.choose(attention.parse(["--bias", "relativ"]), "cpu")
    with pytest.raises(ValueError, match="--cases: expected"):
        suites.choose(attention.parse(["--cases", "dense-513"]), "cpu")


# ---- providers -------------------------------------------------------------------------------------------


def test_backend_is_forced_only_while_it_runs(monkeypatch):
    monkeypatch.setenv("HSTU_OPS_BACKEND", "sm90")
    with providers.Own("sm80").active():
        assert os.environ["HSTU_OPS_BACKEND"] == "sm80"
    assert os.environ["HSTU_OPS_BACKEND"] == "sm90"
    monkeypatch.setattr(providers.hstu_ops, "build_info", lambda: {"cuda_backend": "sm90"})
    with pytest.raises(RuntimeError, match="sm90 is used"), providers.Own("sm80").active():
        pass
    assert os.environ["HSTU_OPS_BACKEND"] == "sm90"


def test_tf32_is_allowed_only_while_it_runs():
    own, tf32 = providers.find("cuda", ["fa2"], ["default", "tf32"])[0][:2]
    assert (own.name, tf32.name) == ("hstu_ops", "tf32") and set(providers.OWN_NAMES) >= {own.name, tf32.name}
    before = torch.backends.cuda.matmul.fp32_precision
    with tf32.active():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert tf32.refuses(SMALL[0], torch.bfloat16, "cuda", "fwd")
    assert not tf32.refuses(SMALL[0], torch.float32, "cuda", "fwd")


def test_padded_computes_the_same_and_knows_its_memory(monkeypatch):
    case = next(x for x in SMALL if x.name == "position-time-per-head")
    inputs = problems.draw(case, torch.float64, "cpu")
    forward, leaves = providers.Padded().bind(inputs, case)
    torch.testing.assert_close(forward(), inputs.call(reference.hstu_attention))
    assert len(leaves) == 5
    huge = problems.dense(2**20, 4, 64)
    assert "GiB" in providers.Padded().refuses(huge, torch.float32, "cpu", "fwd")
    monkeypatch.setattr(providers, "available_memory", lambda device: 2**40)
    slow = problems.dense(8192, 16, 64)
    assert providers.Padded().refuses(slow, torch.bfloat16, "cuda", "fwd") == "needs about 24 GiB of 4"
    assert providers.Padded().refuses(slow, torch.bfloat16, "cpu", "fwd") is None


@pytest.mark.parametrize("window", [0, 16])
def test_flash_attention_is_called_as_torch_expects(window):
    case = problems.dense(64, 2, 32, max_attn_len=window)
    inputs = problems.draw(case, torch.bfloat16, "cpu")
    on_meta = replace(
        inputs,
        **{x: getattr(inputs, x).detach().to("meta").requires_grad_() for x in ("q", "k", "v")},
        seq_offsets=inputs.seq_offsets.to("meta"),
    )
    flash = providers.FlashAttention()
    flash.package = None
    forward, leaves = flash.bind(on_meta, case)
    out = forward()
    assert out.shape == inputs.q.shape
    assert [x.shape for x in torch.autograd.grad(out, leaves, torch.ones_like(out))] == [x.shape for x in leaves]
    assert flash.refuses(case, torch.float32, "cuda", "fwd")
    assert flash.refuses(replace(case, num_targets=(1, 1)), torch.bfloat16, "cuda", "fwd") == "no such mask"
    assert flash.refuses(case, torch.bfloat16, "cuda", "fwd") is None


def test_peers_are_given_what_their_version_knows(monkeypatch):
    calls = []

    def hstu_mha(max_seq_len, alpha, q, k, v, seq_offsets, num_targets=None, kernel=None):
        calls.append((max_seq_len, kernel, seq_offsets.dtype))

    def hstu_attn_varlen_func(q, k, v, seq_offsets_q, seq_offsets_k, max_seqlen_q, max_seqlen_k, window_size, alpha):
        calls.append((seq_offsets_q.dtype, window_size))

    names = ("generative_recommenders", "generative_recommenders.common", "generative_recommenders.ops")
    modules = {x: types.ModuleType(x) for x in (*names, "generative_recommenders.ops.hstu_attention", "hstu_attn")}
    modules["generative_recommenders.common"].HammerKernel = types.SimpleNamespace(TRITON="triton")
    modules["generative_recommenders.ops.hstu_attention"].hstu_mha = hstu_mha
    modules["hstu_attn"].hstu_attn_varlen_func = hstu_attn_varlen_func
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    case = problems.dense(64, 2, 32)
    inputs = problems.draw(case, torch.bfloat16, "cpu")
    for peer in (*providers.PEERS["meta"](), *providers.PEERS["nvidia"]()):
        assert peer.refuses(case, torch.bfloat16, "cuda", "fwd") is None
        assert peer.refuses(replace(case, bias="time"), torch.bfloat16, "cuda", "fwd")
        peer.bind(inputs, case)[0]()
    assert calls == [(64, "triton", torch.int64), (torch.int32, (-1, 0))]


# ---- a whole run -----------------------------------------------------------------------------------------


TINY = [*BOTH_BIASES, "--device=cpu", "--quick", "--lengths=32", "--tokens=64", "--heads=1", "--dtype=fp32"]
TINY.append("--time=0.001")


@pytest.fixture
def known_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "measure", lambda *args: peaks.Peaks("cpu", {torch.float32: 1e11}, 1e10))


def test_tiny_run(tmp_path, capsys, known_peaks):
    assert attention.main([*TINY, "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "N32 B2 D64 relative fp32, rate over that of no bias (N32 B2 D64 fp32): hstu_ops fwd" in printed
    assert "padded takes" in printed and "instruction set in use" in printed
    (path,) = tmp_path.glob("*/attention.csv")
    lines = report.load(path)
    assert len(lines) == 8  # two cases, two passes, two providers
    assert lines[0]["kept_pairs"] == str(2 * 32 * 33 // 2)
    assert all(float(x["median_ms"]) > 0 for x in lines)

    assert attention.main([*TINY, "--out", str(tmp_path)]) == 0
    assert len(report.load(path)) == 8  # replaced, not repeated


def test_a_provider_that_fails_loses_its_cell_only(tmp_path, capsys, monkeypatch, known_peaks):

    def broken(self, inputs, case):
        raise RuntimeError("no such luck")

    monkeypatch.setattr(providers.Padded, "bind", broken)
    assert attention.main([*TINY, "--out", "-"]) == 0
    printed = capsys.readouterr().out
    assert "padded failed: RuntimeError: no such luck" in printed
    assert printed.count("hstu_ops fwd") == 1
    monkeypatch.setattr(providers.Own, "bind", broken)
    assert attention.main([*TINY, "--out", "-"]) == 1


def test_builds_beside_one_another(capsys):
    library = next(str(x) for folder in hstu_ops.__path__ if (x := Path(folder, "libhstu_ops.so")).exists())
    assert compare.main([library, library, "--rounds=1", "--", *TINY, "--bias=none", "--direction=fwd"]) == 0
    printed = capsys.readouterr().out
    assert printed.count(library) == 2
    (line,) = [x for x in printed.splitlines() if x.startswith("hstu_ops N32 B2 D64 fp32 fwd ")]
    assert "(1.00) 1.000x" in line and line.count("x ") + line.endswith("x") == 2

    with pytest.raises(SystemExit):
        compare.main([library, "nowhere.so"])
    assert "libraries: expected files, got nowhere.so" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="expected some of"):
        compare.main([library, "--", "--device=cpu", "--providers=fa4"])


def test_the_faster_build_is_said_to_be_faster(capsys, monkeypatch):
    """Of three processes each the median, beside the first build."""
    times = {"0": [2.0, 3.0, 2.4], "1": [1.2, 1.0, 5.0]}
    monkeypatch.setattr(compare, "measure", lambda folder, passed_on: {("a", "case"): times[folder.name].pop(0)})
    assert compare.main([__file__, __file__]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert " ".join(line.split()) == "a case 2.4 (1.50) 1.000x 1.2 (5.00) 2.000x"


def test_options_that_do_not_fit_end_in_one_line(capsys):
    with contextlib.suppress(SystemExit):
        assert attention.main(["--device", "cpu", "--providers", "fa4"]) == 2
    assert "expected some of" in capsys.readouterr().err


def test_csv_of_other_columns_is_not_mixed(tmp_path):
    path = tmp_path / "a.csv"
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["case", "ms"], ["x", "1"]])
    assert report.load(path, ["case"]) == []
    assert report.load(path) == [{"case": "x", "ms": "1"}]


def test_commit_of_a_figure(tmp_path, monkeypatch):
    """HSTU_OPS_COMMIT, else the tree's where git has its root here and nowhere above, else the library's."""
    library = {"commit": "aaa"}
    monkeypatch.setattr(report.hstu_ops, "build_info", lambda: library)
    monkeypatch.delenv("HSTU_OPS_COMMIT", raising=False)

    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "tree").mkdir()
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "--message=a")
    monkeypatch.setattr(report, "ROOT", tmp_path / "tree")
    assert report.commit() == "aaa"  # a copy inside another repository
    monkeypatch.setattr(report, "ROOT", tmp_path)
    head = report._output("git", "-C", str(tmp_path), "rev-parse", "--short=12", "HEAD")
    assert head and report.commit() == f"{head} library aaa"
    library["commit"] = head
    assert report.commit() == head
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "x.csv").write_text("1")
    assert report.commit() == head
    (tmp_path / "file").write_text("2")
    assert report.commit() == f"{head}+dirty library {head}"
    monkeypatch.setenv("HSTU_OPS_COMMIT", "bbb+dirty")
    assert report.commit() == f"bbb+dirty library {head}"
    library["commit"] = "unknown"
    assert report.commit() == "bbb+dirty"


def test_figures_of_the_readme_are_those_of_the_results():
    """`python bench/readme.py` writes them."""
    text, differ = readme.rewritten((report.ROOT / "README.md").read_text())
    assert not differ
    assert all(f"<!-- figures: {x} -->" in text for x in readme.BLOCKS)
    changed = text.replace("| N 4096, B 32 |", "| N 4096, B 33 |")
    assert readme.rewritten(changed) == (text, ["attention", "bias"])


def test_environment_says_where_a_figure_comes_from():
    env = report.environment("cpu")
    assert env.threads == torch.get_num_threads() and env.torch == torch.__version__ and env.isa and env.clocks
    assert report.slug(replace(env, device="A (R) B", threads=2, isa="avx2"), "cpu") == "a-r-b-2-threads-avx2"
    assert (
        measure.peaks_line(peaks.Peaks("cpu", {torch.float32: 1e11}, 1e10))
        == "torch.mm fp32 100 GFLOP/s, copy 10.0 GB/s"
    )
