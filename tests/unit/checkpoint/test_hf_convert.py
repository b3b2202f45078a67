"""Import, export and verification on tiny random models, and every bad input with its cure."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ra3_megatron.checkpoint.convert import export_hf, import_hf, source_architecture
from ra3_megatron.checkpoint.hf_io import plan_shards
from ra3_megatron.checkpoint.verify import VerifyLimits, verify
from ra3_megatron.checkpoint.weights import CheckpointModel, load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import initialize
from tests.unit.model.hf_pairs import ARCHITECTURES, random_hf

FAMILIES = sorted(ARCHITECTURES)


@pytest.fixture(scope="module")
def parallel():
    with initialize() as handle:
        yield handle


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Hugging Face folders of the tiny models, by family."""
    root = tmp_path_factory.mktemp("hf")
    for family in FAMILIES:
        random_hf(ARCHITECTURES[family]).save_pretrained(root / family)
    return root


@pytest.fixture
def qwen(models, tmp_path):
    """A copy of the tiny Qwen2 folder that a test may damage."""
    folder = tmp_path / "qwen2"
    folder.mkdir()
    for path in (models / "qwen2").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_equal(models, tmp_path, family, dtype):
    """Import then export gives the source's tensors bit for bit, no more and no fewer (tied output layer included)."""
    source = models / family
    if dtype == "bfloat16":
        source = tmp_path / "bf16"
        random_hf(ARCHITECTURES[family]).to(torch.bfloat16).save_pretrained(source)
    report = import_hf(source, tmp_path / "ckpt")
    assert report.dtype == dtype
    export = export_hf(tmp_path / "ckpt", tmp_path / "out", max_shard_gb=2e-5)
    assert len(export.files) > 2
    before, after = weights(source), weights(tmp_path / "out")
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)
    assert index["metadata"]["total_size"] == report.bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(models, tmp_path, parallel, family):
    """Equal weights with a wrong rotary base, scaling, norm epsilon or bias still give other logits."""
    import_hf(models / family, tmp_path / "ckpt")
    report = verify(tmp_path / "ckpt", models / family, parallel=parallel)
    assert report.ok, str(report)
    strict = VerifyLimits(max_logit_difference=1e-5, mean_logit_difference=1e-6, top1=1.0, kl=1e-9)
    assert verify(tmp_path / "ckpt", models / family, limits=strict, parallel=parallel).ok


def test_exported_folder_loads_in_transformers(models, tmp_path):
    """Padding rows, a wrong config or index would show here; the config keeps the source's own fields."""
    from transformers import AutoModelForCausalLM

    source = tmp_path / "source"
    random_hf(ARCHITECTURES["qwen2"]).save_pretrained(source)
    edit_config(source, my_own_field=17, bos_token_id=3)
    (source / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    import_hf(source, tmp_path / "ckpt")
    export_hf(tmp_path / "ckpt", tmp_path / "out", dtype="bfloat16")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["my_own_field"] == 17
    assert {config[key] for key in ("dtype", "torch_dtype") if key in config} == {"bfloat16"}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    assert model.generation_config.temperature == 0.25
    assert model.model.embed_tokens.weight.shape[0] == ARCHITECTURES["qwen2"].vocab_size
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_checkpoint_without_a_source_config_exports(models, tmp_path):
    """A model trained from random weights has no hf folder; its config comes from the architecture."""
    import shutil

    from transformers import AutoModelForCausalLM

    import_hf(models / "llama3", tmp_path / "ckpt")
    shutil.rmtree(tmp_path / "ckpt" / "hf")
    report = export_hf(tmp_path / "ckpt", tmp_path / "out")
    assert not report.tokenizer
    assert Architecture.from_folder(tmp_path / "out") == ARCHITECTURES["llama3"]
    ids = torch.arange(100)[None]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(f)(ids).logits for f in (tmp_path / "out", models / "llama3")]
    assert torch.equal(*logits)


def test_padded_vocabulary_is_neither_leaked_nor_random(models, tmp_path, parallel):
    """131 rows in a model padded to 256: the padding is zero after loading, the hash of the rest the import's."""
    report = import_hf(models / "llama3", tmp_path / "ckpt")
    [model] = build_model(report.architecture, ModelConfig(vocab_multiple=256), parallel)
    load_weights(tmp_path / "ckpt", [model], report.architecture, parallel)
    for weight in (model.embedding.word_embeddings.weight, model.output_layer.weight):
        assert weight.shape[0] == 256
        assert weight[:131].abs().min(1).values.max() > 0
        assert not weight[131:].any()


