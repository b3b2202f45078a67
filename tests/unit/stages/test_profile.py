"""The figures of a profile: phases, traces and floors, by hand-made events and by hand."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torch.autograd import DeviceType

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.hardware import chip
from ra3_megatron.config.run import RunConfig, config_from_dict
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.parallel.speed import DeviceSpeed
from ra3_megatron.report.op_kinds import ATTENTION, COMMUNICATION, ELEMENTWISE, GEMM, HOST, IDLE
from ra3_megatron.stages.profile import nsys_command
from ra3_megatron.stages.profile_floor import Work, floors, model_flops, utilisation
from ra3_megatron.stages.profile_inputs import NEVER, choose_stage, profiled_config
from ra3_megatron.stages.profile_recorder import Interval, Plan, Section, Steps, totals
from ra3_megatron.stages.profile_trace import summarise

SHAPE = Architecture("qwen2", 2, 16, 4, 2, 4, 32, 101, True, True, max_positions=64)


@pytest.fixture
def parallel() -> Iterator[Parallel]:
    """One process's groups."""
    with initialize() as handle:
        yield handle


@dataclass(frozen=True)
class Range:
    start: float
    end: float


@dataclass(frozen=True)
class Event:
    """What torch's profiler says of one event; times in microseconds."""

    name: str
    time_range: Range
    self_cpu_time_total: float = 0.0
    thread: int = 1
    device_type: DeviceType = DeviceType.CPU
    is_async: bool = False
    is_user_annotation: bool = False


def event(name: str, start: float, end: float, own: float | None = None, **more: Any) -> Event:
    return Event(name, Range(start, end), end - start if own is None else own, **more)


def found(events: list[Event]) -> dict[tuple[str, str], float]:
    return {(p.phase, p.kind): round(p.seconds * 1e6, 6) for p in summarise(events).parts}


def test_host_operators_go_to_the_innermost_phase() -> None:
    """Python between the operators, and other threads' work, were counted as matrix products of the phase around."""
    events = [
        event("ra3: update", 0, 100),
        event("ra3: optimizer", 60, 90),
        event("aten::matmul", 10, 40, own=0.0),
        event("aten::mm", 10, 40),
        event("aten::_scaled_dot_product_flash_attention_for_cpu", 40, 50),
        event("aten::mul", 70, 75),
        event("aten::mm", 20, 90, thread=2),
        event("aten::mm", 200, 250),
    ]
    assert found(events) == {
        ("update", GEMM): 30,
        ("update", ATTENTION): 10,
        ("update", HOST): 30,
        ("update/optimizer", ELEMENTWISE): 5,
        ("update/optimizer", HOST): 25,
    }


def test_communication_that_nothing_covers_is_exposed() -> None:
    """A collective under way while matrices are multiplied cost as much as one that all waited for."""
    events = [
        event("ra3: update", 0, 100),
        event("aten::mm", 0, 50),
        event("c10d::allreduce_", 50, 52),
        event("gloo:all_reduce", 30, 80, thread=7, is_async=True),
    ]
    summary = summarise(events)
    assert summary.communication == pytest.approx(50e-6)
    assert summary.exposed == pytest.approx(30e-6)
    parts = found(events)
    assert parts["update", COMMUNICATION] == 32
    assert parts["update", HOST] == 18


def test_on_a_device_kernels_count_and_the_time_without_any() -> None:
    """Launches on the host were added to the kernels they launched, and ranges on the device counted as kernels."""
    gpu: dict[str, Any] = {"device_type": DeviceType.CUDA, "thread": 0}
    events = [
        event("ra3: rollout", 0, 50),
        event("ra3: update", 50, 100),
        event("aten::mm", 1, 2),
        event("cudaLaunchKernel", 1, 2),
        event("ra3: update", 55, 95, is_user_annotation=True, **gpu),
        event("nvjet_tst_128", 10, 40, **gpu),
        event("nvjet_tst_128", 60, 80, **gpu),
        event("ncclDevKernel_AllReduce_Sum", 70, 90, **gpu),
    ]
    assert found(events) == {
        ("rollout", GEMM): 30,
        ("rollout", IDLE): 20,
        ("update", GEMM): 20,
        ("update", COMMUNICATION): 20,
        ("update", IDLE): 20,
    }
    assert summarise(events).exposed == pytest.approx(10e-6)
    assert summarise([]).parts == ()


def test_phases_add_up_to_the_step() -> None:
    """Parts of a phase were added to the phase they are in, and a step came out longer than it took."""
    at = [("forward", 1, 0.0, 4.0), ("optimizer", 1, 4.0, 5.0), ("update", 0, 0.0, 6.0), ("data", 0, 6.0, 7.0)]
    at += [(name, depth, a + 10, b + 10) for name, depth, a, b in at]
    intervals = [Interval(name, depth, a, b, held=5, peak=int(b)) for name, depth, a, b in at]
    section = Section(start=0.0, end=20.0, steps=2, intervals=intervals)
    rows = {f"{r['within']}>{r['name']}": (r["seconds"], r["calls"]) for r in totals(section)}
    assert rows == {
        ">update": (6.0, 2), "update>forward": (4.0, 2), "update>optimizer": (1.0, 2), ">data": (1.0, 2),
        ">other": (3.0, 0),
    }  # fmt: skip
    assert next(iter(rows)) == ">update"
    assert next(r for r in totals(section) if r["name"] == "update")["peak"] == 16


