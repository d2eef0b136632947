"""The build: an in-tree PEP 517 backend, and what setup.py asks it (which tools, CUDA or not, which architectures).

setuptools.build_meta does the work. What this adds: a build requirement is only asked for where the environment
being installed into lacks it, so `pip install .` downloads nothing it need not and works offline. torch is never a
build requirement, nor imported: the library is built against declarations of libtorch's stable C ABI
(csrc/torch/stable_abi.h) and the kind of an installed torch is read from its version.py.
"""

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

MINIMUM = {"setuptools": (70, 1), "cmake": (3, 22), "ninja": (1, 10), "pybind11": (2, 12)}
ARCHS = ("80", "86", "89", "90", "90a")


class BuildError(Exception):
    """A build that cannot go on; the message is one sentence that says what to do."""


# -------------------------------------------------------------------------------------------- what is installed


def target_site():
    """site-packages of the environment being installed into: pip keeps sys.prefix under build isolation.

    uv does not: there, packages of the target environment count as missing (and are fetched for the build).
    """
    dirs = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix != sys.base_prefix and _sees_base_site():
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        dirs.append(sysconfig.get_path("purelib", vars=base))
    return [d for d in dict.fromkeys(dirs) if os.path.isdir(d)]


def _sees_base_site():
    """Was this virtual environment made with --system-site-packages?"""
    try:
        text = Path(sys.prefix, "pyvenv.cfg").read_text()
    except OSError:
        return False
    return re.search(r"include-system-site-packages\s*=\s*true", text, re.IGNORECASE) is not None


def parse_version(text):
    """(major, minor) of "70.1.0" or "4.0.0-rc1"."""
    found = re.match(r"\D*(\d+)(?:\.(\d+))?", text)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def installed_version(name, path=None):
    """(major, minor) of a distribution on sys.path or in `path`; (0, 0) if it is not there."""
    where = {} if path is None else {"path": path}
    versions = [d.version for d in importlib.metadata.distributions(name=name, **where)]
    return max((parse_version(v) for v in versions if v), default=(0, 0))


