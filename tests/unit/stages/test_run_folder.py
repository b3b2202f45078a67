"""The run's folder: whose it is, what may change, and what a copy of it looks like."""

import json
import shutil

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict, load_config
from ra3_megatron.stages.run_folder import RunFolder, new_attempt


def config(**sections):
    return config_from_dict({"train": {"steps": 4}, **sections})


@pytest.fixture
def folder(tmp_path):
    """A run that has prepared its corpus."""
    made = RunFolder(tmp_path / "run")
    made.claim(config(), accept_changes=False)
    made.stage(0, "prepare").finish({"a": 1})
    return made


def test_first_claim_writes_the_resolved_configuration(folder):
    """What ran must be readable from the folder alone, defaults included."""
    assert load_config(folder.path / "config.yaml") == config()


@pytest.mark.parametrize(
    "sections",
    [
        {"train": {"steps": 4, "micro_batch_size": 2}},
        {"parallel": {"tensor": 2, "timeout_s": 5.0}},
        {"checkpoint": {"interval": 3}},
        {"report": {"interval": 1}},
        {"run": {"dir": "elsewhere"}},
        {"model": {"recompute": "full"}},
        {"data": {"workers": 3}},
    ],
)
def test_layout_and_logging_may_change(folder, sections):
    """Resuming over more processes is the point of checkpoints that load in any layout."""
    folder.claim(config(**sections), accept_changes=False)
    assert load_config(folder.path / "config.yaml") == config(**sections), "the latest is what the report shows"


@pytest.mark.parametrize(
    ("sections", "difference"),
    [
        ({"train": {"steps": 5}}, "train.steps: 4 -> 5"),
        ({"train": {"steps": 4, "global_batch_size": 16}}, "train.global_batch_size: 8 -> 16"),
        ({"run": {"seed": 1}}, "run.seed: 1234 -> 1"),
        ({"optimizer": {"lr": 0.5}}, "optimizer.lr: 0.001 -> 0.5"),
        ({"data": {"filters": {"min_tokens": 1}}}, "data.filters.min_tokens: 16 -> 1"),
        ({"model": {"precision": "bf16"}}, "model.precision: fp32 -> bf16"),
    ],
)
def test_what_changes_the_result_is_refused(folder, sections, difference):
    """A folder whose curve was made by two configurations, with one of them on record."""
    before = (folder.path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="--accept-changes") as error:
        folder.claim(config(**sections), accept_changes=False)
    assert difference in str(error.value)
    assert (folder.path / "config.yaml").read_bytes() == before
    folder.claim(config(**sections), accept_changes=True)
    assert load_config(folder.path / "config.yaml") == config(**sections)
    (kept,) = folder.path.glob("config.*.yaml")
    assert kept.read_bytes() == before


def test_a_try_that_made_nothing_binds_nobody(tmp_path):
    """A wrong path in the first try, and its correction was refused as a change."""
    run = RunFolder(tmp_path / "run")
    run.claim(config(), accept_changes=False)
    run.claim(config(run={"seed": 5}), accept_changes=False)
    assert load_config(run.path / "config.yaml").run.seed == 5
    (run.path / "01-ntp" / "checkpoints" / "step_00000002").mkdir(parents=True)
    with pytest.raises(UserError, match=r"run\.seed"):
        run.claim(config(), accept_changes=False)


def test_folder_that_cannot_be_made(tmp_path):
    """A traceback of mkdir."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"run\.dir"):
        RunFolder(tmp_path / "file").claim(config(), accept_changes=False)
    with pytest.raises(UserError, match=r"run\.dir"):
        RunFolder(tmp_path / "file" / "run").claim(config(), accept_changes=False)


def test_result_of_a_stage(folder):
    """DONE is the only thing a next stage may trust."""
    stage = folder.stage(0, "prepare")
    assert stage.done
    assert stage.result() == {"a": 1}
    assert not folder.stage(1, "ntp").done
    (stage.path / "DONE").write_text("{")
    with pytest.raises(UserError, match="DONE is damaged"):
        stage.result()


def test_every_attempt_has_a_folder_and_latest_is_the_newest(folder):
    """The environment of the attempt that failed was overwritten by the one that looked for the reason."""
    stage = folder.stage(1, "ntp")
    attempts = [new_attempt(stage) for _ in range(3)]
    assert [a.name for a in attempts] == ["0001", "0002", "0003"]
    assert (stage.path / "logs" / "latest").resolve() == attempts[-1].resolve()
    for attempt in attempts:
        assert list(attempt.iterdir()), "an account of the environment"


def test_a_copy_without_links_goes_on(folder, tmp_path):
    """Copied with scp or through an object store, `latest` is a folder: the run could not be resumed."""
    stage = folder.stage(1, "ntp")
    new_attempt(stage)
    shutil.copytree(folder.path, tmp_path / "copy")
    copied = RunFolder(tmp_path / "copy").stage(1, "ntp")
    assert not (copied.path / "logs" / "latest").is_symlink()
    attempt = new_attempt(copied)
    assert (copied.path / "logs" / "latest").resolve() == attempt.resolve()
    assert json.loads((RunFolder(tmp_path / "copy").stage(0, "prepare").path / "DONE").read_text()) == {"a": 1}
