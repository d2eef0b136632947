"""Runs problems on providers: one line each, then what the lines mean together, then the files."""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
import peaks
import providers
import report
import torch
from harness import Timing, first_line, say
from problems import COUNTED_BY, Problem, draw, flops, kept_pairs, moved_bytes, type_name
from providers import OWN_NAMES, Padded, Provider
from report import Row
from suites import Entry

import hstu_ops


@dataclass(frozen=True)
class Settings:
    device: str
    budget: float  # seconds a measurement
    graph: str
    quick: bool
    out: Path | None
    providers: tuple[Provider, ...]
    missing: tuple[str, ...]


def settings(args: argparse.Namespace) -> Settings:
    """ValueError where an option does not fit this machine or build."""
    served = torch.cuda.is_available() and bool(hstu_ops.build_info().get("cuda_archs"))
    device = args.device or ("cuda" if served else "cpu")
    if device == "cuda" and not served:
        reason = "this build of hstu_ops holds no CUDA kernels" if torch.cuda.is_available() else "torch finds no GPU"
        raise ValueError(f"--device cuda: {reason}")
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    found, missing = providers.find(device, args.providers, args.backend)
    default = report.ROOT / "bench" / "results"
    out = args.out or (None if args.quick else default)
    budget = args.time or (0.1 if args.quick else 1.0 if device == "cpu" else 0.1)
    none = out is None or str(out) == "-"
    return Settings(device, budget, args.graph, args.quick, None if none else out, tuple(found), tuple(missing))


# ---- one measurement -------------------------------------------------------------------------------------


class Refused(Exception):
    """A provider does not serve a case; the text says why."""


@contextlib.contextmanager
def stream(device: str) -> Iterator[None]:
    """The stream everything runs on: one, as memory is cached by stream, and not the default one, for graphs."""
    with torch.cuda.stream(_side_stream()) if device == "cuda" else contextlib.nullcontext():
        yield


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def make_call(provider: Provider, problem: Problem, direction: str, device: str, seed: int) -> Callable[[], object]:
    """What is timed, with tensors of its own. The backward pass is that of one forward pass, repeated."""
    inputs = draw(problem.case, problem.dtype, device, seed)
    forward, leaves = provider.bind(inputs, problem.case)
    if direction == "fwd":
        return torch.no_grad()(forward)
    out = forward()
    grad_out = torch.randn(out.shape, dtype=out.dtype, device=device)
    backward = functools.partial(torch.autograd.grad, out, leaves, grad_out, retain_graph=True)
    if direction == "bwd":
        return backward
    if direction == "det":
        return lambda: _deterministic(backward)
    return lambda: torch.autograd.grad(forward(), leaves, grad_out)


def _deterministic(call: Callable[[], object]) -> object:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        return call()
    finally:
        torch.use_deterministic_algorithms(before)


def measure(provider: Provider, problem: Problem, direction: str, s: Settings) -> tuple[Timing, int | None]:
    """Time and peak memory; Refused where the provider does not serve the case."""
    reason = provider.refuses(problem.case, problem.dtype, s.device, direction)
    if reason:
        raise Refused(reason)
    with provider.active(), stream(s.device):
        if provider.same_function:
            _compare(provider, problem, s.device)
        if s.device == "cpu":
            call, timings = make_call(provider, problem, direction, s.device, 0), []
            peak = harness.peak_memory(lambda: timings.append(harness.time_cpu(call, s.budget)), s.device)
            return timings[0], peak
        copies = harness.copies_past_l2(moved_bytes(problem.case, problem.dtype, direction))
        calls = [make_call(provider, problem, direction, s.device, seed) for seed in range(copies)]
        if provider.same_function:
            calls[0]()  # a peer may compile and tune itself at the first call
        peak = harness.peak_memory(calls[0], s.device)
        return harness.time_cuda(calls, s.budget, s.graph), peak