def find_tool(name):
    """Path of a working executable that is new enough, or None.

    A pip-installed cmake is a Python script that cannot import its own package under build isolation, so the binary
    inside site-packages is tried too.
    """
    scripts = Path(sys.executable).parent
    candidates = [os.environ.get(f"{name.upper()}_EXECUTABLE"), shutil.which(name), scripts / name]
    candidates += [Path(d, name, "data", "bin", name) for d in target_site()]
    for exe in candidates:
        if not exe or not os.path.isfile(exe):
            continue
        try:
            out = subprocess.run([exe, "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if out.returncode == 0 and parse_version(out.stdout) >= MINIMUM[name]:
            return str(exe)
    return None


def find_pybind11():
    """Include directory of pybind11 (headers are all that is used), or None."""
    for d in [*sys.path, *target_site()]:
        include = os.path.join(d, "pybind11", "include")
        there = os.path.isfile(os.path.join(include, "pybind11", "pybind11.h"))
        if there and installed_version("pybind11", [d]) >= MINIMUM["pybind11"]:
            return include
    return None


def missing_requirements(compiling=True):
    """What pip must fetch before it calls the backend."""

    def requirement(name):
        return f"{name}>={'.'.join(map(str, MINIMUM[name]))}"

    need = []
    if max(installed_version("setuptools"), installed_version("setuptools", target_site())) < MINIMUM["setuptools"]:
        need.append(requirement("setuptools"))
    if compiling:
        if not find_tool("cmake"):
            need.append(requirement("cmake"))
        if not find_tool("ninja") and not shutil.which("make"):
            need.append(requirement("ninja"))
        if not find_pybind11():
            need.append(requirement("pybind11"))
    return need


# ---------------------------------------------------------------------------------------------- CUDA or not


def torch_cuda_version(site_dirs):
    """CUDA version the installed torch was built with ("13.0"), "" for a CPU build, None where there is no torch."""
    for d in site_dirs:
        try:
            text = Path(d, "torch", "version.py").read_text()
        except OSError:
            continue
        found = re.search(r"^cuda\b[^=]*=\s*['\"]([\d.]+)['\"]", text, re.MULTILINE)
        return found[1] if found else ""
    return None


def gpu_driver_present():
    """Is an NVIDIA driver loaded on this machine?"""
    return any(map(os.path.exists, ("/proc/driver/nvidia/version", "/dev/nvidiactl"))) or bool(
        shutil.which("nvidia-smi")
    )


def gpu_capabilities():
    """Compute capabilities of the GPUs present, such as {"9.0"}; empty where there is none."""
    try:
        out = subprocess.run(
            ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=60,
        )
    except (OSError, subprocess.TimeoutExpired):
        return set()
    return set(re.findall(r"^\d+\.\d+$", out.stdout, re.MULTILINE)) if out.returncode == 0 else set()


def find_nvcc(site_dirs):
    """CUDA_HOME, CUDA_PATH, PATH, /usr/local/cuda, then NVIDIA's nvcc wheel."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [os.path.join(h, "bin", "nvcc") for h in homes if h]
    candidates += [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for d in site_dirs:
        candidates += sorted(glob.glob(os.path.join(d, "nvidia", "cu*", "bin", "nvcc")), reverse=True)
    return next((c for c in candidates if c and os.path.isfile(c)), None)


def choose_nvcc(root, site_dirs):
    """(path of nvcc or None, why): whether CUDA kernels are built.

    Yes if nvcc is there and either torch is a CUDA build or a GPU driver is present; HSTU_CUDA=1 or 0 decides instead.
    """
    wish = os.environ.get("HSTU_CUDA", "").strip().upper()
    if wish in ("0", "OFF", "FALSE", "NO"):
        return None, "HSTU_CUDA=0"
    forced = wish in ("1", "ON", "TRUE", "YES")
    if wish and not forced and wish != "AUTO":
        raise BuildError(f"HSTU_CUDA={wish} is not understood; use 1, 0 or leave it unset.")
    sources = glob.glob(os.path.join(root, "csrc", "cuda", "**", "*.cu"), recursive=True)
    nvcc = find_nvcc(site_dirs)
    if forced and not sources:
        raise BuildError("HSTU_CUDA=1, but this source tree holds no CUDA kernels (csrc/cuda); unset HSTU_CUDA.")
    if forced and not nvcc:
        raise BuildError(
            "HSTU_CUDA=1, but no nvcc was found: install the CUDA toolkit and set CUDA_HOME to it, or unset HSTU_CUDA."
        )
    if not sources:
        return None, "csrc/cuda holds no kernels"
    if not nvcc:
        return None, "no nvcc found"
    if forced:
        return nvcc, "HSTU_CUDA=1"
    torch_cuda = torch_cuda_version(site_dirs)
    if torch_cuda:
        return nvcc, f"torch is built for CUDA {torch_cuda}"
    if gpu_driver_present():
        return nvcc, "a GPU driver is present"
    kind = "torch is a CPU build" if torch_cuda == "" else "torch is not visible to the build"
    return None, f"{kind} and no GPU driver is present; HSTU_CUDA=1 builds CUDA kernels all the same"


def choose_archs(wish=None):
    """The architectures to compile for, out of ARCHS; HSTU_ARCHS names them ("80;90a", "all" or "native").

    Unset: those of the GPUs present, all of them where there is none (so that a build machine's wheel runs anywhere).
    PTX of the highest plain one is always added, so newer GPUs than these run as well.
    """
    wish = os.environ.get("HSTU_ARCHS", "") if wish is None else wish
    words = [w for w in re.split(r"[;,\s]+", wish.strip().lower()) if w]
    if words == ["all"]:
        return list(ARCHS)
    if words in ([], ["native"]):
        capabilities = gpu_capabilities()
        if not capabilities and words:
            raise BuildError("HSTU_ARCHS=native, but nvidia-smi reports no GPU; name the architectures instead.")
        return _archs_of(capabilities) if capabilities else list(ARCHS)
    for word in words:
        if word not in ARCHS:
            raise BuildError(f"HSTU_ARCHS names {word!r}; choose from {', '.join(ARCHS)}, all or native.")
    chosen = set(words) | ({"90"} if "90a" in words else set())
    return [a for a in ARCHS if a in chosen]


def _archs_of(capabilities):
    """The architectures that serve these GPUs; a GPU newer than all of them runs the PTX of 90."""
    chosen = set()
    for text in capabilities:
        capability = tuple(map(int, text.split(".")))
        if capability < (8, 0):
            raise BuildError(f"This machine's GPU is compute capability {text}; hstu_ops needs 8.0: set HSTU_CUDA=0.")
        plain = [a for a in ARCHS if a.isdigit() and (int(a[:-1]), int(a[-1])) <= capability]
        chosen.add(plain[-1])
        if capability == (9, 0):
            chosen.add("90a")
    return [a for a in ARCHS if a in chosen]


# ------------------------------------------------------------------------------------- what pip, uv and build call


def _backend():
    if installed_version("setuptools") < MINIMUM["setuptools"]:
        sys.path += target_site()  # at the end: what the build environment has still comes first
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings=None):
    return missing_requirements()


def get_requires_for_build_editable(config_settings=None):
    return missing_requirements()


def get_requires_for_build_sdist(config_settings=None):
    return missing_requirements(compiling=False)


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    return _backend().prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    return _backend().prepare_metadata_for_build_editable(metadata_directory, config_settings)


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    return _backend().build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    return _backend().build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    return _backend().build_sdist(sdist_directory, config_settings)
