"""Every test that takes `device` runs on each device (and backend) this build serves; see cases.devices."""

import pytest
import torch
from cases import backend, devices


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", devices(), ids=backend)


@pytest.fixture(autouse=True)
def _fresh_state():
    """Each test starts from the same seed and from torch's default switches."""
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
