"""What a run prints and leaves behind: the machine, one line a measurement, the CSV file and its plot."""

from __future__ import annotations

import csv
import datetime
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from harness import first_line

import hstu_ops

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    date: str
    commit: str  # of the tree, with "+dirty" where files differ from it, and of the library where it is another
    hstu_ops: str
    torch: str
    device: str
    isa: str  # of a CPU, or the compute capability
    driver: str  # of a GPU, or the kernel of the system
    clocks: str  # while the device works
    threads: int


@dataclass(frozen=True)
class Row:
    """One measurement, as it stands in the CSV file. Rates in 1e9 a second, on kept pairs; fractions of 1."""

    provider: str
    case: str
    dtype: str
    direction: str
    bias: str
    heads: int
    dim_qk: int
    dim_v: int
    batch: int
    max_seq_len: int
    tokens: int
    kept_pairs: int
    method: str
    runs: int
    median_ms: float
    spread: float
    min_ms: float
    gflops: float
    of_mm: float
    of_roofline: float
    gbytes: float
    mm_gflops: float
    copy_gbytes: float
    peak_mib: float | None = None
    note: str = ""


MACHINE = ("device", "isa", "threads")
KEY = (*MACHINE, "provider", "case", "dtype", "direction")  # a newer row with the same replaces it


def environment(device: str) -> Environment:
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        name, isa, driver = properties.name, f"sm_{properties.major}{properties.minor}", _nvidia_driver()
    else:
        name, isa, driver = _processor(), hstu_ops.build_info().get("cpu_isa", "unknown"), platform.release()
    return Environment(
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        commit=commit(),
        hstu_ops=hstu_ops.__version__,
        torch=torch.__version__,
        device=name,
        isa=isa,
        driver=driver,
        clocks=_gpu_clocks() if device == "cuda" else _cpu_clock(),
        threads=torch.get_num_threads(),
    )


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        name = re.search(r"model name\s*:\s*(.+)", text)
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()


def _nvidia_driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
        return re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)[1]
    except (OSError, TypeError):
        return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")[0] or "unknown"


def _gpu_clocks() -> str:
    """Clocks, power limit and what holds the clocks back, asked for while matrix products run."""
    a = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(a)
    for _ in range(400):  # about half a second, longer than the question takes
        torch.mm(a, a, out=out)
    asked = "clocks.sm,clocks.max.sm,clocks.mem,power.limit,clocks_event_reasons.active"
    answer = _output("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader,nounits", f"--id={_gpu_id()}")
    torch.cuda.synchronize()
    found = [x.strip() for x in answer.split(",")]
    if len(found) != 5:
        return "unknown"
    sm, most, memory, power, reasons = found
    return f"SM {sm} of {most} MHz, memory {memory} MHz, power limit {power} W, clock event reasons {reasons}"


def _gpu_id() -> str:
    return f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"


