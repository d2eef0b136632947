"""What the machine can do: the rate of a large matrix product and of a copy, measured in the same run as the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from harness import Call, time_cpu, time_cuda


@dataclass(frozen=True)
class Peaks:
    """FLOP/s of `torch.mm` by type, bytes/s of a copy (read and written bytes both count).

    On a CPU torch.mm in float32 stands for the half types too: arithmetic is in float32 there.
    """

    device: str
    product: dict[torch.dtype, float]
    copy: float

    def of(self, dtype: torch.dtype) -> float:
        return self.product[_stand_in(dtype, self.device)]

    def drift(self, later: Peaks) -> float:
        """The largest change of a rate between two measurements, as a fraction."""
        pairs = [(self.copy, later.copy), *((rate, later.product[x]) for x, rate in self.product.items())]
        return max(abs(b / a - 1) for a, b in pairs)

    def bound(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """Seconds that this much work takes at least (the roofline)."""
        return max(flops / self.of(dtype), moved / self.copy)


def measure(device: str, dtypes: set[torch.dtype], quick: bool = False) -> Peaks:
    product = {dtype: product_rate(device, dtype, quick) for dtype in {_stand_in(x, device) for x in dtypes}}
    return Peaks(device, product, copy_rate(device, quick))


def product_rate(device: str, dtype: torch.dtype, quick: bool = False) -> float:
    size = (1024 if quick else 2048) if device == "cpu" else (4096 if quick else 8192)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device, quick)


def copy_rate(device: str, quick: bool = False) -> float:
    count = (2**28 if device == "cpu" else 2**31) // (4 if quick else 1)
    a, b = (torch.zeros(count, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * count / _seconds(lambda: b.copy_(a), device, quick)


def _seconds(call: Call, device: str, quick: bool) -> float:
    """The fastest call on a CPU, where others slow some down; the median on a GPU, whose first calls run at a clock
    that it cannot hold.
    """
    budget = 0.2 if quick else 1.0
    return time_cpu(call, budget).minimum if device == "cpu" else time_cuda([call], budget, graph="never").median


def _stand_in(dtype: torch.dtype, device: str) -> torch.dtype:
    return torch.float32 if device == "cpu" and dtype != torch.float64 else dtype
