"""The layer's kernels beside the copy rate, eager PyTorch and torch.compile: norms, SiLU with the split, norm and gate.

One line a case, pass and type: median time and spread, GB/s on the bytes that must be read and written, that rate in %
of a copy's, measured in the same run, and how many times as long eager PyTorch and torch.compile take. What a layer
keeps for its backward pass is measured by bench/memory.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import harness
import measure
import report
import torch
import torch.nn.functional as F
from problems import type_named
from torch import Tensor

from hstu_ops.pointwise import layer_norm, norm_gate, silu_split

TYPES = ("fp32", "fp16", "bf16")
COLUMNS = {"case": "<20", "dtype": "<5", "pass": "<4", "rows": ">7", "ms": ">9.4f", "+-%": ">5.1f", "GB/s": ">7.0f"}
COLUMNS |= {"%copy": ">6.1f", "eager": ">7.2f", "compile": ">7.2f"}
COMPILED = ("layer_norm affine", "silu_split", "norm_gate affine")  # the others take as long again to compile
U_ONLY = (True, False, False, False)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("pointwise", __doc__)
    p.add_argument("--rows", type=int, help="T (default 131072 on CUDA, 8192 on CPU)")
    p.add_argument("--dim", type=int, default=512, help="d: columns of u, v, q and k each (default 512)")
    p.add_argument("--heads", type=int, default=8, help="(default 8)")
    p.add_argument("--dtype", default="bf16", help=f"some of {', '.join(TYPES)} (default bf16)")
    p.add_argument("--cases", help="names, separated by commas (default: all)")
    p.add_argument("--providers", default="eager,compile", help="to compare with: eager, compile, none")
    return p.parse_args(argv)


@dataclass(frozen=True)
class Work:
    """What to call on its tensors, in hstu_ops and in eager PyTorch, and rows of d elements moved."""

    ours: Callable
    eager: Callable
    widths: tuple[int, ...]  # of the tensors, in d; 0: a weight
    forward: int  # rows of d read and written
    backward: int


def works(dim: int, heads: int) -> dict[str, Work]:
    sizes = [dim] * 4

    def jointly(a: Tensor, w: Tensor | None = None, b: Tensor | None = None) -> Tensor:
        return F.layer_norm(a, (dim,), w, b, 1e-6)

    def gate(**options: object) -> Callable:
        return lambda a, u, *affine: norm_gate(a, u, *affine, **options)

    return {
        "layer_norm": Work(layer_norm, jointly, (1,), 2, 3),
        "layer_norm affine": Work(layer_norm, jointly, (1, 0, 0), 2, 3),
        "silu_split": Work(lambda x: silu_split(x, sizes), lambda x: F.silu(x).split(sizes, dim=1), (4,), 8, 12),
        "silu_split u only": Work(
            lambda x: silu_split(x, sizes, U_ONLY),
            lambda x: [F.silu(x[:, :dim]), *x[:, dim:].split(sizes[1:], dim=1)],
            *((4,), 8, 9),
        ),
        "norm_gate": Work(gate(), lambda a, u: jointly(a) * u, (1, 1), 3, 5),
        "norm_gate affine": Work(gate(), lambda a, u, w, b: jointly(a, w, b) * u, (1, 1, 0, 0), 3, 5),
        "norm_gate per head": Work(
            gate(groups=heads),
            lambda a, u, w, b: F.group_norm(a, heads, w, b, 1e-6) * u,
            *((1, 1, 0, 0), 3, 5),
        ),
        "norm_gate dropout": Work(
            gate(dropout=0.2), lambda a, u, w, b: F.dropout(jointly(a, w, b) * u, 0.2), (1, 1, 0, 0), 3, 5
        ),
        "norm_gate concat": Work(
            gate(concat=True, dropout=0.2),
            lambda a, u, w, b: F.dropout(torch.cat([u, a, jointly(a, w, b) * u], dim=1), 0.2),
            *((1, 1, 0, 0), 5, 7),
        ),
    }


def call(
    function: Callable, work: Work, rows: int, dim: int, dtype: torch.dtype, direction: str, device: str, seed: int
) -> Callable[[], object]:
    """What is timed, with tensors of its own; weights are float32, for eager PyTorch of `dtype`, as it wants them."""
    generator = torch.Generator(device).manual_seed(seed)
    weights = torch.float32 if function is work.ours else dtype

    def draw(width: int) -> Tensor:
        shape = (rows, width * dim) if width else (dim,)
        x = torch.randn(shape, generator=generator, device=device, dtype=dtype if width else weights)
        return x.requires_grad_()

    tensors = [draw(x) for x in work.widths]
    if direction == "fwd":
        return torch.no_grad()(lambda: function(*tensors))
    out = function(*tensors)
    out = [out] if isinstance(out, Tensor) else list(out)
    # Gradients of several results are slices of one tensor, as the kernels that make them write them.
    width = sum(x.shape[1] for x in out)
    whole = torch.randn(rows, width, generator=generator, device=device, dtype=dtype)
    grads = list(whole.split([x.shape[1] for x in out], dim=1))
    return lambda: torch.autograd.grad(out, tensors, grads, retain_graph=True)


def run(args: argparse.Namespace) -> int:
    dtypes = args.dtype.split(",")
    if unknown := set(dtypes) - set(TYPES):
        raise ValueError(f"--dtype: expected some of {', '.join(TYPES)}, got {', '.join(sorted(unknown))}")
    found = works(args.dim, args.heads)
    names = args.cases.split(",") if args.cases else list(found)
    if unknown := set(names) - set(found):
        raise ValueError(f"--cases: expected some of {', '.join(found)}, got {', '.join(sorted(unknown))}")
    bench = common.Bench("pointwise", args, dtypes[0], COLUMNS)
    cuda = bench.device == "cuda"
    rows = args.rows or ((16384 if args.quick else 131072) if cuda else (1024 if args.quick else 8192))
    providers = [] if args.providers == "none" else args.providers.split(",")
    if args.quick and not cuda and "compile" in providers:
        providers.remove("compile")  # a C++ compiler at work for most of the two minutes
    bench.head(f"T {rows}, d {args.dim}, H {args.heads}; eager, compile: times as long as ours")

    def timed(function: Callable, work: Work, dtype: torch.dtype, direction: str, moved: int) -> harness.Timing:
        with measure.stream(bench.device):
            copies = harness.copies_past_l2(moved) if cuda else 1
            of = (work, rows, args.dim, dtype, direction, bench.device)
            calls = [call(function, *of, seed) for seed in range(copies)]
            return harness.time_cuda(calls, bench.budget) if cuda else harness.time_cpu(calls[0], bench.budget)

    def line(case: tuple[str, str, str]) -> None:
        work, dtype, direction = found[case[0]], type_named(case[1]), case[2]
        moved = rows * args.dim * dtype.itemsize * (work.forward if direction == "fwd" else work.backward)
        ours = timed(work.ours, work, dtype, direction, moved)
        others: dict[str, float | None] = {"eager": None, "compile": None}
        if "eager" in providers:
            others["eager"] = timed(work.eager, work, dtype, direction, moved).median / ours.median
        if "compile" in providers and case[0] in COMPILED:
            torch._dynamo.reset()
            compiled = torch.compile(work.eager)
            others["compile"] = timed(compiled, work, dtype, direction, moved).median / ours.median
        rate = moved / ours.median
        row = {"case": case[0], "dtype": case[1], "pass": direction, "rows": rows, "dim": args.dim}
        row |= {"heads": args.heads, "GB/s": rate / 1e9, "%copy": 100 * rate / bench.peaks.copy, **others}
        bench.add(row, ours)

    cases = [(x, dtype, direction) for dtype in dtypes for x in names for direction in ("fwd", "bwd")]
    bench.each(cases, " ".join, line)
    return bench.finish(("case", "pass", "rows", "dim", "heads"), draw)


def draw(pyplot, bench: common.Bench, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 1.6 + 0.3 * len(bench.rows)))
    labels = [f"{x['case']} {x['dtype']} {x['pass']}" for x in bench.rows]
    axis.barh(labels, [x["GB/s"] for x in bench.rows], color=[f"C{x['pass'] == 'bwd':d}" for x in bench.rows])
    axis.axvline(bench.peaks.copy / 1e9, color="grey", linestyle=":")
    axis.invert_yaxis()
    axis.set_xlabel("GB/s on bytes that must be moved (dotted: a copy)")
    report.finish_figure(pyplot, figure, bench.env, path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    return common.main("pointwise", run, args)


if __name__ == "__main__":
    sys.exit(main())