def _cpu_clock() -> str:
    try:
        found = re.findall(r"cpu MHz\s*:\s*([\d.]+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = []
    return f"{max(map(float, found)):.0f} MHz" if found else "unknown"


def commit() -> str:
    """What was measured: HSTU_OPS_COMMIT of the environment (for a copy of a tree, where git knows nothing or something
    else), else the commit of the git work tree whose root this is, else that of the built library.

    Where the library was built from another commit than that, or from changed files, its own is added.
    """
    tree = os.environ.get("HSTU_OPS_COMMIT") or _tree_commit()
    library = hstu_ops.build_info().get("commit", "unknown")
    if not tree or tree == "unknown":
        return library
    return tree if library in (tree, "unknown") else f"{tree} library {library}"


def _tree_commit() -> str:
    """cmake/commit.cmake asks git the same."""
    if Path(_output("git", "-C", str(ROOT), "rev-parse", "--show-toplevel") or "/").resolve() != ROOT:
        return ""
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(ROOT), "status", "--porcelain", "--", ".", ":!bench/results")
    return head + ("+dirty" if head and changed else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def slug(env: Environment, device: str) -> str:
    """The name of the folder of a machine's results."""
    name = env.device if device == "cuda" else f"{env.device} {env.threads} threads {env.isa}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def head(env: Environment) -> list[str]:
    return [
        f"{env.device}, {env.isa}, driver or system {env.driver}, {env.threads} CPU threads, torch {env.torch}",
        f"hstu_ops {env.hstu_ops}, commit {env.commit}, {env.date}; {env.clocks}",
    ]


# ---- the table -------------------------------------------------------------------------------------------


def table_head(names: Sequence[str], width: int, device: str, many_own: bool) -> str:
    rate = "TFLOP/s" if device == "cuda" else "GFLOP/s"
    own = f"{'kernel':<9}" if many_own else ""
    times = "".join(f"{x[:12]:>13}" for x in names)
    head = f"{'case':<{width}} {'type':<5}{'pass':<8}{own}{'ms':>9}{'+-%':>6}{'min':>9}{rate:>9}{'%mm':>6}{'%roof':>6}"
    return f"{head}{'GB/s':>8}{'MiB':>8}{times}"


def table_line(row: Row, ratios: Sequence[str], width: int, device: str, many_own: bool) -> str:
    """Of one of our own measurements; `ratios`: how many times as long each other provider takes."""
    rate = row.gflops / (1e3 if device == "cuda" else 1)
    own = f"{row.provider:<9}" if many_own else ""
    peak = "-" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return (
        f"{row.case:<{width}} {row.dtype:<5}{row.direction:<8}{own}{row.median_ms:>9.3f}{100 * row.spread:>6.1f}"
        f"{row.min_ms:>9.3f}{rate:>9.1f}{100 * row.of_mm:>6.1f}{100 * row.of_roofline:>6.1f}{row.gbytes:>8.1f}{peak:>8}"
        + "".join(f"{x:>13}" for x in ratios)
    )


# ---- files -----------------------------------------------------------------------------------------------


def save(rows: Sequence[Row | dict], env: Environment, path: Path, key: Sequence[str] = KEY) -> int:
    """Writes the rows, with what they were measured on, into a CSV file beside those of earlier runs that they do not
    replace; returns how many stand.
    """
    cells = [{**asdict(env), **(x if isinstance(x, dict) else asdict(x))} for x in rows]
    columns = list(dict.fromkeys(name for line in cells for name in line))
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = {_key(x, key): x for x in load(path, columns)}
    for line in cells:
        line = {x: _cell(line.get(x)) for x in columns}
        lines[_key(line, key)] = line
    partial = path.with_suffix(".csv.part")
    with open(partial, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines.values())
    os.replace(partial, path)
    return len(lines)


def load(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, str]]:
    """The lines of a CSV file; none where it is not there or was written with other columns."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        return list(reader) if columns is None or reader.fieldnames == list(columns) else []


def _key(line: dict, key: Sequence[str]) -> tuple:
    return tuple(str(line[x]) for x in key)


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "" if value is None else str(value)


def draw_plot(draw: Callable, path: Path) -> str:
    """`draw(pyplot, path)` without a screen; returns the sentence that says what came of it."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    try:
        draw(pyplot, path)
    except Exception as error:
        return f"no plot: {first_line(error)}"
    return f"plot: {path}"


def plot(rows: Sequence[Row], env: Environment, path: Path, device: str) -> str:
    """Bars of FLOP/s, a panel a direction."""
    unit = (1e3, "TFLOP/s") if device == "cuda" else (1, "GFLOP/s")
    return draw_plot(lambda pyplot, path: _draw(pyplot, rows, env, path, *unit), path)


def _draw(pyplot, rows: Sequence[Row], env: Environment, path: Path, unit: float, unit_name: str) -> None:
    directions = list(dict.fromkeys(x.direction for x in rows))
    labels = list(dict.fromkeys(f"{x.case} {x.dtype}" for x in rows))
    providers = list(dict.fromkeys(x.provider for x in rows))
    size = (1 + 6 * len(directions), 1.5 + 0.28 * len(labels) * max(1, len(providers) / 2))
    figure, panels = pyplot.subplots(1, len(directions), figsize=size, sharey=True, squeeze=False)
    thick = 0.8 / len(providers)
    for panel, direction in zip(panels[0], directions, strict=True):
        for n, provider in enumerate(providers):
            here = [x for x in rows if x.direction == direction and x.provider == provider]
            at = [labels.index(f"{x.case} {x.dtype}") + (n - (len(providers) - 1) / 2) * thick for x in here]
            panel.barh(at, [x.gflops / unit for x in here], height=thick, label=provider, color=f"C{n}")
        for peak in {x.mm_gflops for x in rows}:
            panel.axvline(peak / unit, color="grey", linestyle=":", linewidth=1)
        panel.set_title(direction)
        panel.set_xlabel(f"{unit_name} on kept pairs (dotted: torch.mm)")
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].set_yticks(range(len(labels)), labels)
    panels[0][0].invert_yaxis()
    panels[0][0].margins(y=0.01)
    panels[0][-1].legend()
    finish_figure(pyplot, figure, env, path)


def finish_figure(pyplot, figure, env: Environment, path: Path) -> None:
    figure.suptitle(f"{env.device}, {env.isa}, torch {env.torch}, hstu_ops {env.hstu_ops} {env.commit}, {env.date}")
    figure.set_layout_engine("constrained")  # leaves room for that title
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
