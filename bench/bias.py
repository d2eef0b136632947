"""What relative bias costs attention: position, time, both, both with the 2048 buckets of production models, and the
dense bias of other libraries, beside none.

The table is that of bench/attention.py; its last lines hold the rate with each bias against the rate without.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence

import attention
import common
import measure
import torch
from cases import Case
from problems import Problem, dense, jagged, label
from suites import Entry

KINDS = ("position", "time", "relative", "sqrt")
DENSE_UP_TO = 2048  # rows: a dense bias of 4 heads is then 64 MiB in float32


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("bias", __doc__)
    p.add_argument("--lengths", type=common.numbers, help="N (default 1024,4096,8192 on CUDA, 512,1024 on CPU)")
    p.add_argument("--dims", type=common.numbers, help="head dimensions (default 64,128,256 on CUDA, 64 on CPU)")
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
    for dim in args.dims or ([64, 128, 256] if cuda and not args.quick else [64]):
        for n in lengths:
            make = functools.partial(dense, n, max(1, tokens // n), dim, heads=args.heads)
            entries += _beside_none(make, (*KINDS, *(("dense",) if n <= DENSE_UP_TO else ())), dtype, cuda)
        if cuda and not args.quick and not args.lengths:
            for targets in (0, 20):  # which share one position
                make = functools.partial(jagged, 1024, 256, dim, heads=args.heads, targets=targets)
                entries += _beside_none(make, ("relative", "sqrt"), dtype, cuda)
    return entries


def _beside_none(make: Callable[..., Case], kinds: Sequence[str], dtype: torch.dtype, cuda: bool) -> list[Entry]:
    """Without bias and with each kind; deterministic, as all is on CPU, without and with relative bias."""
    plain, entries = make(), []
    for kind in ("none", *kinds):
        against = () if kind == "none" else (("no bias", label(plain, dtype)),)
        directions = ("fwd", "bwd", *(("det",) if cuda and kind in ("none", "relative") else ()))
        entries.append(Entry(Problem(make(bias=kind), dtype, against), directions, compare=False))
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
