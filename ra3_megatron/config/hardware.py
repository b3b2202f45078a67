"""What chips can do at most, as their makers say: what model FLOPs utilisation is quoted against."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Dense matrix products of one device, FLOP/s, without sparsity."""

    name: str
    """As people call it."""
    bf16: float
    """FLOP/s in BF16 with fp32 accumulation."""
    fp8: float | None
    """FLOP/s in FP8; none where the chip has none."""


_CHIPS = (
    # From the most special name to the most general: the first that fits counts.
    ("H100 PCIE", Chip("H100 PCIe", 756e12, 1513e12)),
    ("H100 NVL", Chip("H100 NVL", 835e12, 1671e12)),
    ("H100", Chip("H100 SXM", 989.4e12, 1978.9e12)),
    ("H200 NVL", Chip("H200 NVL", 835e12, 1671e12)),
    ("H200", Chip("H200 SXM", 989.4e12, 1978.9e12)),
    ("A100", Chip("A100", 312e12, None)),
    ("GB200", Chip("GB200", 2500e12, 5000e12)),
    ("B200", Chip("B200", 2250e12, 4500e12)),
)
"""NVIDIA's data sheets; their figures with sparsity are twice these."""


def chip(device: str) -> Chip | None:
    """The chip of a device's name, such as `NVIDIA H100 80GB HBM3`; none for one that is not known, and for a CPU."""
    upper = device.upper()
    return next((found for mark, found in _CHIPS if mark in upper), None)
