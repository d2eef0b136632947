"""One HSTU layer, forward and backward, by length: 32 sequences, 4 heads of 256, 1024 wide.

Its FLOPs are those of the two projections and of attention on the (row, column) pairs that the mask keeps, backward
twice and 2.5 times those of forward. Beside it stand the published rates of the best fused layer on an H100.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import common
import problems
import torch

import hstu_ops

PUBLISHED = {1024: 302, 2048: 353, 4096: 413, 8192: 477}  # TFLOP/s, forward + backward, on one H100
COLUMNS = {"layer": "<16", "pass": "<7", "N": ">5", "batch": ">5", "ms": ">9.3f", "+-%": ">5.1f", "TFLOP/s": ">8.4g"}
COLUMNS |= {"%mm": ">6.1f", "MiB": ">7", "published": ">9"}
VARIANTS = ("research", "production", "research + bias", "recompute")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("layer", __doc__)
    p.add_argument("--lengths", type=common.numbers, help="N (default 1024,2048,4096,8192 on CUDA, 128,256,512 on CPU)")
    p.add_argument("--batch", type=int, help="sequences (default 32 on CUDA, 4 on CPU)")
    p.add_argument("--width", type=int, help="of the rows (default 1024 on CUDA, 256 on CPU)")
    p.add_argument("--heads", type=int, default=4, help="(default 4); their dimension is width / heads")
    p.add_argument("--variants", default="research,production,recompute", help=f"of {', '.join(VARIANTS)}")
    p.add_argument("--dtype", choices=("fp32", "bf16"), help="(default bf16 on CUDA, fp32 on CPU)")
    return p.parse_args(argv)


@dataclass(frozen=True)
class Case:
    variant: str
    direction: str
    length: int

    @property
    def label(self) -> str:
        return f"{self.variant} N {self.length} {self.direction}"


def build(variant: str, length: int, args: argparse.Namespace, bench: common.Bench):
    options = {"alpha": 1.0} if variant != "production" else {"silu": (True, False, False, False), "output_bias": False}
    if variant == "production":
        options |= {"norm_affine": True, "concat": True, "uvqk_bias": True}
    if variant == "research + bias":
        buckets = hstu_ops.TimeBuckets.log()
        options["relative_bias"] = hstu_ops.RelativeAttentionBias(length, buckets, device=bench.device)
    if variant == "recompute":
        options["recompute"] = ("norm", "silu")
    return hstu_ops.HSTULayer(
        args.width, args.heads, max_seq_len=length, device=bench.device, dtype=bench.dtype, **options
    )


def step(case: Case, args: argparse.Namespace, bench) -> tuple[Callable[[], object], int]:
    """The call, and the FLOPs of it."""
    layer = build(case.variant, case.length, args, bench)
    rows = args.batch * case.length
    x = torch.randn(rows, args.width, device=bench.device, dtype=bench.dtype, requires_grad=True)
    offsets = problems.cumulative(torch.full((args.batch,), case.length, device=bench.device))
    options = {}
    if layer.relative_bias is not None:
        times = problems.timestamps_of(rows + 1, bench.device)
        options = {"timestamps": times[:-1].clone(), "query_timestamps": times[1:].clone()}
    weights = layer.uvqk.weight.numel() + layer.output.weight.numel()
    pairs = args.batch * case.length * (case.length + 1) // 2
    attention = 2 * pairs * args.heads * (layer.dim_qk + layer.dim_v)
    both = case.direction == "fwd+bwd"
    flops = 2 * rows * weights * (3 if both else 1) + int(attention * (3.5 if both else 1))
    if not both:
        return torch.no_grad()(lambda: layer(x, offsets, **options)), flops
    leaves, grad_out = [x, *layer.parameters()], torch.randn_like(x)
    return lambda: torch.autograd.grad(layer(x, offsets, **options), leaves, grad_out), flops


def run(args: argparse.Namespace) -> int:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    bench = common.Bench("layer", args, args.dtype or ("bf16" if cuda else "fp32"), COLUMNS)
    cuda = bench.device == "cuda"
    args.batch = args.batch or ((8 if args.quick else 32) if cuda else 4)
    args.width = args.width or (1024 if cuda else 256)
    lengths = [1024, 2048, 4096, 8192] if cuda else [128, 256, 512]
    lengths = args.lengths or (lengths[:2] if args.quick else lengths)
    variants = args.variants.split(",")
    if unknown := set(variants) - set(VARIANTS):
        raise ValueError(f"--variants: expected some of {', '.join(VARIANTS)}, got {', '.join(sorted(unknown))}")
    cases = [
        Case(v, direction, n)
        for n in lengths
        for v in variants
        for direction in (("fwd", "fwd+bwd") if v == variants[0] else ("fwd+bwd",))
    ]
    bench.head(f"{args.batch} sequences, width {args.width}, {args.heads} heads of {args.width // args.heads}")
    comparable = args.batch == 32 and args.width == 1024 and args.heads == 4

    def measure(case: Case) -> None:
        call, flops = step(case, args, bench)
        timing, peak = bench.time(call)
        row = {
            "layer": case.variant,
            "pass": case.direction,
            "N": case.length,
            "batch": args.batch,
            "width": args.width,
            "heads": args.heads,
            "TFLOP/s": flops / timing.median / 1e12,
            "%mm": 100 * flops / timing.median / bench.peaks.of(bench.dtype),
            "MiB": None if peak is None else round(peak / 2**20),
            "published": PUBLISHED.get(case.length) if comparable and case.direction == "fwd+bwd" else None,
        }
        bench.add(row, timing)

    bench.each(cases, lambda x: x.label, measure)
    return bench.finish(("layer", "pass", "N", "batch", "width", "heads"), draw)


def draw(pyplot, bench: common.Bench, path: Path) -> None:
    lines: dict[str, dict] = {}
    for row in bench.rows:
        labelled = lines.setdefault(f"TFLOP/s, {row['pass']}", {})
        labelled.setdefault(row["layer"], []).append((row["N"], row["TFLOP/s"]))
        if row["published"]:
            labelled.setdefault("published, H100", []).append((row["N"], row["published"]))
    common.panels(pyplot, bench, path, {x: {a: sorted(set(b)) for a, b in y.items()} for x, y in lines.items()}, "N")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    return common.main("layer", run, args)


if __name__ == "__main__":
    sys.exit(main())
