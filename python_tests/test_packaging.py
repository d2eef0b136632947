"""The build's decisions, and the installed libraries as files: what they need, export and say about themselves.

Installing for real, in the ways that must work, is `.ci/install_matrix`.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CHECKED_NVCC = ROOT / "cmake" / "checked_nvcc.sh"

spec = importlib.util.spec_from_file_location("hstu_build", ROOT / "hstu_ops" / "_build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


# ------------------------------------------------------------------------------------------------- CUDA or not


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A pretend machine: machine(torch=, nvcc=, driver=, env=) returns what choose_nvcc decides there."""

    def decide(torch=None, nvcc=False, driver=False, env=None, kernels=True):
        (tmp_path / "csrc" / "cuda").mkdir(parents=True, exist_ok=True)
        if kernels:
            (tmp_path / "csrc" / "cuda" / "attention.cu").touch()
        site = tmp_path / "site"
        (site / "torch").mkdir(parents=True, exist_ok=True)
        if torch is not None:
            (site / "torch" / "version.py").write_text(torch)
        monkeypatch.setattr(build, "find_nvcc", lambda site_dirs: "/cuda/bin/nvcc" if nvcc else None)
        monkeypatch.setattr(build, "gpu_driver_present", lambda: driver)
        if env is None:
            monkeypatch.delenv("HSTU_CUDA", raising=False)
        else:
            monkeypatch.setenv("HSTU_CUDA", env)
        return build.choose_nvcc(tmp_path, [str(site)])

    return decide


CPU_TORCH = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_TORCH = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n"


@pytest.mark.parametrize(
    ("setting", "built"),
    [
        (dict(torch=CPU_TORCH), False),
        (dict(torch=CPU_TORCH, nvcc=True), False),
        (dict(torch=CPU_TORCH, nvcc=True, driver=True), True),
        (dict(torch=CUDA_TORCH, nvcc=True), True),
        (dict(torch=CUDA_TORCH), False),
        (dict(nvcc=True), False),
        (dict(nvcc=True, driver=True), True),
        (dict(nvcc=True, env="1"), True),
        (dict(torch=CUDA_TORCH, nvcc=True, driver=True, env="0"), False),
        (dict(torch=CUDA_TORCH, nvcc=True, kernels=False), False),
    ],
)
def test_cuda_is_built_when(machine, setting, built):
    nvcc, why = machine(**setting)
    assert (nvcc is not None) == built
    assert why


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (dict(env="1"), "no nvcc was found: install the CUDA toolkit and set CUDA_HOME"),
        (dict(env="1", nvcc=True, kernels=False), "no CUDA kernels"),
        (dict(env="maybe"), "HSTU_CUDA=MAYBE is not understood"),
    ],
)
def test_impossible_cuda_wish_is_an_error(machine, setting, message):
    with pytest.raises(build.BuildError, match=message):
        machine(**setting)


def test_torch_kind_is_read_without_importing_torch(tmp_path):
    assert build.torch_cuda_version([str(tmp_path)]) is None
    (tmp_path / "torch").mkdir()
    for text, cuda in ((CPU_TORCH, ""), (CUDA_TORCH, "13.0"), ("cuda = '12.8'\n", "12.8"), ("cuda = None\n", "")):
        (tmp_path / "torch" / "version.py").write_text(text)
        assert build.torch_cuda_version([str(tmp_path)]) == cuda


@pytest.mark.parametrize(
    ("wish", "gpus", "archs"),
    [
        ("", (), ["80", "86", "89", "90", "90a"]),
        ("", ("9.0",), ["90", "90a"]),
        ("", ("8.0", "8.6"), ["80", "86"]),
        ("", ("8.7",), ["86"]),
        ("", ("12.0",), ["90"]),
        ("all", ("8.0",), ["80", "86", "89", "90", "90a"]),
        ("native", ("8.9",), ["89"]),
        ("80;90a", (), ["80", "90", "90a"]),
        ("90, 80", (), ["80", "90"]),
    ],
)
def test_architectures(monkeypatch, wish, gpus, archs):
    monkeypatch.setattr(build, "gpu_capabilities", lambda: set(gpus))
    assert build.choose_archs(wish) == archs


@pytest.mark.parametrize(("wish", "gpus"), [("70", ()), ("sm_90", ()), ("native", ()), ("", ("7.5",))])
def test_impossible_architectures_are_an_error(monkeypatch, wish, gpus):
    monkeypatch.setattr(build, "gpu_capabilities", lambda: set(gpus))
    with pytest.raises(build.BuildError):
        build.choose_archs(wish)


# ----------------------------------------------------------------------------------------- build requirements


