"""Every test that takes `device` runs on each device (and backend) that this build serves; see cases.devices.

`device` and `dtype` together: each device with the types it serves. `device64`: the devices that serve float64.
"""

import pytest
import torch
from cases import backend, devices, dtypes


def _name(value: object) -> str:
    return backend(value) if isinstance(value, str) else str(value).removeprefix("torch.")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    given = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "device64" in metafunc.fixturenames:
        metafunc.parametrize("device64", [x for x in devices() if torch.float64 in dtypes(x)], ids=_name)
    if "device" not in metafunc.fixturenames or "device" in given:
        return
    if "dtype" in metafunc.fixturenames and "dtype" not in given:
        pairs = [(device, dtype) for device in devices() for dtype in dtypes(device)]
        metafunc.parametrize(("device", "dtype"), pairs, ids=_name)
    else:
        metafunc.parametrize("device", devices(), ids=_name)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed and from torch's default switches."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def deterministic():
    """For tests that compare the bits of gradients from two runs, which on GPUs need the switch."""
    torch.use_deterministic_algorithms(True, warn_only=True)
