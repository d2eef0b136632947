"""Speed of hstu_attention beside other ways to compute it. `python bench/attention.py --help` says how to ask.

Without options that choose cases, runs the suite of the device: every figure the project states about itself.

One line a case, pass and kernel of ours: median time and spread (distance between the quartiles), minimum, rate on the
(row, column) pairs that the mask keeps, that rate in % of torch.mm and of the roofline (torch.mm and copy rate measured
in the same run), bytes that must be moved by the time taken, memory held at most beyond the inputs, and for each other
provider how many times as long it takes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

EPILOG = """examples:
  python bench/attention.py                                     the CPU suite, or the CUDA suite where there is a GPU
  HSTU_OPS_ISA=avx2 python bench/attention.py --device cpu      the same with AVX2 (also: --device cpu --backend avx2)
  python bench/attention.py --lengths 256,2048 --dims 32,64 --bias none,relative --dtype fp32
  python bench/attention.py --lengths 2048 --jagged --targets 20 --window 256 --direction fwd+bwd
  python bench/attention.py --cases users,ml-1m,candidates      cases of python_tests/cases.py by name (or SMALL, REAL)
  python bench/attention.py --device cuda --backend default,sm80 --providers fa2
"""


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    names = lambda text: [x for x in text.split(",") if x]  # noqa: E731
    numbers = lambda text: [int(x) for x in names(text)]  # noqa: E731
    p = argparse.ArgumentParser(
        "bench/attention.py", description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where kernels and a GPU are there")
    p.add_argument(
        "--quick", action="store_true", help="a few small cases and short times; writes no files without --out"
    )
    cases = p.add_argument_group("cases (lists are separated by commas)")
    cases.add_argument("--cases", type=names, help="of python_tests/cases.py: names, or SMALL, CORNER, REAL")
    cases.add_argument("--lengths", type=numbers, help="lengths of sequences (of the longest with --jagged)")
    cases.add_argument("--dims", type=numbers, help="head dimensions (default 64)")
    cases.add_argument("--heads", type=int, help="(default 4)")
    cases.add_argument("--tokens", type=int, help="rows in all (default 4096 on CPU, 131072 on CUDA)")
    cases.add_argument("--batch", type=int, help="sequences, instead of --tokens")
    cases.add_argument("--bias", type=names, help="of none, position, time, relative (both), dense (default none)")
    cases.add_argument("--jagged", action="store_true", help="lengths uniform in 0.1..1 of --lengths")
    cases.add_argument("--targets", type=int, help="targets a sequence")
    cases.add_argument("--window", type=int, help="max_attn_len")
    p.add_argument("--dtype", type=names, help="of fp32, fp16, bf16, fp64 (default fp32,bf16 on CPU, bf16 on CUDA)")
    p.add_argument("--direction", type=names, help="of fwd, bwd, fwd+bwd, det (bwd in deterministic mode)")
    p.add_argument(
        "--backend", type=names, help="on CUDA of default, sm80, sm90, tf32; on CPU one instruction set: avx512, avx2"
    )
    p.add_argument(
        "--providers", type=names, help="of fa2, padded, meta, nvidia (default: all that fit; on CPU padded)"
    )
    p.add_argument(
        "--graph", choices=("auto", "always", "never"), default="auto", help="CUDA graphs (auto: short calls)"
    )
    p.add_argument("--time", type=float, help="seconds for one measurement (default 1 on CPU, 0.1 on CUDA)")
    p.add_argument("--threads", type=int, help="of the CPU (default: all this process may use)")
    p.add_argument("--out", type=Path, help="folder of the results, one folder a machine (default bench/results; '-')")
    return p.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    began = time.monotonic()
    if args.backend and args.device == "cpu" and args.backend != ["default"]:
        if len(args.backend) > 1:
            return fail("--backend: expected one instruction set on a CPU")
        os.environ["HSTU_OPS_ISA"] = args.backend[0]  # the library reads it once, at its first call
    import measure  # imports torch, so that --help is quick
    import suites

    try:
        settings = measure.settings(args)
        entries = suites.choose(args, settings.device)
    except ValueError as error:
        return fail(error)
    failed = measure.run(entries, settings)
    print(f"\n{time.monotonic() - began:.0f} s")
    return 1 if failed else 0


def fail(reason: object) -> int:
    print(f"bench/attention.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
