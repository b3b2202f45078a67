import pytest

from ra3_megatron.config.architecture import Architecture, RopeScaling
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import estimate_memory, parameters_per_rank
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.validate import padded_vocab_size, resolve_layout, total_steps

ARCH = Architecture()


def config(**sections):
    sections.setdefault("train", {})
    sections["train"] = {"steps": 4, **sections["train"]}
    sections.setdefault("run", {"arms": ["ntp"]})
    return config_from_dict(sections)


def test_arithmetic_by_hand():
    """8 processes = 2 x 2 x 1 x 2; 16 windows = 2 x 2 replicas x 4; 4096 rows are padded to a multiple of 256."""
    layout = resolve_layout(
        config(parallel={"tensor": 2, "pipeline": 2}, train={"micro_batch_size": 2, "global_batch_size": 16}), 8, ARCH
    )
    assert (layout.data, layout.micro_batches, layout.tokens_per_step, layout.padded_vocab) == (2, 4, 16 * 512, 4096)
    assert padded_vocab_size(4097, 128, 2) == 4352
    assert total_steps(config(train={"steps": None, "tokens": 8193}), layout, 99) == 2
    assert total_steps(config(train={"steps": None, "epochs": 1.5, "global_batch_size": 16}), layout, 32) == 3


@pytest.mark.parametrize(
    ("sections", "world", "names"),
    [
        ({"parallel": {"tensor": 2}}, 3, ("parallel.tensor", "torchrun")),
        ({"parallel": {"data": 4}}, 2, ("parallel.data", "4 processes")),
        ({"parallel": {"tensor": 4}}, 4, ("num_heads", "parallel.tensor")),
        ({"parallel": {"tensor": 3}}, 3, ("num_kv_heads", "parallel.tensor")),
        ({"parallel": {"pipeline": 3}}, 3, ("num_layers", "parallel.pipeline")),
        ({"parallel": {"pipeline": 2, "virtual_pipeline": 4}}, 2, ("virtual_pipeline",)),
        ({"parallel": {"virtual_pipeline": 2}}, 1, ("virtual_pipeline", "pipeline")),
        ({"parallel": {"sequence": True}}, 1, ("parallel.sequence", "tensor")),
        ({"parallel": {"context": 2}, "train": {"seq_length": 510}}, 2, ("seq_length", "context")),
        ({"train": {"seq_length": 4096}}, 1, ("seq_length", "max_positions")),
        ({"train": {"global_batch_size": 6}}, 4, ("global_batch_size", "micro_batch_size", "use 8")),
        ({"train": {"steps": 3, "tokens": 5}}, 1, ("train.steps", "train.tokens")),
        ({"train": {"steps": None}}, 1, ("train.steps", "none of them")),
        ({"latent": {"format": "tag"}}, 1, ("data.comments is strip", "syntax is true", "keep_as_action")),
        (
            {
                "run": {"arms": ["ra3"]},
                "base": {"tokens": 10},
                "parallel": {"tensor": 2},
                "latent": {"engine": "vllm"},
            },
            2,
            ("latent.engine", "parallel.tensor 2"),
        ),
        (
            {
                "run": {"arms": ["ra3"]},
                "base": {"tokens": 10},
                "parallel": {"tensor": 2},
                "latent": {"cuda_graphs": True},
            },
            2,
            ("latent.cuda_graphs", "parallel.tensor 2", "leave"),
        ),
        ({"train": {"steps": 0}}, 1, ("train.steps", "positive")),
        ({"optimizer": {"min_lr": 1.0}}, 1, ("min_lr", "lr")),
        ({"optimizer": {"warmup_steps": 4}}, 1, ("warmup_steps", "train.steps")),
        ({"parallel": {"overlap_param_gather": True}}, 1, ("overlap_param_gather", "overlap_grad_reduce")),
        ({"train": {"micro_batch_size": 0}}, 1, ("train.micro_batch_size", "at least 1")),
        ({"run": {"arms": ["ra3"]}}, 1, ("run.arms", "model.source", "base.tokens")),
        ({"run": {"arms": ["ra3"]}, "base": {"tokens": 9}, "parallel": {"context": 2}}, 2, ("parallel.context", "ra3")),
        ({"run": {"arms": ["ra3"]}, "base": {"tokens": 9}, "variational": {"snippets_per_step": 9}}, 2, ("use 10",)),
        ({"base": {"tokens": 9}, "model": {"source": "x"}}, 1, ("base.tokens", "model.source")),
        ({"data": {"snippet_tokens": 513}}, 1, ("data.snippet_tokens", "train.seq_length")),
    ],
)
def test_each_rule_names_its_fields_and_a_cure(sections, world, names):
    """World sizes and batches that do not fit are refused before anything is built."""
    with pytest.raises(UserError) as error:
        resolve_layout(config(**sections), world, ARCH)
    for name in names:
        assert name in str(error.value)


def test_parameter_count_of_the_papers_models():
    """Published sizes: Qwen2.5-1.5B 1,543,714,304; Llama-3.2-1B 1,235,814,400; Llama-3.1-8B 8,030,261,248."""
    qwen = Architecture("qwen2", 28, 1536, 12, 2, 128, 8960, 151936, True, True)
    llama1 = Architecture("llama", 16, 2048, 32, 8, 64, 8192, 128256, True, False)
    llama8 = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, False, False)
    assert qwen.parameter_count == 1_543_714_304
    assert llama1.parameter_count == 1_235_814_400
    assert llama8.parameter_count == 8_030_261_248


