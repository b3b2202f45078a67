"""Ceilings of the device, measured."""

import torch

from ra3_megatron.config.hardware import chip
from ra3_megatron.parallel import speed
from ra3_megatron.parallel.speed import measure_speed


def test_seconds_become_operations_and_bytes(parallel, monkeypatch) -> None:
    """A copy reads and writes: half the bandwidth made every floor of memory twice too high."""
    monkeypatch.setattr(speed, "CPU_MATRIX", 64)
    monkeypatch.setattr(speed, "CPU_COPY", 1000)
    seconds = iter((2.0, 5.0))
    monkeypatch.setattr(speed, "_fastest", lambda *_: next(seconds))
    found = measure_speed(parallel, torch.float32)
    assert found == speed.DeviceSpeed(flops=2 * 64**3 / 2.0, bytes=2 * 1000 / 5.0, matrix=64)


def test_the_fastest_run_counts_and_the_first_does_not(parallel) -> None:
    """The first product pays for the library's start."""
    runs: list[int] = []

    def work() -> torch.Tensor:
        runs.append(len(runs))
        return torch.zeros(1)

    assert 0 < speed._fastest(parallel, work, 3) < 60
    assert len(runs) == 4


def test_chips_by_their_devices_names() -> None:
    """An H100 of the PCIe kind was measured against the faster SXM one."""
    found = {name: chip(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H100 PCIe", "NVIDIA H200", "NVIDIA GB200")}
    assert [c.name if c else None for c in found.values()] == ["H100 SXM", "H100 PCIe", "H200 SXM", "GB200"]
    assert chip("NVIDIA A100-SXM4-80GB").fp8 is None
    assert chip("Intel Xeon") is None
