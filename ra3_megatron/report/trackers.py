"""Places metrics go to besides `metrics.jsonl`. Each library is imported here and nowhere else."""

import secrets
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.sections import MlflowConfig, ReportConfig, WandbConfig


class Tracker(Protocol):
    """A sink for metrics that can go on after a resume."""

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Record the values of a step."""

    def restart_after(self, step: int) -> None:
        """Steps later than `step` will come again and replace what was recorded."""

    def close(self) -> None:
        """Flush and finish."""


def make_trackers(folder: Path, config: ReportConfig, is_writer: bool) -> list[Tracker]:
    """The trackers of `config`, one run of theirs per stage folder.

    Raises UserError on every process when one is not installed; only the writer gets any.
    """
    wandb = _import_wandb() if config.wandb else None
    mlflow = _import_mlflow() if config.mlflow else None
    trackers: list[Tracker] = []
    if not is_writer:
        return trackers
    if config.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard"))
    if wandb is not None and config.wandb:
        trackers.append(WandbTracker(wandb, folder, config.wandb))
    if mlflow is not None and config.mlflow:
        trackers.append(MlflowTracker(mlflow, folder, config.mlflow))
    return trackers


def _import_wandb() -> ModuleType:
    try:
        import wandb
    except ImportError:
        raise UserError(
            "report.wandb is set; wandb is not installed; pip install 'ra3-megatron[wandb]' or remove the section"
        ) from None
    return wandb


def _import_mlflow() -> ModuleType:
    try:
        import mlflow
    except ImportError:
        raise UserError(
            "report.mlflow is set; mlflow is not installed; pip install 'ra3-megatron[mlflow]' or remove the section"
        ) from None
    return mlflow


class TensorBoardTracker:
    """TensorBoard event files in `<stage>/tensorboard`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._writer: Any = None
        self._purge_step: int | None = None

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Write one scalar per value; the clock's time is TensorBoard's own column."""
        if self._writer is None:
            # Here, not at the top: torch takes seconds to import and a run report needs none of it.
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._folder), purge_step=self._purge_step)
        for name, value in values.items():
            if name != "time":
                self._writer.add_scalar(name, value, step)
        # A killed run should lose no more here than in metrics.jsonl.
        self._writer.flush()

    def restart_after(self, step: int) -> None:
        """Tell TensorBoard to hide the steps that will come again."""
        self.close()
        self._purge_step = step + 1

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandbTracker:
    """A Weights & Biases run, continued under the id in `<stage>/wandb-id`."""

    def __init__(self, wandb: ModuleType, folder: Path, config: WandbConfig) -> None:
        id_file = folder / "wandb-id"
        if not id_file.exists():
            atomic_write_text(id_file, secrets.token_hex(4))
        self._run = wandb.init(
            project=config.project,
            entity=config.entity,
            mode=config.mode,
            dir=str(folder),
            name=f"{folder.parent.name}/{folder.name}",
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
        )
        # Its own step counter refuses to go back, which a resume does; a metric as the axis does not mind.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Send the values of a step."""
        self._run.log({"step": step, **values})

    def restart_after(self, step: int) -> None:
        """Nothing to do: repeated steps are drawn over the old ones."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowTracker:
    """An MLflow run, continued under the id in `<stage>/mlflow-id`."""

    def __init__(self, mlflow: ModuleType, folder: Path, config: MlflowConfig) -> None:
        self._client = mlflow.MlflowClient(tracking_uri=config.tracking_uri)
        id_file = folder / "mlflow-id"
        if not id_file.exists():
            experiment = self._client.get_experiment_by_name(config.experiment)
            experiment_id = (
                experiment.experiment_id if experiment else self._client.create_experiment(config.experiment)
            )
            run = self._client.create_run(experiment_id, run_name=f"{folder.parent.name}/{folder.name}")
            atomic_write_text(id_file, run.info.run_id)
        self._run_id = id_file.read_text(encoding="utf-8").strip()
        self._client.update_run(self._run_id, status="RUNNING")

    def log(self, step: int, values: Mapping[str, float | int]) -> None:
        """Send the values of a step."""
        for name, value in values.items():
            self._client.log_metric(self._run_id, name, float(value), step=step)

    def restart_after(self, step: int) -> None:
        """Nothing to do: MLflow keeps the newest value of a step."""

    def close(self) -> None:
        """Mark the run as finished."""
        self._client.set_terminated(self._run_id)
