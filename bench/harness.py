"""Times callables on a CPU or a CUDA device: warm-up, median, spread. Nothing here knows attention.

On CUDA a call is timed in one of two ways:

    events    an event before and after each call, with the calls queued behind a sleeping kernel so that Python is
              not what is timed
    graph     for short calls: a CUDA graph of many calls, replayed; no launch from the host is in the figure

Both take the callables in turn, each with tensors of its own, so that no call finds its inputs in the L2 cache.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

GRAPH_BELOW = 2e-4  # seconds a call: shorter ones are timed in a graph
GRAPH_TIME = 2e-3  # seconds of one graph, at least
MAX_COPIES = 64

Call = Callable[[], object]


@dataclass(frozen=True)
class Timing:
    """Seconds a call. `spread` is the distance between the quartiles divided by the median."""

    median: float
    spread: float
    minimum: float
    runs: int
    method: str  # "cpu", "events", "graph" or "host"
    note: str = ""


def quantile(ordered: Sequence[float], q: float) -> float:
    """Of sorted values, linear between neighbours."""
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (at - low) * (ordered[high] - ordered[low])


def summarise(seconds: Iterable[float], method: str, note: str = "") -> Timing:
    ordered = sorted(seconds)
    median = quantile(ordered, 0.5)
    spread = (quantile(ordered, 0.75) - quantile(ordered, 0.25)) / median if median else 0.0
    return Timing(median, spread, ordered[0], len(ordered), method, note)


def runs_for(estimate: float, budget: float, least: int = 3, most: int = 100) -> int:
    return max(least, min(most, int(budget / max(estimate, 1e-9))))


# ---- CPU -------------------------------------------------------------------------------------------------


def time_cpu(call: Call, budget: float, clock: Callable[[], float] = time.perf_counter) -> Timing:
    """Runs for about `budget` seconds, at least three calls after a warm-up; of slow calls two, warm-up included."""

    def once() -> float:
        start = clock()
        call()
        return clock() - start

    first, second = once(), once()  # the first of a process may be slow for its own reasons
    if second > 3 * budget:
        return summarise([first, second], "cpu")
    return summarise([once() for _ in range(runs_for(second, budget))], "cpu")


# ---- CUDA ------------------------------------------------------------------------------------------------


def copies_past_l2(bytes_per_call: int, device: torch.device | str = "cuda") -> int:
    """How many sets of tensors in turn are three times the L2 cache."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 * 2**20)
    return max(1, min(MAX_COPIES, math.ceil(3 * cache / max(1, bytes_per_call))))


def time_cuda(calls: Sequence[Call], budget: float, graph: str = "auto") -> Timing:
    """`graph`: "auto" (calls under GRAPH_BELOW), "always" or "never". Falls back to events, and says why, where a call
    cannot be captured. Capture needs a current stream that is not the default one.
    """
    warm = _elapsed(calls, len(calls)) / len(calls)
    if warm > 3 * budget and (second := _elapsed(calls, 1)) > 3 * budget:
        return summarise([second, _elapsed(calls, 1)], "events")
    count = max(3, len(calls))
    estimate = _elapsed(calls, count) / count
    note = ""
    if graph == "always" or (graph == "auto" and estimate < GRAPH_BELOW):
        try:
            return _time_graph(calls, estimate, budget)
        except Exception as error:
            torch.cuda.synchronize()
            note = f"no graph: {first_line(error)}"
    return _time_events(calls, estimate, budget, note)


def _elapsed(calls: Sequence[Call], count: int) -> float:
    start, end = _event(), _event()
    torch.cuda.synchronize()
    start.record()
    for i in range(count):
        calls[i % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def _time_events(calls: Sequence[Call], estimate: float, budget: float, note: str = "") -> Timing:
    count = runs_for(estimate, budget, least=7)
    pairs = [(_event(), _event()) for _ in range(count)]
    torch.cuda.synchronize()
    for i, (start, end) in enumerate(pairs):
        if i % 20 == 0:  # the host gets ahead of the device; the queue is finite
            torch.cuda.synchronize()
            torch.cuda._sleep(20_000_000)  # clocks, about 10 ms
        start.record()
        calls[i % len(calls)]()
        end.record()
    torch.cuda.synchronize()
    return summarise((a.elapsed_time(b) / 1e3 for a, b in pairs), "events", note)


def _time_graph(calls: Sequence[Call], estimate: float, budget: float) -> Timing:
    rounds = max(1, math.ceil(GRAPH_TIME / max(estimate, 2e-6) / len(calls)))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for _ in range(rounds):
            for call in calls:
                call()
    count = rounds * len(calls)
    graph.replay()
    torch.cuda.synchronize()
    seconds = [_elapsed([graph.replay], 1) / count for _ in range(runs_for(estimate * count, budget, least=7))]
    return summarise(seconds, "graph", f"{count} calls a graph")


def time_host(call: Call, count: int, budget: float, device: str) -> Timing:
    """Seconds of the host for each of the `count` calls that `call` makes. On CUDA the queue never fills: it is empty
    before every hundred of them.
    """
    repeats = max(1, 100 // count)
    wait = torch.cuda.synchronize if device == "cuda" else (lambda: None)

    def once() -> float:
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / (repeats * count)

    estimate = min(once() for _ in range(3))
    gc.collect()
    gc.disable()
    try:
        return summarise([once() for _ in range(runs_for(estimate * repeats * count, budget, least=7))], "host")
    finally:
        gc.enable()
        wait()


# ---- memory ----------------------------------------------------------------------------------------------


def available_memory(device: str) -> int:
    """Bytes that can still be had."""
    if device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    try:
        with open("/proc/meminfo") as lines:
            return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def peak_memory(call: Call, device: str) -> int | None:
    """Bytes that `call` held at most beyond what was held before; None where the system does not tell."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_free_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # sets the peak (VmHWM) back to what is resident now
        before = _resident("VmRSS")
    except (OSError, StopIteration):
        before = None
    call()
    return None if before is None else max(0, _resident("VmHWM") - before)


def _return_free_memory() -> None:
    """Without this the C library serves `call` from pages that earlier calls freed, and they do not count."""
    with contextlib.suppress(OSError, AttributeError):  # glibc only
        ctypes.CDLL(None).malloc_trim(0)


def _resident(field: str) -> int:
    with open("/proc/self/status") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith(field))


# ---- small things ----------------------------------------------------------------------------------------


def first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__


def progress(items: Sequence, describe: Callable[[object], str]) -> Iterator:
    """The items in turn, with a bar on a terminal where tqdm is installed; lines that are printed stay above it."""
    try:
        from tqdm import tqdm
    except ImportError:
        tqdm = None
    if tqdm is None or not sys.stderr.isatty():
        yield from items
        return
    with tqdm(items, file=sys.stderr, leave=False, dynamic_ncols=True) as bar:
        for item in bar:
            bar.set_description(describe(item))
            yield item


def say(text: str = "") -> None:
    """Prints a line, above the bar of `progress` if there is one."""
    tqdm = sys.modules.get("tqdm")
    if tqdm is not None:
        tqdm.tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    else:
        print(text, flush=True)
