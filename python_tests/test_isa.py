"""The CPU kernels of every instruction set that this machine can run, not only of the one it would choose."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hstu_ops import build_info

_CODE = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
from cases import CORNER, SMALL
from checks import check
from hstu_ops import build_info
print(build_info()["cpu_isa"], flush=True)
if build_info()["cpu_isa"] == sys.argv[2]:
    for case in (*SMALL, *CORNER):
        check(case, torch.float32, "cpu")
    for case in SMALL[::4]:
        check(case, torch.float16, "cpu")
        check(case, torch.bfloat16, "cpu")
    for case in SMALL[::9]:
        check(case, torch.float64, "cpu")
    print("checked")
"""


@pytest.mark.parametrize("isa", [x for x in build_info()["cpu_isas"].split() if x != build_info()["cpu_isa"]])
def test_other_instruction_sets(isa):
    result = subprocess.run(
        [sys.executable, "-c", _CODE, str(Path(__file__).parent), isa],
        env={**os.environ, "HSTU_OPS_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    used, *rest = result.stdout.split()
    if used != isa:
        pytest.skip(f"this machine runs {used} at most")
    assert rest == ["checked"], result.stderr
