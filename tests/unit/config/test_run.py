from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig, config_differences, config_from_dict, load_config

CONFIGS = Path(__file__).parents[3] / "configs"


def test_every_shipped_config_loads():
    """A field renamed in the code and not in configs/ is found here."""
    found = sorted(CONFIGS.glob("*.yaml"))
    assert len(found) >= 5
    for path in found:
        assert load_config(path).run.dir.startswith("runs/")


def test_saved_config_loads_to_the_same_object(tmp_path):
    """The resolved configuration in the run folder is what is compared on resume."""
    config = load_config(CONFIGS / "llama-3.2-1b.yaml", ["train.steps=7", "train.tokens=null"])
    config.save(tmp_path / "config.yaml")
    assert load_config(tmp_path / "config.yaml") == config
    assert config.fingerprint() == load_config(tmp_path / "config.yaml").fingerprint()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stepz=3"], "did you mean 'train.steps'"),
        (["train.seq_len=3"], "did you mean 'train.seq_length'"),
        (["micro_batch_size=3"], "did you mean 'train.micro_batch_size'"),
        (["optimizer.learning_rate=1"], "unknown key 'optimizer.learning_rate'"),
        (["train.steps=many"], "train.steps"),
        (["train.steps=1.5"], "train.steps"),
        (["model.precision=fp7"], "model.precision"),
        (["train.steps"], "section.field=value"),
        (["data.comments=maybe"], "data.comments"),
    ],
)
def test_bad_overrides_are_refused_with_a_hint(overrides, message):
    """Misspelt keys were accepted, and settings silently ignored, in neighbouring systems."""
    with pytest.raises(UserError, match=message) as error:
        load_config(CONFIGS / "quickstart.yaml", overrides)
    assert "\n" not in str(error.value)


def test_unknown_section_in_the_file_is_refused(tmp_path):
    """A whole section in the wrong place must not vanish."""
    (tmp_path / "c.yaml").write_text("trian: {steps: 3}\n")
    with pytest.raises(UserError, match="did you mean 'train'"):
        load_config(tmp_path / "c.yaml")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", "a: 1\na: 2\n"])
def test_unreadable_files_are_refused(tmp_path, content):
    """A list, broken YAML and a duplicate key each give one line."""
    (tmp_path / "c.yaml").write_text(content)
    with pytest.raises(UserError):
        load_config(tmp_path / "c.yaml")
    with pytest.raises(UserError, match="no configuration"):
        load_config(tmp_path / "absent.yaml")


def test_later_override_wins_and_differences_name_fields():
    """Two overrides of one key: the later is in force (verl#1029: the winner must be known)."""
    base = config_from_dict({"train": {"steps": 3}})
    assert config_from_dict({"train": {"steps": 3}}, ["train.steps=4", "train.steps=5"]).train.steps == 5
    changed = config_from_dict(
        {"train": {"steps": 3}}, ["optimizer.lr=0.5", "model.architecture.rope_scaling.factor=2"]
    )
    assert [d.split(":")[0] for d in config_differences(base, changed) if "lr" in d] == ["optimizer.lr"]
    assert config_differences(base, base) == []
    assert base == RunConfig(train=base.train)
