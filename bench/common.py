"""What the benches of modules share (layer.py, encoder.py, memory.py): options, the machine and its peaks, the timing
of a step, a table that grows line by line, and the files it becomes.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import harness
import measure
import peaks
import report
import torch
from harness import Call, Timing, say
from problems import type_name, type_named

import hstu_ops


def numbers(text: str) -> list[int]:
    return [int(x) for x in text.split(",") if x]


def parser(name: str, doc: str) -> argparse.ArgumentParser:
    """With the options that every bench has."""
    p = argparse.ArgumentParser(
        f"bench/{name}.py", description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where kernels and a GPU are there")
    p.add_argument("--quick", action="store_true", help="small cases, short times; writes no files without --out")
    p.add_argument("--time", type=float, help="seconds for one measurement (default 0.5 on CPU, 0.1 on CUDA)")
    p.add_argument("--threads", type=int, help="of the CPU (default: all this process may use)")
    p.add_argument("--out", type=Path, help="folder of the results, one folder a machine (default bench/results; '-')")
    return p


class Bench:
    """One run of a bench. `columns` of its table: names and formats; a row may hold more, for the CSV file alone."""

    def __init__(self, name: str, args: argparse.Namespace, dtype: str, columns: dict[str, str]) -> None:
        served = torch.cuda.is_available() and bool(hstu_ops.build_info().get("cuda_archs"))
        self.device = args.device or ("cuda" if served else "cpu")
        if self.device == "cuda" and not served:
            raise ValueError("--device cuda: no GPU, or a build of hstu_ops without CUDA kernels")
        torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
        self.name, self.quick, self.columns, self.dtype = name, args.quick, columns, type_named(dtype)
        self.budget = args.time or (0.1 if args.quick else 0.5 if self.device == "cpu" else 0.1)
        folder = args.out or (None if args.quick else report.ROOT / "bench" / "results")
        self.out = None if folder is None or str(folder) == "-" else folder
        self.rows: list[dict] = []
        self.failed = 0
        self.began = time.monotonic()
        self.env = report.environment(self.device)
        with measure.stream(self.device):
            measure.wake(self.device)
            self.peaks = peaks.measure(self.device, {self.dtype}, args.quick)
        for line in report.head(self.env):
            say(line)
        say(measure.peaks_line(self.peaks))

    def head(self, *lines: str) -> None:
        """What the table is about, and its heading."""
        names = (f"{name:{spec.split('.')[0]}}" for name, spec in self.columns.items())
        for line in (*lines, "", " ".join(names).rstrip()):
            say(line)

    def step(self, call: Call) -> Callable[[], object]:
        """`call` on the stream of all measurements."""

        def on_stream() -> object:
            with measure.stream(self.device):
                return call()

        return on_stream

    def time(self, call: Call) -> tuple[Timing, int | None]:
        """Time of a step, and the memory that it held at most beyond what was held before."""
        with measure.stream(self.device):
            if self.device == "cpu":
                timings: list[Timing] = []
                peak = harness.peak_memory(lambda: timings.append(harness.time_cpu(call, self.budget)), "cpu")
                return timings[0], peak
            call()
            peak = harness.peak_memory(call, "cuda")
            return harness.time_cuda([call], self.budget, graph="never"), peak

    def add(self, row: dict, timing: Timing | None = None) -> dict:
        """A line of the table and of the CSV file."""
        if timing is not None:
            timed = {"ms": timing.median * 1e3, "+-%": 100 * timing.spread, "min_ms": timing.minimum * 1e3}
            row |= {**timed, "runs": timing.runs, "method": timing.method}
        machine = {"mm_gflops": self.peaks.of(self.dtype) / 1e9, "copy_gbytes": self.peaks.copy / 1e9}
        self.rows.append({"dtype": type_name(self.dtype), **row, **machine})
        say(self._line(row))
        return self.rows[-1]

    def each(self, cases: Sequence, describe: Callable[[object], str], run: Callable[[object], None]) -> None:
        """`run` of each case, with a bar; one that fails loses its lines only."""
        for case in harness.progress(cases, describe):
            try:
                run(case)
            except Exception as error:
                self.failed += 1
                say(f"{describe(case)} failed: {harness.first_line(error)}")
            gc.collect()
            if self.device == "cuda":
                torch.cuda.empty_cache()

    def finish(self, key: Sequence[str], draw: Callable | None = None) -> int:
        """Writes the files (a newer row with the same `key` replaces an older one); returns how many cases failed."""
        if self.out and self.rows:
            path = self.out / report.slug(self.env, self.device) / f"{self.name}.csv"
            stand = report.save(self.rows, self.env, path, (*report.MACHINE, "dtype", *key))
            say(f"\nresults: {path} ({stand} rows)")
            if draw is not None:
                say(report.draw_plot(lambda pyplot, to: draw(pyplot, self, to), path.with_suffix(".png")))
        say(f"\n{time.monotonic() - self.began:.0f} s")
        return self.failed

    def _line(self, row: dict) -> str:
        cells = [(row.get(name), spec) for name, spec in self.columns.items()]
        return " ".join(f"{'-':{x.split('.')[0]}}" if v is None else f"{v:{x}}" for v, x in cells).rstrip()


def main(name: str, run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """The exit status: 0, 1 where a case failed, 2 with a line where an option does not fit."""
    try:
        return 1 if run(args) else 0
    except ValueError as error:
        print(f"bench/{name}.py: {error}", file=sys.stderr)
        return 2


def panels(pyplot, bench: Bench, path: Path, lines: dict[str, dict[str, list[tuple[float, float]]]], x: str) -> None:
    """A panel for each quantity, two in a row; in it a line for each label through its points."""
    across = min(2, len(lines))
    down = -(-len(lines) // across)
    figure, axes = pyplot.subplots(down, across, figsize=(6.5 * across, 4.2 * down), squeeze=False)
    labels = list(dict.fromkeys(label for labelled in lines.values() for label in labelled))
    for axis, (quantity, labelled) in zip(axes.flat, lines.items(), strict=False):
        for label, points in labelled.items():
            axis.plot(*zip(*sorted(points), strict=True), marker="o", label=label, color=f"C{labels.index(label)}")
        axis.set(xlabel=x, ylabel=quantity, xscale="log")
        ticks = sorted({a for points in labelled.values() for a, _ in points})
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    report.finish_figure(pyplot, figure, bench.env, path)
