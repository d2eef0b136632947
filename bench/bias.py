"""What relative bias costs attention: position, time, both, both with the 2048 buckets of production models, and the
dense bias of other libraries, beside none.

The table is that of bench/attention.py; its last lines hold the rate with each bias against the rate without.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import attention
import common
import measure
import torch
from problems import Problem, dense, jagged, label
from suites import Entry

KINDS = ("position", "time", "relative", "sqrt")
DENSE_UP_TO = 2048  # rows: a dense bias of 4 heads is then 64 MiB in float32


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("bias", __doc__)
    p.add_argument("--lengths", type=common.numbers, help="N (default 1024,4096,8192 on CUDA, 512,1024 on CPU)")
    p.add_argument("--dims", type=common.numbers, help="head dimensions (default 64,128 on CUDA, 64 on CPU)")
    p.add_argument("--tokens", type=int, help="rows in all (default 131072 on CUDA, 4096 on CPU)")
    p.add_argument("--heads", type=int, default=4, help="(default 4)")
    args = p.parse_args(argv)
    return argparse.Namespace(**{**vars(attention.parse(["--backend=default"])), **vars(args)})


def choose(args: argparse.Namespace, device: str) -> list:
    cuda = device == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    lengths = args.lengths or (([1024] if args.quick else [1024, 4096, 8192]) if cuda else [512, 1024])
    tokens = args.tokens or (131072 if cuda else 4096)
    if min(*lengths, tokens, args.heads) < 1:
        raise ValueError("--lengths, --tokens, --heads: expected at least 1")
    entries = []
    for dim in args.dims or ([64, 128] if cuda and not args.quick else [64]):
        for n in lengths:
            plain = dense(n, max(1, tokens // n), dim, heads=args.heads)
            entries.append(Entry(Problem(plain, dtype), ("fwd", "bwd"), compare=False))
            for kind in (*KINDS, *(("dense",) if n <= DENSE_UP_TO else ())):
                case = dense(n, max(1, tokens // n), dim, heads=args.heads, bias=kind)
                problem = Problem(case, dtype, (("no bias", label(plain, dtype)),))
                entries.append(Entry(problem, ("fwd", "bwd"), compare=False))
        if cuda and not args.quick and not args.lengths:
            entries += _jagged(dim, args.heads, dtype)
    return entries


def _jagged(dim: int, heads: int, dtype: torch.dtype) -> list[Entry]:
    """Lengths 0.1 to 1 of 1024, without targets and with 20 each, which share one position."""
    entries = []
    for targets in (0, 20):
        plain = jagged(1024, 256, dim, heads=heads, targets=targets)
        problems = [Problem(plain, dtype)]
        for kind in ("relative", "sqrt"):
            biased = jagged(1024, 256, dim, heads=heads, targets=targets, bias=kind)
            problems.append(Problem(biased, dtype, (("no bias", label(plain, dtype)),)))
        entries += [Entry(x, ("fwd", "bwd"), compare=False) for x in problems]
    return entries


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    try:
        settings = measure.settings(args)
        entries = choose(args, settings.device)
    except ValueError as error:
        print(f"bench/bias.py: {error}", file=sys.stderr)
        return 2
    return 1 if measure.run(entries, settings, "bias") else 0


if __name__ == "__main__":
    sys.exit(main())