def test_steps_of_the_plan_are_told_apart(parallel, tmp_path: Path) -> None:
    """A step with lag counts as several; the last section began one step late and work was counted twice."""
    steps = Steps(parallel, tmp_path, Plan(warm_up=1, timed=2, traced=0), save=True, nsys=False)
    counted = iter([10.0, 34.0, 34.0, 34.0])
    steps.count = lambda: {"tokens": next(counted)}
    assert steps.requested(1) is None
    steps.recorder.begin("update")
    steps.recorder.end()
    assert steps.requested(2) is None
    wish = steps.requested(4)
    assert wish is not None
    timed = steps.timed
    assert timed is not None
    assert (timed.steps, timed.work, [i.name for i in timed.intervals]) == (3, {"tokens": 24.0}, ["update"])
    steps.finish()
    assert steps.saving is not None
    assert steps.saving.seconds >= 0


def setting(world: int = 1, **sections: dict[str, Any]) -> tuple[RunConfig, Any]:
    base: dict[str, Any] = {
        "run": {"arms": ["ntp"]}, "train": {"steps": 9, "seq_length": 16, "global_batch_size": 4},
        "model": {"architecture": SHAPE.to_dict(), "vocab_multiple": 1},
    }  # fmt: skip
    for name, values in sections.items():
        base.setdefault(name, {}).update(values)
    config = config_from_dict(base)
    return config, resolve_layout(config, world, SHAPE)


def test_floors_by_hand() -> None:
    """Floors of one rank with the whole world's work, and an optimizer that reads its weights for nothing."""
    config, layout = setting(2, parallel={"tensor": 1})
    work = Work(trained=64, scored=32, rolled_out=16, forward_passes=10, updates=2, attended=8)
    speed = DeviceSpeed(flops=1e6, bytes=1e5, matrix=8)
    got = {f.phase: f.seconds for f in floors(config, SHAPE, layout, work, speed, {"dp_cp": 1e4})}
    per_token, n = SHAPE.flops_per_token(8), SHAPE.parameter_count
    assert got["update/forward and backward"] == pytest.approx(64 * per_token / 2 / 1e6)
    assert got["score"] == pytest.approx(32 * per_token / 3 / 2 / 1e6)
    # 28 bytes per weight in fp32, of which each of the two replicas updates a half, twice.
    assert got["update/optimizer"] == pytest.approx(28 * n / 2 * 2 / 1e5)
    # 5 passes on each replica read 4 bytes per weight; the products of 16 tokens take less.
    assert got["rollout"] == pytest.approx(5 * 4 * n / 1e5)
    # Gradients (4 bytes) and weights (4 bytes), half of which the other replica has.
    assert got["communication of replicas"] == pytest.approx(8 * n / 2 * 2 / 1e4)


def test_utilisation_by_hand() -> None:
    """Operations of the whole world over the time of one rank."""
    _, layout = setting(2)
    work = Work(trained=64, scored=0, rolled_out=0, forward_passes=0, updates=1, attended=8)
    operations = model_flops(SHAPE, work)
    assert operations == 64 * SHAPE.flops_per_token(8)
    used = utilisation(operations, 2.0, layout, DeviceSpeed(operations, 1.0, 8), chip("NVIDIA H200"))
    assert used["of_measured"] == pytest.approx(0.25)
    assert used["of_bf16_peak"] == pytest.approx(operations / 4 / 989.4e12)
    assert used["of_fp8_peak"] == pytest.approx(operations / 4 / 1978.9e12)


def test_the_profiled_stage_is_the_configured_one() -> None:
    """A profile that measured and saved in the middle of the steps it timed, or trained a whole corpus' length."""
    config, layout = setting(train={"steps": None, "epochs": 3.0, "eval_interval": 1}, optimizer={"warmup_steps": 5})
    changed = profiled_config(config, Path("/nowhere"), 5, layout)
    assert (changed.train.steps, changed.train.epochs, changed.train.eval_interval) == (6, None, 0)
    assert changed.checkpoint.interval == NEVER
    assert changed.optimizer.warmup_steps == 0
    assert changed.train.seq_length == config.train.seq_length
    assert changed.model == config.model
    assert choose_stage(config, None, None, None).kind == "ntp"
    with pytest.raises(UserError, match="cannot be profiled"):
        choose_stage(config, "prepare", None, None)


def test_command_for_nsight_captures_the_traced_steps_alone() -> None:
    """A capture of the whole process was gigabytes, most of it imports."""
    line = nsys_command(["/x/ra3", "profile", "c.yaml", "--nsys"], Path("out"))
    assert "--capture-range=cudaProfilerApi" in line
    assert line.endswith("ra3 profile c.yaml --nsys")
