"""The configuration of a run: loading, overriding, saving and comparing it."""

import difflib
import hashlib
import re
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException
from yaml import YAMLError

from ra3_megatron.config.data import DataConfig
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.evaluation import EvaluationConfig
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.judge import JudgeConfig
from ra3_megatron.config.ra3 import BaseConfig, GenerateConfig, LatentConfig, MeasureConfig, VariationalConfig
from ra3_megatron.config.rlvr import RlvrConfig
from ra3_megatron.config.sections import (
    CheckpointConfig,
    ExportConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ReportConfig,
    RunSection,
    TrainConfig,
)


@dataclass(frozen=True)
class RunConfig:
    """One run: one file, one object."""

    run: RunSection = field(default_factory=RunSection)
    """Identity: folder, seed, arm."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Which model, in which numbers."""
    data: DataConfig = field(default_factory=DataConfig)
    """Corpus, tokenizer, filters."""
    base: BaseConfig = field(default_factory=BaseConfig)
    """A base model made here."""
    latent: LatentConfig = field(default_factory=LatentConfig)
    """How thoughts are written and sampled."""
    variational: VariationalConfig = field(default_factory=VariationalConfig)
    """E-step."""
    generate: GenerateConfig = field(default_factory=GenerateConfig)
    """Rationale generation."""
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    """Held-out measurements."""
    rlvr: RlvrConfig = field(default_factory=RlvrConfig)
    """Reinforcement learning with judged programs."""
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    """Where programs are judged."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    """Benchmarks at the end."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Spread over processes."""
    train: TrainConfig = field(default_factory=TrainConfig)
    """Length and batches."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """AdamW and its schedule."""
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When checkpoints are written and kept."""
    report: ReportConfig = field(default_factory=ReportConfig)
    """What is logged."""
    export: ExportConfig = field(default_factory=ExportConfig)
    """Hugging Face folder at the end."""

    def to_yaml(self) -> str:
        """The resolved configuration as YAML, every field written out."""
        return OmegaConf.to_yaml(OmegaConf.structured(self))

    def save(self, path: Path | str) -> None:
        """Write the resolved configuration."""
        atomic_write_text(path, self.to_yaml())

    def fingerprint(self, *sections: str) -> str:
        """SHA-256 of the named sections (all when none is named), for comparing runs."""
        chosen = sections or tuple(f.name for f in fields(self))
        text = "".join(f"{name}:\n{OmegaConf.to_yaml(OmegaConf.structured(getattr(self, name)))}" for name in chosen)
        return hashlib.sha256(text.encode()).hexdigest()


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Read a YAML file and apply `section.field=value` overrides; later ones win.

    Raises UserError for a missing or unreadable file, an unknown key (with the nearest match), a value of the wrong
    type and an override that is not of the form `section.field=value`.
    """
    path = Path(path)
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(
            f"no configuration at {path}; give the path of a YAML file such as configs/quickstart.yaml"
        ) from None
    except (YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if not OmegaConf.is_dict(loaded):
        raise UserError(f"{path} holds a list or nothing; a configuration is a mapping of sections")
    return _build(OmegaConf.to_container(loaded, resolve=False), list(overrides), str(path))


def config_from_dict(data: dict[str, Any], overrides: list[str] | tuple[str, ...] = ()) -> RunConfig:
    """Like `load_config`, from plain data."""
    return _build(data, list(overrides), "configuration")


def without_arms(config: RunConfig) -> RunConfig:
    """The same run with RLVR alone: nothing is mid-trained before. Raises UserError when RLVR is not configured."""
    if not config.rlvr.steps:
        raise UserError("rlvr.steps is 0; set the number of steps, and rlvr.tasks to the file of tasks to train on")
    return replace(config, run=replace(config.run, arms=()))


def _build(data: Any, overrides: list[str], where: str) -> RunConfig:
    for override in overrides:
        if not re.fullmatch(r"[A-Za-z_][\w.]*=.*", override, flags=re.DOTALL):
            raise UserError(f"override '{override}' is not of the form section.field=value, such as train.steps=100")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), OmegaConf.create(data))
        for override in overrides:
            # One at a time, so that an error names the override it is about.
            merged = OmegaConf.merge(merged, _parse_override(override))
        config = OmegaConf.to_object(merged)
    except ConfigKeyError as error:
        raise UserError(_unknown_key(str(error.full_key), where)) from None
    except UserError as error:
        # OmegaConf appends lines of its own to an error of a section's checks.
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    except OmegaConfBaseException as error:
        message = str(error).splitlines()[0]
        raise UserError(f"{where}: {error.full_key or 'value'}: {message}") from None
    assert isinstance(config, RunConfig)
    return config


def _parse_override(override: str) -> Any:
    key, value = override.split("=", 1)
    return OmegaConf.from_dotlist([f"{key}={value}" if value != "" else f'{key}=""'])


def _known_keys(cls: type, prefix: str = "") -> list[str]:
    """Every dotted key of a configuration class."""
    keys = []
    hints = get_type_hints(cls)
    for f in fields(cls):
        name = f"{prefix}{f.name}"
        keys.append(name)
        for kind in (hints[f.name], *get_args(hints[f.name])):
            if isinstance(kind, type) and is_dataclass(kind):
                keys.extend(_known_keys(kind, name + "."))
    return keys


def _unknown_key(key: str, where: str) -> str:
    known = _known_keys(RunConfig)
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if not close:
        # A right field in the wrong section is the other common slip.
        last = key.rsplit(".", 1)[-1]
        close = [k for k in known if k.rsplit(".", 1)[-1] == last][:1]
    hint = (
        f"; did you mean '{close[0]}'?" if close else f"; sections are {', '.join(f.name for f in fields(RunConfig))}"
    )
    return f"{where}: unknown key '{key}'{hint}"


def config_differences(old: RunConfig, new: RunConfig) -> list[str]:
    """`key: old -> new` for every field that differs."""

    def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
        if isinstance(value, dict):
            return {k: v for key, item in value.items() for k, v in flatten(item, f"{prefix}.{key}").items()}
        return {prefix[1:]: value}

    a, b = (flatten(OmegaConf.to_container(OmegaConf.structured(c))) for c in (old, new))
    missing = "(unset)"
    return [
        f"{key}: {a.get(key, missing)} -> {b.get(key, missing)}"
        for key in sorted(set(a) | set(b))
        if a.get(key, missing) != b.get(key, missing)
    ]