def _compare(provider: Provider, problem: Problem, device: str) -> None:
    """A peer's figures count only if it computes the same."""
    inputs = draw(problem.case, problem.dtype, device)
    with torch.no_grad():
        theirs = provider.bind(inputs, problem.case)[0]().float()
        ours = inputs.call(hstu_ops.hstu_attention).float()
    error = float((theirs - ours).norm() / ours.norm())
    if not error < 0.02:
        raise ValueError(f"its output differs from ours by {100 * error:.1f} %")


def row(
    provider: Provider, problem: Problem, direction: str, timing: Timing, peak: int | None, top: peaks.Peaks
) -> Row:
    case, dtype = problem.case, problem.dtype
    work, moved = flops(case, direction), moved_bytes(case, dtype, direction)
    return Row(
        provider=provider.name,
        case=case.name,
        dtype=type_name(dtype),
        direction=direction,
        bias=case.bias,
        heads=case.heads,
        dim_qk=case.dim_qk,
        dim_v=case.dim_v,
        batch=len(case.lengths),
        max_seq_len=case.max_seq_len or max(case.lengths, default=1),
        tokens=problem.total,
        kept_pairs=kept_pairs(case),
        method=timing.method,
        runs=timing.runs,
        median_ms=timing.median * 1e3,
        spread=timing.spread,
        min_ms=timing.minimum * 1e3,
        gflops=work / timing.median / 1e9,
        of_mm=work / timing.median / top.of(dtype),
        of_roofline=top.bound(work, moved, dtype) / timing.median,
        gbytes=moved / timing.median / 1e9,
        mm_gflops=top.of(dtype) / 1e9,
        copy_gbytes=top.copy / 1e9,
        peak_mib=None if peak is None else peak / 2**20,
        note=timing.note,
    )


# ---- a run -----------------------------------------------------------------------------------------------


def run(entries: Sequence[Entry], s: Settings, name: str = "attention") -> int:
    """Measures, prints and writes the files `name`; returns how many of our own measurements failed."""
    env = report.environment(s.device)
    with stream(s.device):
        wake(s.device)
        top = peaks.measure(s.device, {x.problem.dtype for x in entries}, s.quick)
    _print_head(env, top, s)
    own = [p for p in s.providers if p.own]
    others = [p for p in s.providers if not p.own] if any(x.compare for x in entries) else []
    width = max([4, *(len(x.problem.case.name) for x in entries)])
    say(report.table_head([p.name for p in others], width, s.device, len(own) > 1))
    rows: list[Row] = []
    reasons: Counter = Counter()
    failed = 0
    steps = [(entry, direction) for entry in entries for direction in entry.directions]
    for entry, direction in harness.progress(steps, lambda x: f"{x[0].problem.label} {x[1]}"):
        problem, done = entry.problem, {}
        for p in (*own, *(others if entry.compare else ())):
            try:
                done[p] = row(p, problem, direction, *measure(p, problem, direction, s), top)
            except Refused as refusal:
                reasons[f"{p.name}: {refusal}"] += 1
            except Exception as error:
                failed += p.own
                say(f"{problem.label} {direction}: {p.name} failed: {first_line(error)}")
            if s.device == "cuda":
                _release()
        rows += done.values()
        for p in own:
            if p in done:
                ratios = [f"{done[x].median_ms / done[p].median_ms:.2f}x" if x in done else "-" for x in others]
                say(report.table_line(done[p], ratios, width, s.device, len(own) > 1))
    for reason, count in reasons.items():
        say(f"not run, {count} of {len(steps)}: {reason}")
    say()
    for line in conclusions(entries, rows):
        say(line)
    say()
    say(_peaks_at_end(entries, top, s))
    if s.out and rows:
        path = s.out / report.slug(env, s.device) / f"{name}.csv"
        say(f"results: {path} ({report.save(rows, env, path)} rows)")
        say(report.plot(rows, env, path.with_suffix(".png"), s.device))
    return failed


