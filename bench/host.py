"""Host time of a call: what the CPU spends on one before it can prepare the next. On a GPU that is all that a short
kernel costs; the queue is never full here, so that no call waits for the device.

Forward without and with gradients, with a window, with relative bias; backward as one node of a larger backward().
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import common
import harness
import problems
import report
import torch

from hstu_ops import hstu_attention

COLUMNS = {"call": "<34", "us": ">8.2f", "+-%": ">6.1f", "min us": ">8.2f"}
NODES = 40  # calls in one backward()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("host", __doc__)
    p.add_argument("--length", type=int, help="N (default 128 on CUDA, 1 on CPU)")
    p.add_argument("--batch", type=int, help="sequences (default 16 on CUDA, 1 on CPU)")
    return p.parse_args(argv)


def calls(case: problems.Case, bench: common.Bench) -> dict[str, tuple[Callable[[], object], int]]:
    """Callables by name, and how many calls each makes."""
    x = problems.draw(case, bench.dtype, bench.device)
    biased = problems.draw(problems.replace(case, bias="position+time"), bench.dtype, bench.device)
    leaves = [
        tuple(torch.randn_like(y, requires_grad=True) for y in (x.q, x.k, x.v)) for _ in range(NODES)
    ]  # of their own, or the sums of gradients would count
    outs = [hstu_attention(*y, x.seq_offsets, x.max_seq_len) for y in leaves]
    grads = [torch.randn_like(y) for y in outs]
    everything = [y for one in leaves for y in one]
    no_grad = torch.no_grad()
    forward = lambda **options: lambda: hstu_attention(x.q, x.k, x.v, x.seq_offsets, x.max_seq_len, **options)  # noqa: E731
    found = {
        "forward": (no_grad(forward()), 1),
        "forward, window": (no_grad(forward(max_attn_len=32)), 1),
        "forward, position and time bias": (no_grad(lambda: biased.call(hstu_attention)), 1),
        "forward, recorded": (forward(), 1),
        "backward": (lambda: torch.autograd.grad(outs, everything, grads, retain_graph=True), NODES),
    }
    if bench.device == "cuda":
        offsets, longest = x.seq_offsets.int(), x.max_seq_len
        flash = torch.ops.aten._flash_attention_forward
        args = (x.q, x.k, x.v, offsets, offsets, longest, longest, 0.0, True, False)
        found["FlashAttention2's op, forward"] = (no_grad(lambda: flash(*args)), 1)
    return found


def run(args: argparse.Namespace) -> int:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    bench = common.Bench("host", args, "bf16" if cuda else "fp32", COLUMNS)
    cuda = bench.device == "cuda"
    case = problems.dense(args.length or (128 if cuda else 1), args.batch or (16 if cuda else 1), 64 if cuda else 8)
    bench.head(f"{case.name}, {case.heads} heads" + ("" if cuda else "; with the time of the (tiny) problem itself"))

    def measure(item: tuple[str, tuple[Callable[[], object], int]]) -> None:
        name, (call, count) = item
        timing = bench.step(lambda: harness.time_host(call, count, bench.budget, bench.device))()
        row = {"call": name, "case": case.name, "us": timing.median * 1e6, "min us": timing.minimum * 1e6}
        bench.add(row, timing)

    bench.each(list(calls(case, bench).items()), lambda x: x[0], measure)
    return bench.finish(("call", "case"), draw)


def draw(pyplot, bench: common.Bench, path: Path) -> None:
    figure, axis = pyplot.subplots(figsize=(9, 1.6 + 0.4 * len(bench.rows)))
    axis.barh([x["call"] for x in bench.rows], [x["us"] for x in bench.rows])
    axis.invert_yaxis()
    axis.set_xlabel("host time of a call, us")
    report.finish_figure(pyplot, figure, bench.env, path)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)

    return common.main("host", run, args)


if __name__ == "__main__":
    sys.exit(main())
