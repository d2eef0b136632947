"""Times builds of the library beside one another: bench/attention.py with each in turn, in processes of their own.

    python bench/compare.py before.so after.so -- --lengths 1024,4096 --dims 64 --direction bwd

What follows `--` is for bench/attention.py. Processes differ by a few per cent, so that each build has several.
"""

from __future__ import annotations

import argparse
import csv
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
KEY = ("provider", "case", "dtype", "direction")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "bench/compare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("libraries", nargs="+", type=Path, help="libhstu_ops.so of each build; the first is compared with")
    p.add_argument("--rounds", type=int, default=3, help="processes of each (default 3)")
    at = argv.index("--") if "--" in argv else len(argv)
    args = p.parse_args(argv[:at])
    args.passed_on = argv[at + 1 :]
    for x in args.libraries:
        if not x.is_file():
            p.error(f"libraries: expected files, got {x}")
    if args.rounds < 1:
        p.error(f"--rounds: expected at least 1, got {args.rounds}")
    return args


def package(library: Path, folder: Path) -> Path:
    """This tree's Python with that library."""
    ignored = shutil.ignore_patterns("libhstu_ops.so", "__pycache__")
    shutil.copytree(HERE.parent / "hstu_ops", folder / "hstu_ops", ignore=ignored)
    shutil.copy(library, folder / "hstu_ops" / "libhstu_ops.so")
    return folder


def measure(folder: Path, passed_on: Sequence[str]) -> dict[tuple[str, ...], float]:
    """Milliseconds of each case."""
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, str(HERE / "attention.py"), *passed_on, f"--out={out}"]
        done = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"bench/attention.py failed:\n{done.stdout}{done.stderr}")
        (table,) = Path(out).glob("*/attention.csv")
        with table.open(newline="") as file:
            return {tuple(row[x] for x in KEY): float(row["median_ms"]) for row in csv.DictReader(file)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(list(sys.argv[1:] if argv is None else argv))
    times: dict[tuple[str, ...], list[list[float]]] = defaultdict(lambda: [[] for _ in args.libraries])
    with tempfile.TemporaryDirectory() as scratch:
        folders = [package(x, Path(scratch, str(n))) for n, x in enumerate(args.libraries)]
        for _ in range(args.rounds):
            for n, folder in enumerate(folders):
                for key, ms in measure(folder, args.passed_on).items():
                    times[key][n].append(ms)
    print("ms: median of the processes (slowest over fastest), x: speed beside the first")
    for n, x in enumerate(args.libraries):
        print(f"  {n}: {x}")
    for key, builds in times.items():
        first = statistics.median(builds[0])
        cells = (f"{(m := statistics.median(b)):.4g} ({max(b) / min(b):.2f}) {first / m:.3f}x" for b in builds)
        print(f"{' '.join(key):60} " + "   ".join(cells))
    return 0


if __name__ == "__main__":
    sys.exit(main())