def _print_head(env: report.Environment, top: peaks.Peaks, s: Settings) -> None:
    for line in (*report.head(env), peaks_line(top)):
        say(line)
    if s.device == "cpu":
        say(f"instruction set in use: {env.isa} (HSTU_OPS_ISA forces one); %mm: of torch.mm fp32, for half types too")
    say(f"FLOPs on kept pairs, counted by {COUNTED_BY}; +-%: distance of the quartiles; Nx: times as long as ours")
    for p in s.providers:
        say(f"  {p.name}: {p.note}")
    for line in s.missing:
        say(f"  {line}")
    say()


def _peaks_at_end(entries: Sequence[Entry], top: peaks.Peaks, s: Settings) -> str:
    try:
        with stream(s.device):
            again = peaks.measure(s.device, {x.problem.dtype for x in entries}, s.quick)
    except Exception as error:  # a kernel that failed may have taken the device with it; the results are kept
        return f"peaks at the end of the run: {first_line(error)}"
    drift = "" if top.drift(again) < 0.1 else " - the machine was not quiet: % of torch.mm and roofline mean little"
    return f"at the end of the run: {peaks_line(again)}{drift}"


def _release() -> None:
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


def wake(device: str) -> None:
    """The first backward pass of a process imports half a second of Python, which is no kernel's time or memory, and
    its thread takes hold of the device.
    """
    x = torch.ones(1, 1, device=device, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.autograd.grad(x @ x, x, torch.ones_like(x))


def peaks_line(top: peaks.Peaks) -> str:
    products = ", ".join(f"torch.mm {type_name(x)} {rate / 1e9:.0f} GFLOP/s" for x, rate in top.product.items())
    return f"{products}, copy {top.copy / 1e9:.1f} GB/s"


def conclusions(entries: Sequence[Entry], rows: Sequence[Row]) -> list[str]:
    """What the lines mean together: rates held against other problems' and other providers', % of torch.mm."""
    found = {(x.provider, f"{x.case} {x.dtype}", x.direction): x for x in rows}
    return [*_against_problems(entries, found), *_against_providers(found), *_against_product(rows)]


Found = dict[tuple[str, str, str], Row]  # by provider, label and direction


def _against_problems(entries: Sequence[Entry], found: Found) -> list[str]:
    lines = []
    for entry in entries:
        for what, other in entry.problem.against:
            shares = [
                f"{provider} {direction} {x.gflops / found[provider, other, direction].gflops:.2f}"
                for (provider, name, direction), x in found.items()
                if name == entry.problem.label and (provider, other, direction) in found
            ]
            if shares:
                lines.append(f"{entry.problem.label}, rate over that of {what} ({other}): {', '.join(shares)}")
    return lines


def _against_providers(found: Found) -> list[str]:
    """Times another provider takes by ours, their range over the cases without and with bias; memory of padded."""
    ratios: dict[tuple, list[float]] = {}
    lines = []
    for (name, label, direction), theirs in found.items():
        for own in OWN_NAMES:
            ours = found.get((own, label, direction))
            if name in OWN_NAMES or ours is None:
                continue
            kind = "no bias" if ours.bias == "none" else "bias"
            ratios.setdefault((name, own, direction, kind), []).append(theirs.median_ms / ours.median_ms)
            if theirs.peak_mib and ours.peak_mib and name == Padded.name:
                memory = f"{theirs.peak_mib:.0f} MiB beside {ours.peak_mib:.0f}"
                lines.append(
                    f"{label} {direction}: {name} {theirs.median_ms:.1f} ms beside {ours.median_ms:.1f}, {memory}"
                )
    for (name, own, direction, kind), x in ratios.items():
        lines.append(
            f"{name} takes {min(x):.2f} to {max(x):.2f} times as long as {own}: {direction}, {kind}, {len(x)} cases"
        )
    return lines


def _against_product(rows: Sequence[Row]) -> list[str]:
    shares: dict[tuple, list[float]] = {}
    for x in rows:
        if x.provider in OWN_NAMES:
            kind = "no bias" if x.bias == "none" else "bias"
            shares.setdefault((x.provider, x.dtype, x.direction, kind), []).append(100 * x.of_mm)
    return [f"{', '.join(x)}: {min(y):.0f} to {max(y):.0f} % of torch.mm" for x, y in shares.items()]
