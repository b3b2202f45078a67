"""`--dry-run`: what it prints for every shipped configuration, without a model folder, corpus or GPU."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import estimate_memory
from ra3_megatron.config.run import RunConfig, config_from_dict, load_config, without_arms
from ra3_megatron.config.validate import resolve_layout
from ra3_megatron.stages.dry_run import declared_architecture, default_world, dry_run

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))
PUBLISHED = {
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen3-30b-a3b": 30_532_122_624,
    "smollm2-135m": 134_515_008,
}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No model folder lies where a test runs, and no launcher's variables are set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "300")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys, config: RunConfig, world: int | None = None) -> str:
    dry_run(config, world)
    return re.sub(r"[\s│┃|]+", " ", capsys.readouterr().out)


def test_there_are_configurations():
    assert {p.stem for p in CONFIGS} >= {"quickstart", *PUBLISHED}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
@pytest.mark.parametrize("replicas", [1, 4])
def test_every_shipped_configuration_can_be_reckoned(path, replicas, capsys, tmp_path):
    """A shipped file that does not load, or needs the model to say how large it is."""
    config = load_config(path)
    if path.stem.endswith("-rlvr"):
        config = without_arms(config)  # as `ra3 rlvr`, which these files are for
    world = default_world(replace(config, parallel=replace(config.parallel, data=None)))[0] * replicas
    config = replace(config, parallel=replace(config.parallel, data=None))
    text = printed(capsys, config, world)
    architecture, where = declared_architecture(config)
    layout = resolve_layout(config, world, architecture)
    assert f"{architecture.parameter_count:,} parameters" in text
    if path.stem in PUBLISHED:
        assert architecture.parameter_count == PUBLISHED[path.stem]
        assert "is not on this machine" in where
    t = config.train
    # The arithmetic, by hand.
    p = config.parallel
    assert f"{world} (--world-size) = tensor {p.tensor} x pipeline {p.pipeline} x context {p.context} x data" in text
    per_replica = world // (p.tensor * p.pipeline * p.context)
    assert t.micro_batch_size * per_replica * layout.micro_batches == t.global_batch_size
    assert f"micro-batch {t.micro_batch_size} x data {per_replica} x {layout.micro_batches} micro-batches" in text
    assert f"{t.global_batch_size * t.seq_length:,} = {t.global_batch_size} windows x {t.seq_length} tokens" in text
    memory = estimate_memory(config, architecture, layout)
    for name in ("weights", "gradients", "optimizer", "activations", "logits"):
        value = getattr(memory, name)
        # Of a pipeline, the fullest process may be one without logits.
        assert value > 0 or (name == "logits" and p.pipeline > 1)
        assert f"{name} {value / 2**30:.2f}" in text
    assert f"{memory.total / 2**30:.2f} GiB" in text
    assert not list(tmp_path.iterdir()), "a dry run leaves nothing behind"


def test_printed_configuration_is_the_resolved_one(capsys, tmp_path):
    """What is printed must run as it stands: overrides and defaults included."""
    config = load_config(CONFIGS[0], ["run.seed=77"])
    dry_run(config)
    text = capsys.readouterr().out
    body = text.split("# resolved configuration", 1)[1].split("dry run: nothing was started")[0]
    (tmp_path / "printed.yaml").write_text(body)
    assert load_config(tmp_path / "printed.yaml") == config


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_largest_micro_batch_is_the_last_that_fits(recompute, capsys):
    """The figure a user sets `train.micro_batch_size` to: one window more must not fit, and it must."""
    overrides = [f"model.recompute={recompute}", "parallel.data=null"]
    config = load_config(next(p for p in CONFIGS if p.stem == "qwen2.5-1.5b"), overrides)
    dry_run(config, 1, 80.0)
    [windows] = re.findall(r"fits into 80 GiB.*?train\.micro_batch_size (\d+)", capsys.readouterr().out)
    architecture, _ = declared_architecture(config)
    layout = resolve_layout(config, 1, architecture)

    def total(count: int) -> int:
        changed = replace(config, train=replace(config.train, micro_batch_size=count))
        return estimate_memory(changed, architecture, layout).total

    room = 79 * 2**30
    assert total(int(windows)) <= room < total(int(windows) + 1)
    dry_run(config, 1, 2.0)
    assert "not even a micro-batch of one window" in capsys.readouterr().out


def test_sampling_and_a_second_model_are_counted(capsys):
    """RLVR's cache was a line of its own that the total left out, and the E-step's scorer was nowhere."""
    config = load_config(next(p for p in CONFIGS if p.stem == "quickstart"))
    architecture, _ = declared_architecture(config)
    layout = resolve_layout(config, 1, architecture)
    memory = estimate_memory(config, architecture, layout)
    rows, width = config.latent.max_batch, architecture.num_kv_heads * architecture.head_dim
    # 1024 tokens a row and one for padding, up to a multiple of 16.
    assert config.train.seq_length == 1024
    assert memory.cache == 2 * 4 * rows * 1040 * width * architecture.num_layers
    assert memory.frozen == memory.weights
    parts = memory.weights + memory.gradients + memory.optimizer + memory.activations
    assert memory.total == parts + memory.logits + memory.frozen + memory.cache
    dry_run(config, 1)
    text = capsys.readouterr().out
    assert "key-value cache" in text
    assert f"{rows} rows x 1024 tokens" in text


def test_rows_follow_from_the_memory_they_may_take(capsys):
    """More rows than `latent.cache_gib` holds were counted, or a budget for half a row was taken for one."""
    path = next(p for p in CONFIGS if p.stem == "quickstart")
    config = load_config(path, ["latent.cache_gib=0.05"])
    architecture, _ = declared_architecture(config)
    row = 2 * 4 * 1040 * architecture.num_kv_heads * architecture.head_dim * architecture.num_layers
    fitting = int(0.05 * 2**30) // row
    assert 1 < fitting < config.latent.max_batch
    dry_run(config, 1)
    assert f"{fitting} rows x 1024 tokens (latent.max_batch 64, cache_gib 0.05)" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"latent\.cache_gib = 0\.0001.*one row of 1024 tokens"):
        dry_run(load_config(path, ["latent.cache_gib=0.0001"]), 1)


def test_world_that_does_not_fit_is_refused():
    """The dry run is where one finds out, not the queue."""
    config = config_from_dict({"train": {"steps": 1}, "model": {"architecture": {}}, "parallel": {"tensor": 2}})
    with pytest.raises(UserError, match=r"parallel\.tensor|tensor 2"):
        dry_run(config, 3)


def test_neither_model_nor_shape_is_refused():
    """Nothing can be said about a model that is not there and not described."""
    with pytest.raises(UserError, match=r"model\.architecture for a dry run"):
        dry_run(config_from_dict({"train": {"steps": 1}, "model": {"source": "models/none"}}))
    with pytest.raises(UserError, match="both unset"):
        dry_run(config_from_dict({"train": {"steps": 1}}))


def test_processes_are_the_launchers_or_one_replica(monkeypatch):
    """Under torchrun the figures are of that launch."""
    config = config_from_dict({"parallel": {"tensor": 2, "pipeline": 2}})
    assert default_world(config)[0] == 4
    assert default_world(config_from_dict({"parallel": {"tensor": 2, "data": 3}}))[0] == 6
    for name, value in (
        ("RANK", "1"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "a"), ("MASTER_PORT", "1"),
    ):  # fmt: skip
        monkeypatch.setenv(name, value)
    assert default_world(config) == (8, "from torchrun")


def test_length_in_tokens_is_rounded_up_to_steps(capsys):
    """1,000 tokens at 8 x 512 a step are one step of 4,096."""
    text = printed(
        capsys, config_from_dict({"run": {"arms": ["ntp"]}, "train": {"tokens": 1000}, "model": {"architecture": {}}})
    )
    assert "1 steps, 4,096 tokens" in text