def test_bf16_checkpoint_loads_into_fp32_model(models, tmp_path, parallel):
    """The stored dtype does not dictate the model's: values are those of the rounded weights."""
    report = import_hf(models / "qwen3", tmp_path / "ckpt", dtype="bfloat16")
    [model] = build_model(report.architecture, ModelConfig(), parallel)
    load_weights(tmp_path / "ckpt", [model], report.architecture, parallel)
    found = model.decoder.layers[1].mlp.linear_fc2.weight
    expected = weights(models / "qwen3")["model.layers.1.mlp.down_proj.weight"].bfloat16().float()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_checkpoint_exports_what_was_trained(tmp_path, parallel, precision):
    """A training checkpoint also holds optimizer state and padding; only the trained weights may come out."""
    from tests.distributed.checkpoint_ranks import build, open_store, save, train

    engine = build(parallel, {}, precision)
    for step in (1, 2):
        train(engine, step)
    store = open_store(tmp_path / "run", parallel)
    assert save(store, engine, 2) or store.drain()
    [ckpt] = (tmp_path / "run").glob("step_*")
    report = export_hf(ckpt, tmp_path / "out")
    assert report.dtype == {"fp32": "float32", "bf16": "bfloat16"}[precision]
    result = verify(ckpt, tmp_path / "out", parallel=parallel)
    assert result.ok, str(result)
    trained = unwrap(engine.chunks[0]).decoder.layers[3].mlp.linear_fc2.weight
    assert torch.equal(weights(tmp_path / "out")["model.layers.3.mlp.down_proj.weight"], trained.detach())


def test_import_is_idempotent_and_follows_the_source(qwen, tmp_path):
    """An unchanged source is not imported twice; a changed one is, and another dtype too."""
    first = import_hf(qwen, tmp_path / "ckpt")
    again = import_hf(qwen, tmp_path / "ckpt")
    assert (first.up_to_date, again.up_to_date) == (False, True)
    assert again.parameters_sha256 == first.parameters_sha256
    assert not import_hf(qwen, tmp_path / "ckpt", dtype="bfloat16").up_to_date
    rewrite(qwen, lambda t: t["model.norm.weight"].add_(1))
    changed = import_hf(qwen, tmp_path / "ckpt")
    assert not changed.up_to_date
    assert changed.parameters_sha256 != first.parameters_sha256
    assert source_architecture(tmp_path / "ckpt") == source_architecture(qwen) == ARCHITECTURES["qwen2"]


def test_export_is_idempotent_and_follows_the_checkpoint(qwen, tmp_path):
    """A stale export of an older checkpoint must not pass for the new one."""
    import_hf(qwen, tmp_path / "ckpt")
    assert not export_hf(tmp_path / "ckpt", tmp_path / "out").up_to_date
    assert export_hf(tmp_path / "ckpt", tmp_path / "out").up_to_date
    rewrite(qwen, lambda t: t["model.norm.weight"].add_(1))
    import_hf(qwen, tmp_path / "ckpt")
    assert not export_hf(tmp_path / "ckpt", tmp_path / "out").up_to_date
    assert torch.equal(weights(tmp_path / "out")["model.norm.weight"], weights(qwen)["model.norm.weight"])


def test_plan_shards_keeps_order_and_limit():
    """A tensor larger than a shard gets its own; nothing is lost or reordered."""
    assert plan_shards({"a": 4, "b": 4, "c": 9, "d": 1, "e": 7}, 8) == [["a", "b"], ["c"], ["d", "e"]]


# ------------------------------------------------------------------------------------------------- verification


def swap_heads(t):
    weight = t["model.layers.0.self_attn.q_proj.weight"]
    head = weight[:16].clone()
    weight[:16] = weight[16:32]
    weight[16:32] = head


def swap_gate_and_up(t):
    names = [f"model.layers.1.mlp.{x}_proj.weight" for x in ("gate", "up")]
    t[names[0]], t[names[1]] = t[names[1]].clone(), t[names[0]].clone()


def shift_bias(t):
    t["model.layers.1.self_attn.k_proj.bias"].copy_(t["model.layers.1.self_attn.k_proj.bias"].roll(1))


@pytest.mark.parametrize("damage", [swap_heads, swap_gate_and_up, shift_bias])
def test_verify_sees_one_wrong_tensor(models, qwen, tmp_path, parallel, damage):
    """The classic conversion bugs keep all shapes; both the weights and the logits must show them."""
    rewrite(qwen, damage)
    import_hf(qwen, tmp_path / "ckpt")
    report = verify(tmp_path / "ckpt", models / "qwen2", parallel=parallel)
    assert not report.ok
    assert "weight difference (float32)" in report.failed()
    assert "max |Δ logit| / std" in report.failed()
    assert "FAILED" in str(report)


def test_verify_sees_a_wrong_setting_behind_equal_weights(models, qwen, tmp_path, parallel):
    """A wrong rotary base leaves every weight in place; only the logits tell."""
    for key in ("rope_theta", "rope_parameters"):
        edit_config(qwen, **{key: 5000.0 if key == "rope_theta" else {"rope_type": "default", "rope_theta": 5000.0}})
    import_hf(qwen, tmp_path / "ckpt")
    report = verify(tmp_path / "ckpt", models / "qwen2", parallel=parallel)
    assert "max |Δ logit| / std" in report.failed()
    assert "weight difference (float32)" not in report.failed()


def test_verify_lists_missing_tensors(models, qwen, tmp_path, parallel):
    """A reference with other tensors is a difference to report, not a crash."""
    import_hf(models / "qwen2", tmp_path / "ckpt")
    rewrite(qwen, lambda t: t.update(extra_weight=torch.ones(1)))
    report = verify(tmp_path / "ckpt", qwen, parallel=parallel)
    assert report.failed() == ("extra",)


