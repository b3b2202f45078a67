"""What a training run knows besides tensors: counters, data position, schedule; with strict JSON round trip."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError


@dataclass(frozen=True)
class TrainState:
    """Counters and positions of one stage's training. Counters never stand for one another."""

    stage: str
    """Stage that trains, e.g. `variational`, `sft`, `rlvr`."""
    step: int = 0
    """Optimizer steps taken."""
    rollout_round: int = 0
    """Rounds of rollouts generated."""
    em_round: int = 0
    """Rounds of expectation-maximisation completed."""
    tokens: int = 0
    """Tokens trained on, padding left out."""
    samples: int = 0
    """Windows consumed from the data set."""
    skipped_steps: int = 0
    """Steps whose update was skipped because of a non-finite gradient."""
    data: dict[str, Any] = field(default_factory=dict)
    """Data position: `fingerprint` of the data set, `position`, `seed` and what else the sampler needs (plain JSON)."""
    lr_schedule: dict[str, Any] = field(default_factory=dict)
    """Facts of the learning-rate schedule, to tell a changed one (plain JSON)."""
    config_sha256: str = ""
    """Hash of the resolved configuration."""
    layout: dict[str, int] = field(default_factory=dict)
    """Parallel sizes that wrote the checkpoint, e.g. `{"tensor": 2, "pipeline": 1, "data": 4}`."""
    code_tokens: int = 0
    """Tokens of code among those trained on: what training lengths are compared by."""

    def __post_init__(self) -> None:
        for f in fields(self):
            value: Any = getattr(self, f.name)
            kind = _KINDS[f.name]
            # bool is an int to isinstance; a counter that is True is a bug in whoever wrote it.
            if not isinstance(value, kind) or isinstance(value, bool):
                raise UserError(
                    f"training state: field '{f.name}' is {value!r}; it must be of type {kind.__name__}; "
                    "the state was written by another version or by hand"
                )
            if isinstance(value, int) and value < 0:
                raise UserError(f"training state: counter '{f.name}' is {value}; counters start at 0")

    def to_json(self) -> str:
        """Readable JSON; `from_json` gives an equal object. Raises TypeError for values JSON cannot hold."""
        text = json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False)
        assert json.loads(text) == asdict(self), "data and lr_schedule must be plain JSON (string keys, no tuples)"
        return text

    @classmethod
    def from_json(cls, text: str, where: str = "state.json") -> "TrainState":
        """Inverse of `to_json`. Raises UserError for broken JSON, unknown or missing fields and wrong types."""
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"{where}: not valid JSON ({error}); use another checkpoint") from None
        if not isinstance(values, dict):
            raise UserError(f"{where}: holds {type(values).__name__}, expected an object; use another checkpoint")
        known = {f.name for f in fields(cls)}
        if set(values) != known:
            raise UserError(
                f"{where}: unknown fields {sorted(set(values) - known)}, missing fields {sorted(known - set(values))}; "
                "it was written by another version of ra3_megatron: resume with that version"
            )
        return cls(**values)

    def refuse_other_data(self, fingerprint: str, where: str) -> None:
        """Raise UserError unless the state was taken on the data set with `fingerprint`."""
        found = self.data.get("fingerprint")
        if found != fingerprint:
            raise UserError(
                f"{where} was trained on the data set with fingerprint {found}, this run's data set has {fingerprint}; "
                "resume with the data it was trained on, or start a new run from its weights"
            )


_KINDS: dict[str, type] = {
    "stage": str,
    "config_sha256": str,
    "data": dict,
    "lr_schedule": dict,
    "layout": dict,
    **dict.fromkeys(("step", "rollout_round", "em_round", "tokens", "code_tokens", "samples", "skipped_steps"), int),
}


def read_architecture(path: Path) -> Architecture:
    """Read `architecture.json`. Raises UserError when it is missing or damaged."""
    try:
        return Architecture.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an architecture ({error}); use another checkpoint") from None


def refuse_other_architecture(found: Architecture, expected: Architecture, where: str) -> None:
    """Raise UserError naming every field in which the checkpoint's model and this run's differ."""
    mine, theirs = expected.to_dict(), found.to_dict()
    different = [f"{name}: checkpoint {theirs[name]}, run {mine[name]}" for name in mine if mine[name] != theirs[name]]
    if different:
        raise UserError(
            f"{where} holds another model ({'; '.join(different)}); "
            "use the checkpoint of this model, or the model of this checkpoint"
        )
