"""Host time of a call: what the CPU spends on one before it can prepare the next. On a GPU that is all that a short
kernel costs; the queue is never full here, so that no call waits for the device.

Forward without and with gradients, with a window, with relative bias; backward as one node of a larger backward(),
beside the op without autograd and a node that does nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import common
import harness
import problems
import report
import torch

from hstu_ops import hstu_attention

COLUMNS = {"call": "<38", "us": ">8.2f", "+-%": ">6.1f", "min us": ">8.2f"}
NODES = 40  # calls in one backward()


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    p = common.parser("host", __doc__)
    p.add_argument("--length", type=int, help="N (default 128 on CUDA, 1 on CPU)")
    p.add_argument("--batch", type=int, help="sequences (default 16 on CUDA, 1 on CPU)")
    return p.parse_args(argv)


class _Nothing(torch.autograd.Function):
    """What a node of Python costs by itself: three tensors saved, three gradients returned."""

    @staticmethod
    def forward(ctx, *tensors: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(*tensors)
        return tensors[0].detach()

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return ctx.saved_tensors


@dataclass(frozen=True)
class Case:
    name: str
    call: Callable[[], object]
    count: int = 1  # calls that `call` makes
    grad: bool = False


def cases(shape: problems.Case, bench: common.Bench) -> list[Case]:
    x = problems.draw(shape, bench.dtype, bench.device)
    biased = problems.draw(replace(shape, bias="position+time"), bench.dtype, bench.device)
    # Leaves of their own, or the sums of gradients would count.
    leaves = [[torch.randn_like(y, requires_grad=True) for y in (x.q, x.k, x.v)] for _ in range(NODES)]
    outs = [hstu_attention(*y, x.seq_offsets, x.max_seq_len) for y in leaves]
    grads = [torch.randn_like(y) for y in outs]
    nothings = [_Nothing.apply(*y) for y in leaves]
    backward_op = torch.ops.hstu_ops.attention_plain_bwd.default
    arguments = (grads[0], x.q, x.k, x.v, x.seq_offsets, x.max_seq_len, None, False, False)
    everything = [y for one in leaves for y in one]

    def forward(**options) -> Callable[[], object]:
        return lambda: hstu_attention(x.q, x.k, x.v, x.seq_offsets, x.max_seq_len, **options)

    def backward(nodes: list[torch.Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(nodes, everything, grads, retain_graph=True)

    found = [
        Case("forward", forward()),
        Case("forward, window", forward(max_attn_len=32)),
        Case("forward, position and time bias", lambda: biased.call(hstu_attention)),
        Case("forward, recorded", forward(), grad=True),
        Case("backward", backward(outs), NODES, grad=True),
        Case("backward, the op alone", lambda: backward_op(*arguments)),
        Case("backward of a node that does nothing", backward(nothings), NODES, grad=True),
    ]
    if bench.device == "cuda":
        offsets, longest = x.seq_offsets.int(), x.max_seq_len
        args = (x.q, x.k, x.v, offsets, offsets, longest, longest, 0.0, True, False)
        found.append(Case("FlashAttention2's op, forward", lambda: torch.ops.aten._flash_attention_forward(*args)))
    return found


def run(args: argparse.Namespace) -> int:
    cuda = args.device != "cpu" and torch.cuda.is_available()
    bench = common.Bench("host", args, "bf16" if cuda else "fp32", COLUMNS)
    cuda = bench.device == "cuda"
    shape = problems.dense(args.length or (128 if cuda else 1), args.batch or (16 if cuda else 1), 64 if cuda else 8)
    bench.head(f"{shape.name}, {shape.heads} heads" + ("" if cuda else "; with the time of the (tiny) problem itself"))

    def measure(case: Case) -> None:
        with torch.set_grad_enabled(case.grad):
            timing = harness.time_host(case.call, case.count, bench.budget, bench.device)
        row = {"call": case.name, "case": shape.name, "us": timing.median * 1e6, "min us": timing.minimum * 1e6}
        bench.add(row, timing)

    # All on one stream: the backward pass would wait for the one of the forward, and that is time of the host.
    bench.step(lambda: bench.each(cases(shape, bench), lambda x: x.name, measure))()
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
