"""Runs all benches, one after another: attention, bias, host, pointwise, layer, encoder, memory.

Results go to bench/results/<machine>/: a CSV file and a plot of each. Other options are those of each bench; here only
what all of them take.

Every row names the commit, with "+dirty" where files differ from it. On a copy of a tree git does not know it; say it:
HSTU_OPS_COMMIT=0123456789ab python bench/run.py
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Sequence
from pathlib import Path

NAMES = ("attention", "bias", "host", "pointwise", "layer", "encoder", "memory")
HERE = Path(__file__).resolve().parent


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        "bench/run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where kernels and a GPU are there")
    p.add_argument("--quick", action="store_true", help="under 2 minutes in all; writes no files without --out")
    p.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    p.add_argument("--out", help="folder of the results (default bench/results; '-': none)")
    args = p.parse_args(argv)
    args.only = args.only.split(",")
    if unknown := set(args.only) - set(NAMES):
        p.error(f"--only: expected some of {', '.join(NAMES)}, got {', '.join(sorted(unknown))}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    passed_on = [f"--device={args.device}"] if args.device else []
    passed_on += ["--quick"] if args.quick else []
    passed_on += [f"--out={args.out}"] if args.out else []
    statuses, seconds = {}, {}
    for name in (x for x in NAMES if x in args.only):
        print(f"\n==== {name} " + "=" * (90 - len(name)), flush=True)
        began = time.monotonic()
        try:
            statuses[name] = importlib.import_module(name).main(passed_on)
        except (Exception, SystemExit) as error:  # the others still run
            print(f"bench/{name}.py: {type(error).__name__}: {error}", file=sys.stderr)
            statuses[name] = 1
        seconds[name] = time.monotonic() - began
    print(
        "\n" + ", ".join(f"{x}: {'failed' if status else 'done'}, {seconds[x]:.0f} s" for x, status in statuses.items())
    )
    return max(statuses.values(), default=0)


if __name__ == "__main__":
    sys.exit(main())
