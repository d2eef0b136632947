"""Which problems a run measures: the suite of a device, or what the options ask for."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from problems import BIASES, DIRECTIONS, Case, Problem, cases, dense, jagged, label, mean_length, type_name, type_named

SHAPE_OPTIONS = ("lengths", "dims", "heads", "tokens", "batch", "bias", "jagged", "targets", "window")


@dataclass(frozen=True)
class Entry:
    """A problem, the passes to time, and whether the other providers are timed beside ours."""

    problem: Problem
    directions: tuple[str, ...]
    compare: bool = True


def choose(args: argparse.Namespace, device: str) -> list[Entry]:
    """ValueError where an option does not fit."""
    one_of("direction", args.direction or (), DIRECTIONS)
    one_of("bias", args.bias or (), BIASES)
    one_of("dtype", args.dtype or (), ("fp64", "fp32", "fp16", "bf16"))
    if args.cases:
        entries = named(args, device)
    elif any(getattr(args, x) for x in SHAPE_OPTIONS):
        entries = shaped(args, device)
    elif device == "cuda":
        entries = cuda_suite(args.quick, types(args, device))
    else:
        entries = cpu_suite(args.quick, types(args, device))
    if args.providers:  # asked for by name: beside every case
        entries = [replace(x, compare=True) for x in entries]
    if args.direction:
        entries = [replace(x, directions=tuple(args.direction)) for x in entries]
    return entries


def one_of(name: str, got: list[str], expected: tuple[str, ...]) -> None:
    for x in got:
        if x not in expected:
            raise ValueError(f"--{name}: expected some of {', '.join(expected)}, got {x}")


def types(args: argparse.Namespace, device: str) -> list:
    return [type_named(x) for x in args.dtype or (["bf16"] if device == "cuda" else ["fp32", "bf16"])]


def named(args: argparse.Namespace, device: str) -> list[Entry]:
    lists = {"SMALL": cases.SMALL, "CORNER": cases.CORNER, "REAL": cases.REAL}
    by_name = {x.name: [x] for y in lists.values() for x in y} | lists
    for x in args.cases:
        if x not in by_name:
            raise ValueError(f"--cases: expected names in python_tests/cases.py, got {x}")
    chosen = [case for x in args.cases for case in by_name[x]]
    return [Entry(Problem(case, dtype), ("fwd", "bwd")) for case in chosen for dtype in types(args, device)]


def shaped(args: argparse.Namespace, device: str) -> list[Entry]:
    biases = ["none", *(x for x in args.bias or () if x != "none")] if "none" in (args.bias or ["none"]) else args.bias
    lengths = args.lengths or ([512, 1024] if args.quick else [512, 1024, 2048, 4096])
    tokens = args.tokens or (4096 if device == "cpu" else 131072)
    if min(*lengths, *(args.dims or [64]), args.heads or 4, tokens, args.batch or 1) < 1:
        raise ValueError("lengths, dims, heads, tokens and batch: expected at least 1")
    entries = []
    for dim in args.dims or [64]:
        for length in lengths:
            batch = args.batch or max(1, round(tokens / (0.55 * length if args.jagged else length)))
            for bias in biases:
                make = jagged if args.jagged else dense
                options = {"targets": args.targets or 0, "max_attn_len": args.window or 0}
                case = make(length, batch, dim, heads=args.heads or 4, bias=bias, **options)
                plain = make(length, batch, dim, heads=args.heads or 4, **options)
                for dtype in types(args, device):
                    against = (("no bias", label(plain, dtype)),) if case != plain and "none" in biases else ()
                    entries.append(Entry(Problem(case, dtype, against), ("fwd", "bwd")))
    return entries


def cpu_suite(quick: bool, dtypes: list) -> list[Entry]:
    """Dense at H 4, D 64, 4096 rows; then the jagged batch whose mean length is a quarter of its maximum."""
    real = {x.name: x for x in cases.REAL}
    entries = []
    for length in (512, 1024) if quick else (512, 1024, 2048, 4096):
        plain = real[f"dense-{length}"]
        for case in (plain, replace(plain, name=f"{plain.name}-bias", bias="position+time")):
            for dtype in dtypes:
                against = (("no bias", label(plain, dtype)),) if case != plain else ()
                against += ((type_name(dtypes[0]), label(case, dtypes[0])),) if dtype != dtypes[0] else ()
                entries.append(Entry(Problem(case, dtype, against), ("fwd", "bwd"), compare=False))
    for name in ("quarter", "quarter-bias"):
        case = _tenth(real[name]) if quick else real[name]
        entries.append(Entry(Problem(case, dtypes[0]), ("fwd+bwd",)))
    return entries


def _tenth(case: Case) -> Case:
    shorter = tuple(x // 10 for x in case.lengths)
    return replace(case, name=f"{case.name}/10", lengths=shorter, max_seq_len=case.max_seq_len // 10)


def cuda_suite(quick: bool, dtypes: list) -> list[Entry]:
    """128k rows of 4 heads (N 1024: 32 sequences), jagged beside dense of the mean length, masks beside causal, few
    queries against cached keys. Bias: bench/bias.py.
    """
    both = ("fwd", "bwd")
    shapes = [(1024, 8)] if quick else [(1024, 32), (4096, 32), (8192, 16)]
    entries = []
    for dtype in dtypes:
        for dim in (64,) if quick else (64, 128, 256):
            for length, batch in shapes:
                entries.append(Entry(Problem(dense(length, batch, dim), dtype), both))
        for dim in (64,) if quick else (64, 128, 256):
            for length, batch in [(1024, 16)] if quick else [(1024, 256), (4096, 58)][: 2 if dim < 256 else 1]:
                uneven = jagged(length, batch, dim)
                even = dense(mean_length(uneven), batch, dim)
                entries.append(Entry(Problem(even, dtype), both))
                entries.append(Entry(Problem(uneven, dtype, (("dense, mean length", label(even, dtype)),)), both))
        short = [] if quick else [dense(128, 16, 64), dense(256, 512, 64), dense(512, 256, 64)]
        entries += [Entry(Problem(x, dtype), both) for x in short]
        if not quick:
            entries += [Entry(Problem(jagged(1024, 256, dim, targets=20), dtype), both) for dim in (64, 128, 256)]
            entries += [x for dim in (64, 128) for x in _masks(dim, dtype)]
            entries.append(Entry(Problem(dense(16384, 8, 128, queries=(128,) * 8), dtype), both))
    return entries


def _masks(dim: int, dtype: torch.dtype) -> list[Entry]:
    """Beside the causal mask: a window, contextual rows, a window with a prefix that all rows see (semi-local)."""
    against = (("causal", label(dense(8192, 16, dim), dtype)),)
    options = ({"max_attn_len": 512}, {"contextual_seq_len": 64}, {"max_attn_len": 512, "global_prefix_len": 64})
    return [Entry(Problem(dense(8192, 16, dim, **x), dtype, against), ("fwd", "bwd"), compare=False) for x in options]
