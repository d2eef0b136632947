"""python -m hstu_ops, as a user calls it, and the example of the README."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hstu_ops import __main__ as main
from hstu_ops import __version__, build_info, reference

_README = Path(__file__).parents[1] / "README.md"


def test_command():
    result = subprocess.run(
        [sys.executable, "-m", "hstu_ops", "--device", "cpu"], capture_output=True, text=True, check=False
    )
    text = result.stdout
    assert result.returncode == 0, text + result.stderr
    assert f"hstu_ops {__version__}, torch {torch.__version__}" in text
    assert re.search(rf"in use: {build_info()['cpu_isa']}, \d+ threads", text)
    assert text.splitlines()[-1].startswith("ok: ")
    for line in ("error, output", "error, gradient of time"):
        ours, padded = map(float, re.search(rf"{line} +(\S+) +(\S+)", text).groups())
        assert 0 < ours < 1e-4 and 0 < padded < 1e-3
    ours, padded = map(int, re.search(r"peak memory +(\d+) MiB +(\d+) MiB", text).groups())
    assert 0 < ours < padded / 10
    ours, padded = map(float, re.search(r"time +(\S+) ms +(\S+) ms", text).groups())
    assert ours < padded


def test_wrong_results_are_noticed(monkeypatch, capsys):
    """An attention that is off by a hundredth fails the check, and the exit status says so."""
    monkeypatch.setattr(main, "LONGEST", 60)
    monkeypatch.setattr(
        main, "hstu_attention", lambda *args, **options: reference.hstu_attention(*args, **options) * 1.01
    )
    monkeypatch.setattr(sys, "argv", ["hstu_ops", "--device", "cpu"])
    assert main.main() == 1
    assert "NOT ACCURATE" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_small_batch_of_each_type(dtype, device, monkeypatch, capsys):
    monkeypatch.setattr(main, "LONGEST", 120)
    monkeypatch.setattr(sys, "argv", ["hstu_ops", "--device", device, "--dtype", dtype])
    assert main.main() == 0
    assert dtype in capsys.readouterr().out


@pytest.mark.skipif(not _README.exists(), reason="not in a source tree")
def test_readme_example():
    code = re.search(r"```python\n(.*?)```", _README.read_text(), re.DOTALL).group(1)
    names = {}
    exec(code, names)
    assert names["out"].shape == (1147, 4, 64)
    assert all(x.grad is not None and (x.grad != 0).any() for x in names["rab"].parameters())