def test_requirements_are_asked_for_only_where_missing(monkeypatch):
    monkeypatch.setattr(build, "installed_version", lambda name, path=None: (99, 0))
    monkeypatch.setattr(build, "find_tool", lambda name: "/bin/" + name)
    monkeypatch.setattr(build, "find_pybind11", lambda: "/include")
    assert build.missing_requirements() == []
    monkeypatch.setattr(build, "installed_version", lambda name, path=None: (0, 0))
    monkeypatch.setattr(build, "find_tool", lambda name: None)
    monkeypatch.setattr(build, "find_pybind11", lambda: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert build.missing_requirements() == ["setuptools>=70.1", "cmake>=3.22", "ninja>=1.10", "pybind11>=2.12"]
    assert build.missing_requirements(compiling=False) == ["setuptools>=70.1"]


def test_torch_is_never_a_build_requirement():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r"^requires = \[\]", text, re.MULTILINE)
    assert "torch" not in build.MINIMUM


@pytest.mark.parametrize(("text", "version"), [("70.1.0", (70, 1)), ("cmake version 4.0.1-rc2", (4, 0)), ("x", (0, 0))])
def test_parse_version(text, version):
    assert build.parse_version(text) == version


def test_lint_pins_agree_with_pre_commit():
    project, hooks = (ROOT / "pyproject.toml").read_text(), (ROOT / ".pre-commit-config.yaml").read_text()
    for tool, hook in (("ruff", "ruff-pre-commit"), ("clang-format", "mirrors-clang-format")):
        pinned = re.search(rf'"{tool}==([\d.]+)"', project)[1]
        assert re.search(rf"{hook}\n\s+rev: v{re.escape(pinned)}\n", hooks)


# ------------------------------------------------------------------------------------------ what ptxas reports

GOOD_LOG = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 168 registers, used 3 barriers"""


def checked_nvcc(tmp_path, log, code=0):
    """Runs the launcher around an nvcc that writes an object, says `log` and exits with `code`."""
    (tmp_path / "log").write_text(log)
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\ntouch {tmp_path}/k.o\ncat {tmp_path}/log >&2\nexit {code}\n")
    nvcc.chmod(0o755)
    command = ["sh", str(CHECKED_NVCC), str(nvcc), "-c", "k.cu", "-o", str(tmp_path / "k.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stderr, (tmp_path / "k.o").exists()


def test_clean_kernel_passes(tmp_path):
    assert checked_nvcc(tmp_path, GOOD_LOG) == (0, "", True)
    assert "168 registers" in (tmp_path / "k.o.ptxas").read_text()


@pytest.mark.parametrize(
    "log",
    [
        GOOD_LOG.replace("0 bytes stack", "16 bytes stack"),
        GOOD_LOG.replace("0 bytes spill loads", "8 bytes spill loads"),
        "ptxas warning : Registers are spilled to local memory in function 'k', 8 bytes spill stores",
        "ptxas info    : (C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...",
        "ptxas info    : (C7508) Potential Performance Loss: 'setmaxnreg' ignored to maintain minimum requirements",
    ],
)
def test_kernel_that_must_not_ship_fails_the_build(tmp_path, log):
    code, said, object_left = checked_nvcc(tmp_path, log)
    assert code == 1
    assert "ptxas reports" in said
    assert not object_left


def test_compile_errors_pass_through(tmp_path):
    code, said, _ = checked_nvcc(tmp_path, "k.cu(1): error: expected an expression", code=2)
    assert (code, said) == (2, "k.cu(1): error: expected an expression\n")


# ------------------------------------------------------------------------------------- the installed libraries


def library():
    import hstu_ops

    return next(p for folder in hstu_ops.__path__ if (p := Path(folder, "libhstu_ops.so")).exists())


def tool_output(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_build_info():
    from hstu_ops import _core, build_info

    info = build_info()
    assert info["torch_abi"] == "2.10"
    assert info["cpu_isa"] in info["cpu_isas"].split()
    assert "generic" in info["cpu_isas"].split()
    assert bool(info["cuda"]) == bool(info["cuda_archs"])
    assert all(info[key] == value for key, value in _core.build_info().items())
    version = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert info["version"] == version


def test_core_needs_no_torch():
    from hstu_ops import _core

    program = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('_core', {_core.__file__!r})\n"
        "core = importlib.util.module_from_spec(spec); spec.loader.exec_module(core)\n"
        "assert core.Mask(length=3).kept_pairs() == 6 and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_library_needs_only_libtorch_cpu_and_the_system():
    needed = set(re.findall(r"NEEDED.*\[(.*)\]", tool_output("readelf", "-d", str(library()))))
    system = r"lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)\.so\.\d+|ld-linux-.*"
    assert "libtorch_cpu.so" in needed
    assert [n for n in needed if n != "libtorch_cpu.so" and not re.fullmatch(system, n)] == []


def test_library_has_no_search_path():
    assert not re.search(r"R(UN)?PATH", tool_output("readelf", "-d", str(library())))


def test_library_uses_declared_torch_functions_only():
    declared = set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", (ROOT / "csrc/torch/stable_abi.h").read_text()))
    undefined = tool_output("nm", "-D", "--undefined-only", str(library()))
    names = {line.split()[-1] for line in undefined.splitlines() if "@" not in line}
    known = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}
    assert names - known <= declared
    assert declared <= names | {"aoti_torch_get_current_cuda_stream"}, "declared, but not used"


def test_library_exports_nothing():
    assert tool_output("nm", "-D", "--defined-only", str(library())).split() == []
