"""The benches of modules, and the run of all: what they measure, count, print and write. No speed is asserted."""

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "bench"))

import bias
import common
import encoder
import harness
import host
import layer
import memory
import peaks
import pointwise
import report
import run


@pytest.fixture(autouse=True)
def _same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def known_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "measure", lambda *args: peaks.Peaks("cpu", {torch.float32: 1e11}, 1e10))


MODULE = ["--device=cpu", "--quick", "--time=0.001", "--heads=2", "--width=16"]
MACHINE = ("device", "clocks", "driver", "torch", "commit", "mm_gflops", "copy_gbytes")


def lines_of(folder: Path, name: str) -> list[dict]:
    """Of the file a bench wrote; each says what it was measured on, and how sure it is."""
    (path,) = folder.glob(f"*/{name}.csv")
    lines = report.load(path)
    assert all(x[column] for x in lines for column in MACHINE)
    assert all(float(x["ms"]) > 0 and x["+-%"] for x in lines)
    return lines


def test_layer_runs(tmp_path, capsys, known_peaks):
    variants = f"--variants={','.join(layer.VARIANTS)}"
    assert layer.main([*MODULE, "--lengths=16", "--batch=2", variants, "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path, "layer")
    assert [(x["layer"], x["pass"]) for x in lines] == [
        ("research", "fwd"),
        *((x, "fwd+bwd") for x in layer.VARIANTS),
    ]
    assert "research" in capsys.readouterr().out
    assert layer.main([*MODULE, "--lengths=16", "--batch=2", "--variants=best"]) == 2


def test_host_runs(tmp_path, capsys, known_peaks):
    assert host.main(["--device=cpu", "--quick", "--time=0.001", "--out", str(tmp_path)]) == 0
    assert {"forward", "backward"} < {x["call"] for x in lines_of(tmp_path, "host")}
    assert "backward" in capsys.readouterr().out


def test_flops_of_a_layer():
    args = layer.parse(["--width=16", "--heads=2", "--batch=3"])
    bench = types.SimpleNamespace(device="cpu", dtype=torch.float32)
    weights, pairs = 16 * 64 + 16 * 16, 3 * 8 * 9 // 2
    forward, attends = 2 * 24 * weights, 2 * 16 * pairs * 2
    assert layer.step(layer.Case("research", "fwd", 8), args, bench)[1] == forward + attends
    assert layer.step(layer.Case("research", "fwd+bwd", 8), args, bench)[1] == 3 * forward + 3.5 * attends


def test_lengths_in_training_are_those_of_stochastic_length():
    case = encoder.Case("HSTU", 1024, 100, True, 1.6)
    assert case.lengths == [1024] * 7 + [256] * 93  # 100 * 1024^-0.4 = 6.25, rounded up
    assert replace(case, alpha=2.0).lengths == replace(case, alpha=None).lengths == [1024] * 100


def test_lengths_and_flops_of_jagged_inference():
    case = encoder.Case("HSTU", 800, 4, False, jagged=True)
    assert case.lengths == [170, 350, 530, 710] and case.kind == "jagged"
    assert replace(case, model="Transformer, padded").lengths == [800] * 4
    args = encoder.parse(["--width=8", "--layers=3"])
    pairs = sum(n * (n + 1) // 2 for n in case.lengths)
    assert encoder.flops(case, args) == 3 * 2 * (1760 * 5 * 8 * 8 + 2 * 8 * pairs)


def test_encoder_runs(tmp_path, capsys, known_peaks):
    arguments = [*MODULE, "--lengths=16", "--tokens=32", "--layers=1", "--alphas=1.5,2", "--out", str(tmp_path)]
    assert encoder.main(arguments) == 0
    lines = lines_of(tmp_path, "encoder")
    training = ["Transformer", "HSTU", "HSTU, alpha 1.5", "HSTU + bias", "HSTU + bias, alpha 1.5"]
    inference = ["Transformer", "HSTU", "HSTU + bias"]
    jagged = ["Transformer", "Transformer, padded", "HSTU", "HSTU + bias"]
    assert [x["model"] for x in lines] == training + inference + jagged
    assert [x["pass"] for x in lines] == ["training"] * 5 + ["inference"] * 3 + ["jagged"] * 4
    assert float(lines[0]["x"]) == 1 and all(float(x["x"]) > 0 for x in lines)
    for part in ("attention", "products", "pointwise"):
        assert all(float(x[part]) > 0 for x in lines)
    assert "5.6x" in capsys.readouterr().out
    assert encoder.main([*arguments, "--alphas=2.5"]) == 2


def test_memory_runs_and_finds_what_recomputing_saves(tmp_path, known_peaks):
    sizes = ["--batch=2", "--length=16", "--layers=2", "--dtype=fp32"]
    assert memory.main([*MODULE, *sizes, "--out", str(tmp_path)]) == 0
    kept = {x["model"]: float(x["x d"]) for x in lines_of(tmp_path, "memory")}
    assert kept["research"] > kept["research, recompute norm silu"] > kept["research, recompute projection silu"]
    assert kept["Transformer"] > 20


def test_kept_bytes_are_those_that_live_after_the_forward_pass():
    x = torch.ones(1000, requires_grad=True)

    def forward():
        scratch = x.detach() * 2  # gone at the end
        y = x * 3  # kept: the input of exp is not, its result is
        return y.exp() + scratch.sum()

    assert memory.kept_bytes(forward) == 2 * 4000  # exp's result and the sum


def test_a_case_that_fails_loses_its_line_only(capsys, monkeypatch, known_peaks):
    def broken(variant, *args):
        raise RuntimeError("no such luck")

    build = layer.build
    monkeypatch.setattr(layer, "build", lambda v, *args: broken(v) if v == "production" else build(v, *args))
    assert layer.main([*MODULE, "--lengths=16", "--batch=2", "--variants=research,production"]) == 1
    printed = capsys.readouterr().out
    assert "production N 16 fwd+bwd failed: RuntimeError: no such luck" in printed and "research" in printed


def test_bias_runs(tmp_path, capsys, known_peaks):
    arguments = ["--device=cpu", "--quick", "--time=0.001", "--lengths=16", "--tokens=32", "--dims=8", "--heads=1"]
    assert bias.main([*arguments, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/bias.csv")
    kinds = ["none", "position", "time", "position+time", "position+time/sqrt", "dense"]
    assert list(dict.fromkeys(x["bias"] for x in report.load(path))) == kinds
    assert "relative fp32, rate over that of no bias" in capsys.readouterr().out
    assert bias.main([*arguments, "--lengths=0"]) == 2


def test_pointwise_runs(tmp_path, known_peaks):
    arguments = ["--device=cpu", "--quick", "--time=0.001", "--rows=8", "--dim=16", "--heads=2", "--dtype=fp32,bf16"]
    assert pointwise.main([*arguments, "--out", str(tmp_path)]) == 0
    lines = lines_of(tmp_path, "pointwise")
    assert len(lines) == 2 * 2 * len(pointwise.works(16, 2))
    assert {x["dtype"] for x in lines} == {"fp32", "bf16"}
    assert all(float(x["eager"]) > 0 and not x["compile"] for x in lines)
    assert pointwise.main([*arguments, "--cases=softmax"]) == 2
    assert pointwise.main([*arguments, "--dtype=fp8"]) == 2


@pytest.mark.parametrize("name", [x for x in pointwise.works(16, 2) if "dropout" not in x and "concat" not in x])
def test_pointwise_compares_what_is_equal(name):
    work = pointwise.works(16, 2)[name]
    weights = {False: torch.randn(2, 16), True: torch.randn(2, 2).repeat_interleave(8, dim=1)}["per head" in name]
    tensors = [*(torch.randn(8, 16 * x) for x in work.widths if x), *weights[: work.widths.count(0)]]
    for ours, eager in zip(_parts(work.ours(*tensors)), _parts(work.eager(*tensors)), strict=True):
        torch.testing.assert_close(ours, eager)


def _parts(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def test_plots_are_drawn(tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    shown = types.SimpleNamespace(env=report.environment("cpu"))
    rows = [
        {"N": n, "pass": "training", "x": 2.0, "Mrows/s": 1.0, "model": "HSTU", "ms": 1.0, "x d": 14.0} for n in (8, 16)
    ]
    shown.rows = [{**x, "layer": "research", "TFLOP/s": 1.0, "published": 300} for x in rows]
    shown.rows = [{**x, "case": "norm_gate", "dtype": "bf16", "GB/s": 3000.0} for x in shown.rows]
    shown.peaks = peaks.Peaks("cuda", {}, 4e12)
    for module in (encoder, layer, memory, pointwise):
        module.draw(pyplot, shown, tmp_path / f"{module.__name__}.png")
        assert (tmp_path / f"{module.__name__}.png").stat().st_size > 1000


def test_run_runs_all_and_goes_on_after_a_failure(capsys, monkeypatch):
    called = []
    modules = {x: types.SimpleNamespace(main=lambda argv, x=x: called.append((x, argv)) or 0) for x in run.NAMES}

    def broken(argv):
        raise RuntimeError("no such luck")

    modules["layer"].main = broken
    monkeypatch.setattr(run.importlib, "import_module", modules.__getitem__)
    assert run.main(["--quick", "--device=cpu", "--out=-"]) == 1
    assert [x for x, _ in called] == [x for x in run.NAMES if x != "layer"]
    assert called[0][1] == ["--device=cpu", "--quick", "--out=-"]
    assert "layer: failed" in capsys.readouterr().out
    called.clear()
    assert run.main(["--only=memory,bias"]) == 0
    assert [x for x, _ in called] == ["bias", "memory"]


def test_a_line_of_the_table(monkeypatch, capsys, known_peaks):
    args = common.parser("a", "").parse_args(["--device=cpu", "--quick"])
    bench = common.Bench("a", args, "fp32", {"name": "<6", "ms": ">8.2f", "x": ">5.1f"})
    bench.head("what it is")
    bench.add({"name": "b", "x": None}, harness.summarise([0.0125], "cpu"))
    assert capsys.readouterr().out.splitlines()[-3:] == ["", "name         ms     x", "b         12.50     -"]
    assert bench.rows[0]["min_ms"] == 12.5 and bench.rows[0]["mm_gflops"] == 100
