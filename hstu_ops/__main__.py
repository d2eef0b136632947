"""python -m hstu_ops: checks this build (the default command), or trains a recommender (`train`).

A command is a function of the parsed arguments, in `_parser`.
"""

from __future__ import annotations

import argparse
import platform
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import RelativeAttentionBias, TimeBuckets, __version__, build_info, hstu_attention, reference
from . import train as training

USERS, HEADS, DIM, SHORTEST, LONGEST, MOST_TARGETS = 32, 4, 64, 10, 1000, 20


def print_versions(device: str) -> None:
    info = build_info()
    cuda = f"CUDA {info['cuda']} for {info['cuda_archs']}" if info.get("cuda_archs") else "not built"
    print(
        f"hstu_ops {__version__}, torch {torch.__version__}, Python {platform.python_version()}, {platform.machine()}"
    )
    print(f"built: CPU kernels for {info['cpu_isas']} ({info['compiler']}); CUDA kernels: {cuda}")
    print(f"in use: {info['cpu_isa']}, {torch.get_num_threads()} threads; device of this run: {_device_name(device)}")


def _device_name(device: str) -> str:
    return f"cuda ({torch.cuda.get_device_name()})" if device == "cuda" else device


@dataclass
class Batch:
    """Users' histories of 10 to 1000 items with up to 20 candidates each; `leaves` are what gets a gradient."""

    leaves: tuple[Tensor, ...]  # q, k, v, position_weight, time_weight
    seq_offsets: Tensor
    num_targets: Tensor
    rab: RelativeAttentionBias
    timestamps: Tensor
    grad_out: Tensor

    @staticmethod
    def draw(device: str, dtype: torch.dtype) -> Batch:
        rng, gen = random.Random(0), torch.Generator().manual_seed(0)
        lengths = [rng.randint(SHORTEST, LONGEST) for _ in range(USERS)]
        targets = [rng.randint(0, min(MOST_TARGETS, n)) for n in lengths]
        total = sum(lengths)

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=gen, dtype=torch.float64).to(device=device, dtype=dtype)

        # Seconds between items: log-normal around an hour.
        gaps = (normal(total, dtype=torch.float64) * 2).exp() * 3600
        rab = RelativeAttentionBias(LONGEST, TimeBuckets.log(), device=device)
        tables = (normal(2 * LONGEST - 1, dtype=torch.float32), normal(len(rab.boundaries) + 1, dtype=torch.float32))
        return Batch(
            leaves=tuple(x.requires_grad_() for x in (*(normal(total, HEADS, DIM) for _ in range(3)), *tables)),
            seq_offsets=torch.tensor([0, *lengths], device=device).cumsum(0),
            num_targets=torch.tensor(targets, device=device),
            rab=rab,
            timestamps=1_600_000_000 + gaps.cumsum(0).long(),
            grad_out=normal(total, HEADS, DIM),
        )

    def double(self) -> Batch:
        leaves = tuple(x.detach().double().requires_grad_() for x in self.leaves)
        return replace(self, leaves=leaves, grad_out=self.grad_out.double())

    def run(self, attention: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        """The output and the gradients of all leaves."""
        q, k, v, position_weight, time_weight = self.leaves
        bias = replace(self.rab(self.timestamps), position_weight=position_weight, time_weight=time_weight)
        out = attention(q, k, v, self.seq_offsets, LONGEST, num_targets=self.num_targets, bias=bias)
        return (out.detach(), *torch.autograd.grad(out, self.leaves, self.grad_out))


def check(arguments: argparse.Namespace) -> int:
    """Compares hstu_attention, forward and gradients, with the reference in float64; 1 if it is not accurate."""
    device = arguments.device
    print_versions(device)
    batch = Batch.draw(device, getattr(torch, arguments.dtype))
    lengths = batch.seq_offsets.diff()
    sizes = f"{int(lengths.min())} to {int(lengths.max())} items (mean {lengths.double().mean():.0f})"
    print(f"\n{USERS} users, {sizes}, {HEADS} heads of {DIM}, {arguments.dtype}, targets, position and time bias;")
    print("forward and backward:\n")
    batch.run(hstu_attention)  # warm-up
    ours, our_time, our_memory = _measured(lambda: batch.run(hstu_attention), device, repeat=3)
    padded, padded_time, padded_memory = _measured(lambda: batch.run(reference.padded_hstu_attention), device)
    exact = batch.double().run(reference.hstu_attention)

    print(f"{'':28}{'hstu_ops':>12}{'padded eager':>15}")
    accurate = True
    for name, got, plain, true in zip(("output", "q", "k", "v", "position", "time"), ours, padded, exact, strict=True):
        error, plain_error = (((x.double() - true).norm() / true.norm()).item() for x in (got, plain))
        accurate &= error <= (2 if name == "output" else 3) * plain_error
        label = name if name == "output" else f"gradient of {name}"
        print(f"{'error, ' + label:28}{error:12.1e}{plain_error:15.1e}")
    print(f"{'time':28}{our_time * 1e3:9.1f} ms{padded_time * 1e3:12.1f} ms   ({padded_time / our_time:.1f} x)")
    print(f"{'peak memory':28}{_mebibytes(our_memory):>12}{_mebibytes(padded_memory):>15}")
    print(
        "\nok: errors against float64 are at most 2x (gradients 3x) those of padded eager"
        if accurate
        else "\nNOT ACCURATE: an error against float64 is more than 2x (gradients 3x) that of padded eager"
    )
    return 0 if accurate else 1


def _measured(function: Callable[[], tuple], device: str, repeat: int = 1) -> tuple[tuple, float, float | None]:
    """Result, best time in seconds, and bytes that the first call needed on top of what was there (None: unknown)."""
    before = _reset_peak(device)
    start = time.perf_counter()
    result = function()
    _synchronize(device)
    best = time.perf_counter() - start
    memory = None if before is None else _peak(device) - before
    for _ in range(repeat - 1):
        start = time.perf_counter()
        function()
        _synchronize(device)
        best = min(best, time.perf_counter() - start)
    return result, best, memory


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _reset_peak(device: str) -> float | None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak resident size becomes the present one
        return _peak(device)
    except (OSError, StopIteration):  # not Linux, or not allowed
        return None


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return 1024 * float(next(line for line in file if line.startswith("VmHWM:")).split()[1])


def _mebibytes(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 2**20:.0f} MiB"


def _has_cuda() -> bool:
    return bool(build_info().get("cuda_archs")) and torch.cuda.is_available()


def _parser() -> argparse.ArgumentParser:
    device = "cuda" if _has_cuda() else "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m hstu_ops",
        description="HSTU attention, layers and recommenders. Without a command: check.",
        epilog="python -m hstu_ops COMMAND --help says what a command takes.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    summaries = {
        check: "compare this build with plain PyTorch: error, time, memory",
        training.train: "train a recommender on synthetic data or MovieLens ratings",
    }
    dtypes = {check: ["float32", "float16", "bfloat16"], training.train: ["float32", "bfloat16"]}
    for function, summary in summaries.items():
        command = commands.add_parser(function.__name__, help=summary, description=function.__doc__)
        command.set_defaults(function=function)
        command.add_argument("--device", choices=["cpu", "cuda"], default=device, help="default: %(default)s")
        command.add_argument("--dtype", choices=dtypes[function], help="default: float32; train on cuda: bfloat16")
        if function is training.train:
            training.add_arguments(command)
    return parser


def main() -> int:
    given = sys.argv[1:]
    if not given or (given[0].startswith("-") and given[0] not in ("-h", "--help")):
        given = ["check", *given]
    parser = _parser()
    arguments = parser.parse_args(given)
    if arguments.device == "cuda" and not _has_cuda():
        parser.error("argument --device: cuda: this build has no CUDA kernels, or there is no GPU")
    if arguments.dtype is None:
        arguments.dtype = (
            "bfloat16" if arguments.function is training.train and arguments.device == "cuda" else "float32"
        )
    return arguments.function(arguments)


if __name__ == "__main__":
    sys.exit(main())