def test_stages_add_up_to_the_model():
    """Without padding, tensor 1: the stages hold every weight once, the tied embedding twice."""
    layout = resolve_layout(config(parallel={"pipeline": 2}, train={"global_batch_size": 8}), 2, ARCH)
    assert sum(parameters_per_rank(ARCH, layout)) == ARCH.parameter_count + ARCH.vocab_size * ARCH.hidden_size
    memory = estimate_memory(config(parallel={"pipeline": 2}), ARCH, layout)
    assert memory.weights == memory.gradients == 4 * memory.parameters_on_rank


MIXTURE = Architecture(
    "qwen3_moe", 2, 64, 4, 2, 16, 96, 128, False, False, True,
    num_experts=6, experts_per_token=2, expert_ffn_hidden_size=24, norm_topk_prob=True,
)  # fmt: skip


def test_weights_and_work_of_a_mixture():
    """Published: Qwen3-30B-A3B, 30,532,122,624 weights; of a small one by hand, all and those a token meets."""
    big = Architecture(
        "qwen3_moe", 48, 2048, 32, 4, 128, 6144, 151936, False, False, True,
        num_experts=128, experts_per_token=8, expert_ffn_hidden_size=768, norm_topk_prob=True,
    )  # fmt: skip
    assert big.parameter_count == 30_532_122_624
    assert big.parameter_count - big.inactive_parameters == 3_353_032_704
    attention = 64 * 16 * (2 * 4 + 2 * 2)
    layer = attention + 2 * 16 + 2 * 64 + 6 * 64 + 6 * (3 * 64 * 24)
    assert MIXTURE.parameter_count == 2 * layer + 2 * 128 * 64 + 64
    met = attention + 6 * 64 + 2 * (3 * 64 * 24)
    assert MIXTURE.flops_per_token(10) == 3 * (2 * (2 * met + 4 * 4 * 16 * 10) + 2 * 64 * 128)


@pytest.mark.parametrize(("tensor", "expert", "expert_tensor"), [(1, 1, None), (1, 3, None), (2, 3, None), (2, 6, 1)])
def test_experts_are_counted_where_they_are(tensor, expert, expert_tensor):
    """A dry run that gives every process all experts, or shards their optimizer over the wrong ranks."""
    sizes = {"tensor": tensor, "sequence": tensor > 1, "expert": expert, "expert_tensor": expert_tensor}
    c = config(parallel=sizes, train={"global_batch_size": 12}, model={"vocab_multiple": 1})
    layout = resolve_layout(c, 12, MIXTURE)
    shared = layout.expert * layout.expert_tensor
    assert layout.expert_data == 12 // shared
    (count,) = parameters_per_rank(MIXTURE, layout)
    experts = 2 * 6 * (3 * 64 * 24)
    replicated = 2 * (2 * 64 + 2 * 16 + 6 * 64) + 64
    outside = (MIXTURE.parameter_count - experts - replicated) // tensor + replicated
    assert count == outside + experts // shared
    memory = estimate_memory(c, MIXTURE, layout)
    assert memory.optimizer == int(8 * (outside / layout.data + experts / 12))


def test_mixture_survives_hugging_face_and_plain_data():
    """An expert count or normalisation that is lost on the way to config.json and back changes every logit."""
    assert Architecture.from_hf(MIXTURE.to_hf()) == MIXTURE
    assert Architecture.from_dict(MIXTURE.to_dict()) == MIXTURE
    hf = MIXTURE.to_hf()
    hf["num_local_experts"] = hf.pop("num_experts")
    assert Architecture.from_hf(hf) == MIXTURE
    for change in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [1]}):
        with pytest.raises(UserError, match="some layers have no experts"):
            Architecture.from_hf(MIXTURE.to_hf() | change)
    for change, word in (
        ({"use_sliding_window": True, "max_window_layers": 9}, "sliding"),
        ({"attention_bias": True}, "attention_bias"),
        ({"num_experts_per_tok": 7}, "no more than there are"),
        ({"num_experts_per_tok": 1}, "always be 1"),
        ({"num_experts_per_tok": "two"}, "num_experts_per_tok = 'two'"),
    ):
        with pytest.raises(UserError, match=word):
            Architecture.from_hf(MIXTURE.to_hf() | change)
    with pytest.raises(UserError, match="only qwen3_moe has experts"):
        Architecture("qwen3", num_experts=4)
    with pytest.raises(UserError, match="has no experts"):
        resolve_layout(config(parallel={"expert": 2}), 2, ARCH)


@pytest.mark.parametrize("scaling", [None, RopeScaling(32.0)])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_architecture_survives_hugging_face_and_plain_data(family, scaling):
    """Nothing that changes the logits may be lost on the way to config.json and back."""
    a = Architecture(
        family, qkv_bias=family == "qwen2", qk_norm=family == "qwen3", rope_scaling=scaling, head_dim=48, rope_base=5e5
    )
    assert Architecture.from_hf(a.to_hf()) == a
    assert Architecture.from_dict(a.to_dict()) == a


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"model_type": "mamba"}, "has no mapping"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "yarn"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"attention_bias": True}, "attention_bias"),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
)
def test_variants_that_would_change_the_logits_are_refused(change, word):
    """A model with identical weights and other logits is the worst bug of converters (Megatron-Bridge#2381)."""
    hf = Architecture("llama", qkv_bias=False).to_hf() | change
    with pytest.raises(UserError, match=word):
        Architecture.from_hf(hf)
