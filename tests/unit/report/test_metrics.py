"""The metrics log: what is written, what survives a crash, and what a resumed run leaves behind."""

import math
import struct
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import MlflowConfig, ReportConfig, WandbConfig
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.schema import (
    METRICS,
    curve,
    decode_record,
    encode_record,
    read_metrics,
    schema_markdown,
)

PLAIN = ReportConfig(tensorboard=False)
DOCS = Path(__file__).parents[3] / "docs" / "metrics.md"


def write(folder: Path, steps: range, *, resumed_at: int | None = None) -> None:
    """Log the losses of `steps`, as a run does that was resumed from a checkpoint of step `resumed_at`."""
    with MetricsLog(folder, PLAIN, is_writer=True) as log:
        if resumed_at is not None:
            log.truncate_after(resumed_at)
        for step in steps:
            log.log(step, loss=1 / (step + 3), tokens=step * 512, tokens_per_second=1000.0)


@given(st.floats(), st.integers(min_value=0, max_value=10**12))
def test_floats_come_back_with_the_same_bits(value: float, tokens: int) -> None:
    """A curve was compared through rounded text, so two runs that differed in the last bit looked equal."""
    record = decode_record(encode_record(7, {"loss": value, "tokens": tokens}))
    if math.isnan(value):
        assert math.isnan(record["loss"])
    else:
        assert struct.pack("d", record["loss"]) == struct.pack("d", value)
    assert record["tokens"] == tokens
    assert isinstance(record["tokens"], int)


def test_resumed_curve_equals_uninterrupted(tmp_path: Path) -> None:
    """Steps between the last checkpoint and the crash appeared twice after a resume."""
    write(tmp_path / "whole", range(1, 31))
    write(tmp_path / "cut", range(1, 24))
    write(tmp_path / "cut", range(21, 31), resumed_at=20)
    assert curve(tmp_path / "cut/metrics.jsonl") == curve(tmp_path / "whole/metrics.jsonl")
    assert len(curve(tmp_path / "cut/metrics.jsonl")) == 30


def test_start_over_removes_everything(tmp_path: Path) -> None:
    """A stage that died before its first checkpoint kept its record of step 0 twice."""
    write(tmp_path, range(0, 5))
    write(tmp_path, range(0, 3), resumed_at=-1)
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("kept_bytes", [1, 9, 25])
def test_torn_last_line_is_repaired(tmp_path: Path, kept_bytes: int) -> None:
    """A crash in the middle of a write glued the next record to half of the last one."""
    write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]) + lines[-1][:kept_bytes])
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3]
    write(tmp_path, range(4, 6), resumed_at=4)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_last_line_that_lacks_only_its_newline_is_kept(tmp_path: Path) -> None:
    """The record of a checkpoint's own step is not written again by the resume, so it must not be thrown away."""
    write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-1])
    write(tmp_path, range(5, 6), resumed_at=4)
    assert [r["step"] for r in read_metrics(path)] == [1, 2, 3, 4, 5]


def test_damage_in_the_middle_is_refused_with_its_line(tmp_path: Path) -> None:
    """Only a torn end is explained by a crash; a hole anywhere else must not be papered over."""
    write(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:9] + b"\n" + lines[2])
    with pytest.raises(UserError, match="line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(tmp_path, PLAIN, is_writer=True)


def test_clock_is_kept_apart_from_the_curve(tmp_path: Path) -> None:
    """Speed in the curve would make every two runs differ."""
    write(tmp_path, range(1, 3))
    record = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert set(record["wall"]) == {"time", "tokens_per_second"}
    assert set(curve(tmp_path / "metrics.jsonl")[0]) == {"step", "loss", "tokens"}


def test_unknown_name_tensor_and_backward_step_are_refused(tmp_path: Path) -> None:
    """A misspelt metric made a second curve nobody looked at; a tensor was written as text."""
    log = MetricsLog(tmp_path, PLAIN, is_writer=True)
    log.log(5, loss=1.0)
    with pytest.raises(ValueError, match="'los' is not in the schema"):
        log.log(6, los=1.0)
    with pytest.raises(TypeError, match="'loss' is a str"):
        log.log(6, loss="1.0")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step 4 after step 5"):
        log.log(4, loss=1.0)
    log.log(5, validation_loss=2.0)
    log.close()
    assert [sorted(r) for r in curve(log.path)] == [["loss", "step"], ["step", "validation_loss"]]


def test_other_ranks_touch_nothing(tmp_path: Path) -> None:
    """Every rank appended its own copy of each record."""
    log = MetricsLog(tmp_path / "stage", ReportConfig(), is_writer=False)
    log.log(1, loss=1.0)
    log.truncate_after(0)
    log.close()
    assert not (tmp_path / "stage").exists()


def test_tensorboard_hides_the_steps_that_come_again(tmp_path: Path) -> None:
    """After a resume TensorBoard drew a zigzag of old and new values."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsLog(tmp_path, ReportConfig(), is_writer=True) as log:
        for step in (1, 2, 3):
            log.log(step, loss=float(step))
    with MetricsLog(tmp_path, ReportConfig(), is_writer=True) as log:
        log.truncate_after(1)
        log.log(2, loss=20.0)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2, "one event file per attempt that logged"
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 1.0), (2, 20.0)]


@pytest.mark.parametrize(
    ("config", "library"),
    [
        (ReportConfig(tensorboard=False, wandb=WandbConfig(mode="offline")), "wandb"),
        (ReportConfig(tensorboard=False, mlflow=MlflowConfig()), "mlflow"),
    ],
)
@pytest.mark.parametrize("is_writer", [True, False])
def test_missing_tracker_names_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: ReportConfig, library: str, is_writer: bool
) -> None:
    """A tracker that is not installed was skipped in silence, or killed rank 0 alone while the others waited."""
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"ra3-megatron\[{library}\]"):
        MetricsLog(tmp_path, config, is_writer)


def test_mlflow_run_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Each attempt opened a new run, so no chart showed the whole curve."""
    mlflow = pytest.importorskip("mlflow", reason="the extra 'mlflow' is not installed")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = ReportConfig(tensorboard=False, mlflow=MlflowConfig(tracking_uri=uri))
    for step in (1, 2):
        with MetricsLog(tmp_path / "stage", config, is_writer=True) as log:
            log.log(step, loss=float(step))
    run_id = (tmp_path / "stage" / "mlflow-id").read_text()
    history = mlflow.MlflowClient(tracking_uri=uri).get_metric_history(run_id, "loss")
    assert [(m.step, m.value) for m in history] == [(1, 1.0), (2, 2.0)]


def test_wandb_run_goes_on_after_a_resume(tmp_path: Path) -> None:
    """Each attempt opened a new run, so no chart showed the whole curve."""
    pytest.importorskip("wandb", reason="the extra 'wandb' is not installed")
    config = ReportConfig(tensorboard=False, wandb=WandbConfig(mode="offline"))
    for step in (1, 2):
        with MetricsLog(tmp_path / "stage", config, is_writer=True) as log:
            log.log(step, loss=float(step))
    run_id = (tmp_path / "stage" / "wandb-id").read_text()
    folders = [p.name for p in (tmp_path / "stage" / "wandb").glob("offline-run-*")]
    assert folders
    assert all(name.endswith(run_id) for name in folders)


def test_documentation_lists_every_field() -> None:
    """A field was added and the table in docs/metrics.md was not."""
    assert schema_markdown() in DOCS.read_text(encoding="utf-8")
    assert all(metric.unit and metric.meaning for metric in METRICS.values())
