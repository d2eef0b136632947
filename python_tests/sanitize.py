"""compute-sanitizer over every case of SMALL, CORNER, CROWDED and LONG, forward, backward and backward in deterministic
mode, on a GPU:

    python python_tests/sanitize.py                            initcheck, memcheck, synccheck, with both kernel families
    python python_tests/sanitize.py --tools racecheck --backends sm80

Inputs are copied from the host and results stay on the device: reads and writes are then those of our kernels alone,
which the tool is told to watch. (Watching torch's too fills the log with reads of what cuBLAS wrote, and copies of
results to the host count as reads of memory that the copy engine, unseen, has written.) initcheck does not see what
the copy engine reads either, so that for the Hopper kernels test_determinism's poisoned memory is the test; that it
does see the others is tried first, on memory that nobody wrote.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import replace

TOOLS, BACKENDS = ("initcheck", "memcheck", "synccheck"), ("", "sm80")


def run_cases(dtype_names: list[str]) -> None:
    """What runs under the tool."""
    import torch
    from cases import CORNER, CROWDED, LONG, SMALL, make

    from hstu_ops import RelativeBias, TimeBuckets, hstu_attention

    def there(x: object) -> object:
        return x.detach().cuda().requires_grad_(x.requires_grad) if isinstance(x, torch.Tensor) else x

    torch.utils.deterministic.fill_uninitialized_memory = False  # initcheck looks for what is read of it
    dtypes = [getattr(torch, x) for x in dtype_names]
    cases = [*SMALL, *CORNER, *CROWDED, *LONG]
    for n, case in enumerate(cases):
        inputs = make(case, dtypes[n % len(dtypes)])
        options = {name: there(x) for name, x in inputs.options.items()}
        if isinstance(bias := options["bias"], RelativeBias):
            tensors = ("position_weight", "time_weight", "timestamps", "query_timestamps")
            buckets = None if bias.buckets is None else TimeBuckets(there(bias.buckets.boundaries))
            options["bias"] = replace(bias, buckets=buckets, **{x: there(getattr(bias, x)) for x in tensors})
        q, k, v = there(inputs.q), there(inputs.k), there(inputs.v)
        grad_out = there(torch.randn(len(q), q.shape[1], v.shape[2]).to(q.dtype))
        out = hstu_attention(q, k, v, there(inputs.seq_offsets), inputs.max_seq_len, **options)
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
            out.backward(grad_out, retain_graph=True)
    torch.cuda.synchronize()
    print(f"ran {len(cases)} cases")


def read_unwritten() -> None:
    """A call whose inputs nobody has written."""
    import torch

    from hstu_ops import hstu_attention

    x = torch.empty(64, 2, 64, device="cuda", dtype=torch.bfloat16)
    hstu_attention(x, x, x, torch.tensor([0, 64]).cuda(), 64)
    torch.cuda.synchronize()


def sanitized(tool: str, backend: str, *arguments: str) -> tuple[int | None, bool, str]:
    """How many errors the tool found, None where it did not get to the end; whether all cases ran; its output."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kernel_substring=hstu_ops", "--print-limit", "20"]
    environment = {**os.environ, **({"HSTU_OPS_BACKEND": backend} if backend else {})}
    if tool == "initcheck":  # what the copy engine writes, or is polled until it is written
        environment["HSTU_OPS_CLEAR_SCRATCH"] = "1"
    done = subprocess.run(
        [*command, sys.executable, __file__, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    output = done.stdout + done.stderr
    found = re.findall(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard", output)
    return (int("".join(found[-1])) if found else None), "ran " in output, output


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tools", default=",".join(TOOLS))
    p.add_argument("--backends", default=",".join(BACKENDS), help="HSTU_OPS_BACKEND; empty: the default")
    p.add_argument("--run", help=argparse.SUPPRESS)  # types of the cases, or "unwritten": what runs under the tool
    args = p.parse_args()
    if args.run:
        read_unwritten() if args.run == "unwritten" else run_cases(args.run.split(","))
        return 0
    failed = 0
    if "initcheck" in args.tools.split(","):
        errors, _, output = sanitized("initcheck", "sm80", "--run=unwritten")
        print(f"initcheck of memory that nobody wrote: {errors} errors, as it should be" if errors else output)
        failed += not errors
    for tool in args.tools.split(","):
        for backend in args.backends.split(","):
            began = time.monotonic()
            types = "bfloat16,float32,float16" if backend == "sm80" else "float16,bfloat16"
            errors, ran, output = sanitized(tool, backend, f"--run={types}")
            good = errors == 0 and ran
            failed += not good
            print(f"{tool} {backend or 'default'}: {errors} errors, {time.monotonic() - began:.0f} s", flush=True)
            if not good:
                print(output[:4000])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