# ---------------------------------------------------------------------------------------------------- bad inputs


def lm_head_differs(folder):
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def index_names_a_missing_file(folder):
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-00002-of-00002.safetensors"}})
    )


def only_pickles(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


BAD = {
    "lost tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), "1 missing .model.norm.weight"),
    "extra tensor": (lambda f: rewrite(f, lambda t: t.update(x=torch.ones(1))), r"1 extra \(x\)"),
    "wrong shape": (lambda f: edit_config(f, vocab_size=132), r"misshaped .*\[131, 48\], expected \[132, 48\]"),
    "not tied": (lm_head_differs, "ties the embeddings, but lm_head.weight differs.*tie_word_embeddings to false"),
    "NaN": (lambda f: rewrite(f, lambda t: t["model.norm.weight"].fill_(float("nan"))), "not finite"),
    "truncated": (truncate, "corrupt or truncated.*copy the model again"),
    "foreign": (lambda f: (f / "model.safetensors").write_text("no weights here"), "corrupt or truncated"),
    "LFS": (lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com/spec"), "git lfs pull"),
    "missing shard": (index_names_a_missing_file, "1 of 2 weight files.*model-00002-of-00002.safetensors"),
    "bad index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), "not a valid safetensors index"),
    "pickles": (only_pickles, "pickles.*save_pretrained"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no weights found"),
    "loose": (lambda f: (f / "model.safetensors").rename(f / "model-7.safetensors"), "neither model.safetensors nor"),
    "no config": (lambda f: (f / "config.json").unlink(), "give a folder with config.json"),
    "integers": (lambda f: rewrite(f, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].char()})), "I8"),
}  # fmt: skip


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_source_is_refused_and_nothing_is_left(qwen, tmp_path, case):
    """Each broken source gives one line with a cure, and no half-written folder."""
    damage, message = BAD[case]
    damage(qwen)
    with pytest.raises(UserError, match=message):
        import_hf(qwen, tmp_path / "out" / "ckpt")
    assert list((tmp_path / "out").glob("**/*")) == []


def test_bad_arguments(qwen, tmp_path):
    """Wrong paths and dtypes say what to give instead."""
    with pytest.raises(UserError, match="does not exist"):
        import_hf(tmp_path / "nowhere", tmp_path / "ckpt")
    with pytest.raises(UserError, match=r"give the folder that holds config.json"):
        import_hf(qwen / "config.json", tmp_path / "ckpt")
    with pytest.raises(UserError, match="float32, bfloat16, float16"):
        import_hf(qwen, tmp_path / "ckpt", dtype="int8")
    with pytest.raises(UserError, match="not an imported checkpoint"):
        import_hf(qwen, tmp_path)
    import_hf(qwen, tmp_path / "ckpt")
    with pytest.raises(UserError, match="not written by an export"):
        export_hf(tmp_path / "ckpt", qwen)
    with pytest.raises(UserError, match="above 0"):
        export_hf(tmp_path / "ckpt", tmp_path / "out", max_shard_gb=0)
    with pytest.raises(UserError, match="no DONE"):
        export_hf(qwen, tmp_path / "out")
    assert (qwen / "model.safetensors").is_file()


def test_float16_overflow_is_refused(qwen, tmp_path):
    """Weights beyond float16's range would become infinite without a word."""
    rewrite(qwen, lambda t: t["model.layers.0.mlp.up_proj.weight"].mul_(1e6))
    with pytest.raises(UserError, match="not finite in float16"):
        import_hf(qwen, tmp_path / "ckpt", dtype="float16")
    assert not (tmp_path / "ckpt").exists()


def test_damaged_checkpoint_is_refused(qwen, tmp_path, parallel):
    """A lost or cut file, another architecture and changed weights are all seen before anything is exported."""
    ckpt = tmp_path / "ckpt"
    report = import_hf(qwen, ckpt)
    [data] = (ckpt / "dist").glob("*.distcp")
    content = data.read_bytes()

    data.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot read"):
        export_hf(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()

    value = weights(qwen)["model.layers.0.mlp.down_proj.weight"][0, :8].contiguous().numpy().tobytes()
    at = content.index(value)
    data.write_bytes(content[: at + 2] + bytes([content[at + 2] ^ 0xFF]) + content[at + 3 :])
    [model] = build_model(report.architecture, ModelConfig(), parallel)
    with pytest.raises(UserError, match="hash"):
        load_weights(ckpt, [model], report.architecture, parallel)
    with pytest.raises(UserError, match="hash"):
        export_hf(ckpt, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    data.write_bytes(content)
    load_weights(ckpt, [model], report.architecture, parallel)
    with pytest.raises(UserError, match="num_layers: checkpoint 2, run 3"):
        load_weights(ckpt, [model], replace(report.architecture, num_layers=3), parallel)

    other = replace(report.architecture, num_layers=3).to_dict()
    (ckpt / "architecture.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"is \[2, .*\] instead of \[3, "):
        CheckpointModel(ckpt)
