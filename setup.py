"""Builds hstu_ops/libhstu_ops.so (the ops) and hstu_ops/_core.*.so (Python bindings of the mask) with CMake.

Neither torch nor a GPU is needed. Environment variables, all optional:

    HSTU_CUDA       1 or 0: build the CUDA kernels or do not (default: see choose_nvcc in hstu_ops/_build.py)
    HSTU_ARCHS      GPU architectures, such as "80;90a", "all" or "native" (default: see choose_archs there)
    HSTU_CORE       0: leave hstu_ops._core out; the wheel then serves every Python 3
    CMAKE_ARGS      more arguments for CMake
    MAX_JOBS        compilers run at a time (default: the processors of this process)
"""

import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "hstu_ops"))
import _build  # noqa: E402

sys.path.pop(0)

OPS, CORE = "hstu_ops._lib", "hstu_ops._core"
OPS_FILE = "libhstu_ops.so"


def core_wanted():
    return os.environ.get("HSTU_CORE", "1") != "0"


def drop_stale_cache(build_dir, generator):
    """Forget a CMake cache made elsewhere, by another generator or with tools that are gone, such as those of a
    deleted build environment. Objects stay: they are rebuilt only where their command has changed."""
    cache = build_dir / "CMakeCache.txt"
    if not cache.exists():
        return
    entries = {}
    for line in cache.read_text(errors="replace").splitlines():
        name, separator, value = line.partition("=")
        if separator and not line.startswith(("#", "//")):
            entries[name.split(":")[0]] = value
    tools = ("COMMAND", "MAKE_PROGRAM", "C_COMPILER", "CXX_COMPILER", "CUDA_COMPILER")
    paths = [entries.get(f"CMAKE_{tool}", "") for tool in tools]
    gone = any(p.startswith("/") and not os.path.exists(p) for p in paths)
    moved = entries.get("CMAKE_HOME_DIRECTORY") != str(ROOT) or entries.get("CMAKE_GENERATOR") != generator
    if moved:
        shutil.rmtree(build_dir)
    elif gone:
        cache.unlink()
        for found in (build_dir / "CMakeFiles").glob("[0-9]*"):  # what CMake found out about the compilers
            shutil.rmtree(found)


def python_arguments():
    """CMake arguments for hstu_ops._core."""
    if not core_wanted():
        return ["-DHSTU_CORE=OFF"]
    pybind11 = _build.find_pybind11()
    if not pybind11:
        raise _build.BuildError("pybind11 >= 2.12 is needed to build hstu_ops: run `pip install pybind11`.")
    include = sysconfig.get_path("include")
    if not os.path.isfile(os.path.join(include, "Python.h")):
        raise _build.BuildError(
            f"Python.h is not in {include}: install this Python's development package (such as python3-dev), "
            "or set HSTU_CORE=0 to leave hstu_ops._core out (the ops work without it)."
        )
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    return [
        "-DHSTU_CORE=ON",
        f"-DHSTU_PYTHON_INCLUDE={include}",
        f"-DHSTU_PYBIND11_INCLUDE={pybind11}",
        f"-DHSTU_CORE_SUFFIX={suffix}",
    ]


def cuda_arguments():
    """CMake arguments for the CUDA kernels."""
    nvcc, why = _build.choose_nvcc(ROOT, _build.target_site())
    print(f"hstu_ops: CUDA kernels {'with ' + nvcc if nvcc else 'are not built'} ({why})", flush=True)
    if not nvcc:
        return ["-DHSTU_CUDA=OFF"]
    archs = ";".join(_build.choose_archs())
    return ["-DHSTU_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DHSTU_ARCHS={archs}"]


def run_cmake():
    """Configure and build everything; returns the build directory."""
    if not sys.platform.startswith("linux"):
        raise _build.BuildError(f"hstu_ops builds on Linux only, and this is {sys.platform}.")
    cmake = _build.find_tool("cmake")
    if not cmake:
        raise _build.BuildError("cmake >= 3.22 is needed to build hstu_ops: run `pip install cmake`.")
    ninja = _build.find_tool("ninja")
    if not ninja and not shutil.which("make"):
        raise _build.BuildError("ninja or make is needed to build hstu_ops: run `pip install ninja`.")
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX", "").split(" ")[0], "c++", "g++", "clang++"]))):
        raise _build.BuildError("No C++ compiler was found: install g++ >= 11 or clang >= 14, or set CXX to one.")
    generator = "Ninja" if ninja else "Unix Makefiles"
    cuda = cuda_arguments()
    kind = "cpu" if cuda == ["-DHSTU_CUDA=OFF"] else "cuda"
    build_dir = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{kind}"
    build_dir.parent.mkdir(exist_ok=True)
    configure = [cmake, "-S", str(ROOT), "-B", str(build_dir), "-G", generator, "-DCMAKE_BUILD_TYPE=Release"]
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    configure += cuda + python_arguments() + shlex.split(os.environ.get("CMAKE_ARGS", ""))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    with open(build_dir.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two installs from one tree share the build directory
        drop_stale_cache(build_dir, generator)
        for command in (configure, [cmake, "--build", str(build_dir), "-j", jobs]):
            if subprocess.run(command).returncode != 0:
                raise _build.BuildError("hstu_ops was not built: the first error above says what is wrong.")
    return build_dir


class CMakeBuild(build_ext):
    """One CMake run gives both libraries; setuptools then puts each where its name says."""

    def run(self):
        try:
            super().run()
        except _build.BuildError as error:
            sys.exit(f"error: {error}")

    def get_ext_filename(self, fullname):
        if fullname.endswith(OPS.rpartition(".")[2]):  # loaded by torch, so without a Python ABI tag
            return os.path.join(*fullname.split(".")[:-1], OPS_FILE)
        return super().get_ext_filename(fullname)

    def build_extension(self, ext):
        if not hasattr(self, "build_dir"):
            self.build_dir = run_cmake()
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(self.build_dir / target.name, target)


class Wheel(bdist_wheel):
    """The ops library knows no Python: a wheel without hstu_ops._core serves every Python 3."""

    def finalize_options(self):
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self):
        return super().get_tag() if core_wanted() else ("py3", "none", super().get_tag()[2])


def sources():
    """Everything the build reads; as `depends` it also gets into the sdist."""
    found = [p for top in ("csrc", "cmake") for p in (ROOT / top).rglob("*") if p.is_file()]
    return ["CMakeLists.txt", *sorted(str(p.relative_to(ROOT)) for p in found)]


names = [OPS, CORE] if core_wanted() else [OPS]
setup(
    ext_modules=[Extension(name, sources=[], depends=sources()) for name in names],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
