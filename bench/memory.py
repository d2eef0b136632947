"""Activation memory of a layer: what is kept from the forward to the backward pass, in bytes a row and layer.

The paper counts 14 d bytes for HSTU and 33 d for a Transformer, d being the width, in bfloat16. Here it is measured:
the storages that the forward pass of a stack made and that are alive after it, the output of each layer included; on
CUDA also what the allocator holds more than before. The recompute options of `hstu_ops.HSTULayer` one by one, and with
each the time of a training step, which is their price.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import problems
import report
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import hstu_ops
from hstu_ops.baselines import Transformer

COLUMNS = {"model": "<46", "ms": ">9.3f", "+-%": ">5.1f", "bytes/row": ">9", "x d": ">6.1f", "allocated x d": ">13.1f"}
COLUMNS |= {"paper x d": ">9.0f", "peak MiB": ">8"}
OPTIONS = ((), ("norm",), ("norm", "silu"), ("norm", "silu", "attention"), ("projection", "silu"))
OPTIONS += (("projection", "silu", "attention"),)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("memory", __doc__)
    p.add_argument("--length", type=int, help="of the sequences (default 1024 on CUDA, 128 on CPU)")
    p.add_argument("--batch", type=int, help="sequences (default 64 on CUDA, 4 on CPU)")
    p.add_argument("--layers", type=int, default=4, help="(default 4)")
    p.add_argument("--width", type=int, help="d (default 512 on CUDA, 128 on CPU)")
    p.add_argument("--heads", type=int, default=8, help="(default 8)")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="(default bf16; x d is of bytes at that type)")
    return p.parse_args(argv)


@dataclass(frozen=True)
class Case:
    model: str  # "Transformer", "research" or "production"
    recompute: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return self.model + (f", recompute {' '.join(self.recompute)}" if self.recompute else "")


def build(case: Case, args: argparse.Namespace, bench: common.Bench):
    shape, options = (args.layers, args.width, args.heads), {"device": bench.device, "dtype": bench.dtype}
    if case.model == "Transformer":
        return Transformer(*shape, max_seq_len=args.length, hidden_dim=4 * args.width, **options)
    if case.model == "production":
        options |= {"silu": (True, False, False, False), "norm_affine": True, "concat": True, "uvqk_bias": True}
        options |= {"output_bias": False}
    return hstu_ops.HSTU(*shape, max_seq_len=args.length, recompute=case.recompute, **options)


def kept_bytes(forward) -> int:
    """Of the storages that `forward` makes and that live as long as its result."""
    made: dict[int, tuple[StorageWeakRef, int]] = {}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            before = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in before:
                    made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return out

    with Watch():
        result = forward()
    alive = sum(size for reference, size in made.values() if not reference.expired())
    del result
    return alive


def run(args: argparse.Namespace) -> int:
    bench = common.Bench("memory", args, args.dtype or "bf16", COLUMNS)
    cuda = bench.device == "cuda"
    args.length = args.length or (1024 if cuda else 128)
    args.batch = args.batch or ((16 if args.quick else 64) if cuda else 4)
    args.width = args.width or (512 if cuda else 128)
    rows, element = args.batch * args.length, torch.finfo(bench.dtype).bits // 16
    bench.head(f"{rows} rows, d {args.width}, {args.heads} heads, {args.layers} layers; x d: divided by d")
    cases = [Case("Transformer"), *(Case("research", x) for x in OPTIONS)]
    cases += [Case("production"), Case("production", ("norm",)), Case("production", ("projection",))]
    if args.quick and not cuda:
        cases = [x for x in cases if x.recompute in ((), ("norm", "silu"), ("projection", "silu"))]

    def measure(case: Case) -> None:
        encoder = build(case, args, bench)
        x = torch.randn(rows, args.width, device=bench.device, dtype=bench.dtype, requires_grad=True)
        offsets = problems.cumulative(torch.full((args.batch,), args.length, device=bench.device))
        leaves, grad_out = [x, *encoder.parameters()], torch.randn_like(x)
        timing, peak = bench.time(lambda: torch.autograd.grad(encoder(x, offsets), leaves, grad_out))
        each = rows * args.layers
        kept = bench.step(lambda: kept_bytes(lambda: encoder(x, offsets)))() / each
        allocated = bench.step(lambda: _allocated(lambda: encoder(x, offsets)))() / each if cuda else None
        paper = {"Transformer": 33.0, "research": 14.0}.get(case.model)
        row = {
            "model": case.label,
            "N": args.length,
            "batch": args.batch,
            "layers": args.layers,
            "width": args.width,
            "heads": args.heads,
            "bytes/row": round(kept),
            "x d": kept / args.width / element,
            "allocated x d": None if allocated is None else allocated / args.width / element,
            "paper x d": paper,
            "peak MiB": None if peak is None else round(peak / 2**20),
        }
        bench.add(row, timing)

    bench.each(cases, lambda x: x.label, measure)
    return bench.finish(("model", "N", "batch", "layers", "width", "heads"), draw)


def _allocated(forward) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    result = forward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated() - before
    del result
    return held


def draw(pyplot, bench: common.Bench, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 1.6 + 0.4 * len(bench.rows)))
    labels = [f"{x['model']} ({x['ms']:.3g} ms)" for x in bench.rows]
    axis.barh(labels, [x["x d"] for x in bench.rows], color=["C1" if "Tr" in x else "C0" for x in labels])
    for value, label in ((14, "paper, HSTU"), (33, "paper, Transformer")):
        axis.axvline(value, color="grey", linestyle=":")
        axis.text(value, -0.9, label, ha="center", fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("bytes a row and layer / d (time of a training step)")
    report.finish_figure(pyplot, figure, bench.env, path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    return common.main("memory", run, args)


if __name__ == "__main__":
    sys.exit(main())
