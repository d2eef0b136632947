"""The README's tables of figures, made from bench/results/: rewrites what stands between `<!-- figures: NAME -->` and
`<!-- end of figures -->`, so that every figure there can be found in a CSV file.

    python bench/readme.py            rewrites README.md
    python bench/readme.py --check    only says which blocks differ (a test does that too)
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
GPU, CPUS = "nvidia-h200", ("amd-epyc-2-threads-avx512", "amd-epyc-2-threads-avx2")
MISSING = "-"

Row = dict[str, str]


def rows(machine: str, bench: str) -> list[Row]:
    path = RESULTS / machine / f"{bench}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def find(lines: Sequence[Row], column: str, **wanted: object) -> float | None:
    """`column` of the row in which the other columns are as wanted."""
    for x in lines:
        if all(x.get(name) == str(value) for name, value in wanted.items()):
            return float(x[column]) if x.get(column) else None
    return None


def table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *(x for x in body if any(y != MISSING for y in x[1:]))]
    return "\n".join("| " + " | ".join(x) + " |" for x in lines)


def between(values: Sequence[float | None]) -> str:
    """In percent."""
    found = [round(100 * x) for x in values if x is not None]
    return f"{min(found)} to {max(found)} %" if found else MISSING


def ratio(a: float | None, b: float | None) -> str:
    return MISSING if a is None or b is None else f"{a / b:.2f}x"


# ---- blocks ------------------------------------------------------------------------------------------------


def cpu() -> str:
    lengths = (512, 1024, 2048, 4096)
    machines = [rows(x, "attention") for x in CPUS]

    def shares(lines: list[Row], bias: str, direction: str) -> str:
        cases = [f"dense-{n}{bias}" for n in lengths]
        found = [find(lines, "of_mm", provider="hstu_ops", case=x, dtype="fp32", direction=direction) for x in cases]
        text = between(found)
        return text + " of `torch.mm`" if lines is machines[0] and not bias and direction == "fwd" else text

    def faster(lines: list[Row], case: str) -> str:
        theirs, ours = (find(lines, "median_ms", provider=x, case=case) for x in ("padded", "hstu_ops"))
        return MISSING if theirs is None or ours is None else f"{theirs / ours:.0f}x"

    body = [
        ["forward, N 512 to 4096", *(shares(x, "", "fwd") for x in machines)],
        ["backward", *(shares(x, "", "bwd") for x in machines)],
        ["forward, position and time bias", *(shares(x, "-bias", "fwd") for x in machines)],
        ["backward, position and time bias", *(shares(x, "-bias", "bwd") for x in machines)],
        [
            "forward + backward, mean length a quarter of 2048, beside padded eager",
            *(faster(x, "quarter") for x in machines),
        ],
        ["the same with bias", *(faster(x, "quarter-bias") for x in machines)],
    ]
    return table(["CPU, 2 threads of an AMD EPYC, float32, D 64", "AVX-512", "AVX2"], body)


WAYS = (("forward", "fwd"), ("backward", "bwd"))


def rate(lines: list[Row], case: str, direction: str, provider: str = "hstu_ops") -> float | None:
    found = find(lines, "gflops", provider=provider, case=case, direction=direction)
    return None if found is None else found / 1e3


def cell(value: float | None, beside: str = "") -> str:
    return MISSING if value is None else f"{value:.0f}" + (f" ({beside})" if beside not in ("", MISSING) else "")


def attention() -> str:
    lines = rows(GPU, "attention")

    def beside(case: str, direction: str) -> str:
        ours = rate(lines, case, direction)
        return cell(ours, ratio(ours, rate(lines, case, direction, "FA2")))

    dense = ("N1024 B32", "N4096 B32", "N8192 B16")
    body = [
        [f"{way}, D {dim}", *(beside(f"{x} D{dim}", direction) for x in dense)]
        for dim in (64, 128, 256)
        for way, direction in WAYS
    ]
    first = table(
        [
            "NVIDIA H200, bfloat16, TFLOP/s (speed beside FlashAttention2)",
            "N 1024, B 32",
            "N 4096, B 32",
            "N 8192, B 16",
        ],
        body,
    )
    uneven = (("jagged N1024 B256", "N578 B256"), ("jagged N4096 B58", "N2370 B58"))

    def share(case: str, even: str, dim: int, direction: str) -> str:
        ours = rate(lines, f"{case} D{dim}", direction)
        return cell(ours, ratio(ours, rate(lines, f"{even} D{dim}", direction)))

    body = [
        [
            f"{way}, D {dim}",
            *(share(*x, dim, direction) for x in uneven),
            share("jagged N1024 B256 t20", "N578 B256", dim, direction),
        ]
        for dim in (64, 128)
        for way, direction in WAYS
    ]
    second = table(
        [
            "lengths 0.1 to 1 of N, TFLOP/s (beside equal lengths of the same mean)",
            "N 1024, B 256",
            "N 4096, B 58",
            "N 1024, 20 targets each",
        ],
        body,
    )
    shapes = (
        ("a window of 512", "w512"),
        ("64 contextual rows", "c64"),
        ("a window of 512, a prefix of 64", "w512 g64"),
    )
    body = [
        [f"{way}, D {dim}", *(share(f"N8192 B16 {x}", "N8192 B16", dim, direction) for _, x in shapes)]
        for dim in (64, 128)
        for way, direction in WAYS
    ]
    third = table(["N 8192, TFLOP/s on kept pairs (beside the causal mask)", *(x for x, _ in shapes)], body)
    return "\n\n".join([first, *(x for x in (second, third) if x.count("\n") > 1), beside_all(lines)])


def beside_all(lines: list[Row]) -> str:
    """What concerns all of the tables."""
    product = sorted({round(float(x["mm_gflops"]) / 1e3) for x in lines})
    portable = [x for x in lines if x["provider"] == "sm80"]
    speeds = sorted(
        rate([x], x["case"], x["direction"], "sm80") / theirs
        for x in portable
        if (theirs := rate(lines, x["case"], x["direction"], "FA2"))
    )
    return (
        "FlashAttention2 is the variable-length kernel inside torch, in the same process; it computes softmax "
        "attention of the same size. The kernels of every GPU (`HSTU_OPS_BACKEND=sm80`) reach "
        f"{speeds[0]:.2f} to {speeds[-1]:.2f}x its speed. A product of 8192 x 8192 matrices ran at "
        f"{' and '.join(map(str, product))} TFLOP/s beside; {where(lines)}."
    )


def where(lines: list[Row]) -> str:
    """What a block was measured on."""
    commits, versions = (sorted({x[name] for x in lines}) for name in ("commit", "torch"))
    return f"commit {' and '.join(commits)}, torch {' and '.join(versions)}"


def bias() -> str:
    lines = rows(GPU, "bias")

    def beside(case: str, direction: str, other: tuple[str, str]) -> str:
        ours = rate(lines, case, direction)
        return cell(ours, ratio(ours, rate(lines, *other)))

    kinds = (
        ("position and 128 time buckets", "relative", (64, 128, 256)),
        ("position and 2048 time buckets", "sqrt", (64, 128, 256)),
        ("dense [1, H, N, N]", "dense", (64, 128)),
    )
    shapes = {
        "N 1024, B 128": "N1024 B128",
        "N 4096, B 32": "N4096 B32",
        "N 8192, B 16": "N8192 B16",
        "0.1 to 1 of N 1024, B 256": "jagged N1024 B256",
        "20 targets each": "jagged N1024 B256 t20",
    }
    body = [
        [
            f"{way}, D {dim}, {name}",
            *(beside(f"{x} D{dim} {kind}", direction, (f"{x} D{dim}", direction)) for x in shapes.values()),
        ]
        for name, kind, dims in kinds
        for dim in dims
        for way, direction in WAYS
    ]
    first = table(["bias, TFLOP/s (beside none)", *shapes], body)
    body = [
        [
            f"D {dim}, {name}",
            *(beside(case, "det", (case, "bwd")) for case in (f"{x} D{dim}{kind}" for x in shapes.values())),
        ]
        for name, kind in (("no bias", ""), ("position and 128 time buckets", " relative"))
        for dim in (64, 128, 256)
    ]
    second = table(["deterministic backward, TFLOP/s (beside the default)", *shapes], body)
    return f"{first}\n\n{second}\n\n{where(lines).capitalize()}."


def layer() -> str:
    lines = rows(GPU, "layer")
    lengths = (1024, 2048, 4096, 8192)

    def figures(kind: str, column: str) -> list[str]:
        return [cell(find(lines, column, layer=kind, N=n, **{"pass": "fwd+bwd"})) for n in lengths]

    body = [
        ["hstu_ops, H200, research layer", *figures("research", "TFLOP/s")],
        ["hstu_ops, H200, production layer", *figures("production", "TFLOP/s")],
        ["best published for others, H100", *figures("research", "published")],
    ]
    head = "one layer, forward + backward, 32 sequences, width 1024, 4 heads of 256, TFLOP/s"
    return table([head, *(f"N {n}" for n in lengths)], body)


def encoder() -> str:
    lines = rows(GPU, "encoder")
    lengths = (1024, 2048, 4096, 8192)

    def times(model: str, task: str) -> list[str]:
        found = [find(lines, "x", model=model, N=n, **{"pass": task}) for n in lengths]
        return [MISSING if x is None else f"{x:.1f}" for x in found]

    body = [
        ["training, equal lengths", *times("HSTU", "training")],
        ["training, Stochastic Length, alpha 1.8", *times("HSTU, alpha 1.8", "training")],
        ["the same, alpha 1.6", *times("HSTU, alpha 1.6", "training")],
        ["training, equal lengths, position and time bias", *times("HSTU + bias", "training")],
        ["the same, alpha 1.6", *times("HSTU + bias, alpha 1.6", "training")],
        ["inference", *times("HSTU", "inference")],
        ["inference, position and time bias", *times("HSTU + bias", "inference")],
    ]
    return table(["times as fast as the Transformer, bfloat16", *(f"N {n}" for n in lengths)], body)


def host() -> str:
    lines = rows(GPU, "host")
    body = [[x["call"], f"{float(x['us']):.0f}"] for x in lines]
    return "" if not body else table(["host time of a call, eager mode, H200's machine", "us"], body)


BLOCKS: dict[str, Callable[[], str]] = {
    x.__name__: x for x in (cpu, attention, bias, layer, encoder, host)
}  # by the name in README.md

_BLOCK = re.compile(r"(<!-- figures: (\w+) -->\n)(.*?)(\n?<!-- end of figures -->)", re.DOTALL)


def rewritten(text: str) -> tuple[str, list[str]]:
    """README.md with its figures made anew, and the names of the blocks that differ."""
    differ = []

    def renew(found: re.Match) -> str:
        new = BLOCKS[found[2]]()
        if new != found[3]:
            differ.append(found[2])
        return found[1] + new + ("\n" if new else "") + found[4].lstrip("\n")

    return _BLOCK.sub(renew, text), differ


def main(argv: Sequence[str] | None = None) -> int:
    check = "--check" in (sys.argv[1:] if argv is None else argv)
    path = ROOT / "README.md"
    text, differ = rewritten(path.read_text())
    if not check:
        path.write_text(text)
    print(f"{'differ' if check else 'written'}: {', '.join(differ) or 'none'}")
    return 1 if check and differ else 0


if __name__ == "__main__":
    sys.exit(main())
