"""Settings of FP8, recompute and offload that do not go together, refused before anything is built."""

import pytest

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.validate import resolve_layout

ARCH = Architecture()
"""4 layers; matrices of 192, 6 x 32, (6 + 4) x 32 and 512."""


def refused(world=1, architecture=ARCH, **sections):
    config = config_from_dict({"train": {"steps": 4}, "run": {"arms": ["ntp"]}, **sections})
    with pytest.raises(UserError) as error:
        resolve_layout(config, world, architecture)
    return str(error.value)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ({"fp8_params": True}, ("model.fp8_params is True", "fp32", "model.precision=fp8")),
        ({"bf16_layers_at_end": 1, "precision": "bf16"}, ("bf16_layers_at_end is 1", "model.precision=fp8")),
        ({"precision": "fp8", "layers": "local"}, ("layers local", "only in Transformer Engine")),
        ({"precision": "fp8", "fp8_params": True, "fp8_recipe": "mxfp8"}, ("fp8_params", "mxfp8", "fp8_params=false")),
        ({"precision": "fp8", "fp8_recipe": "nvfp4", "fp8_format": "e4m3"}, ("fp8_format", "nvfp4")),
        ({"precision": "fp8", "fp8_recipe": "delayed", "bf16_layers_at_start": 1}, ("delayed", "tensorwise")),
        ({"precision": "fp8", "bf16_layers_at_start": 2, "bf16_layers_at_end": 2}, ("none would be left", "4 layers")),
        ({"precision": "fp8", "bf16_layers_at_start": 5}, ("bf16_layers_at_start is 5", "0 to 4")),
        ({"precision": "fp8", "fp8_probe_limit": 0.0}, ("fp8_probe_limit is 0.0",)),
        ({"precision": "fp8", "fp8_amax_history": 0}, ("fp8_amax_history 0", "at least 1")),
        ({"recompute_modules": ["layernorm"]}, ("recompute_modules", "core_attn, mlp")),
        ({"recompute_modules": ["moe"]}, ("recompute_modules", "core_attn, mlp")),
        ({"recompute_layers": 2}, ("recompute_layers is 2", "model.recompute=full")),
        ({"recompute": "full", "recompute_layers": 5}, ("recompute_layers is 5", "1 to 4")),
        ({"offload_layers": 4}, ("offload_layers is 4", "0 to 3")),
        ({"offload_layers": 2, "recompute": "full"}, ("offload_layers is 2", "recompute full")),
    ],
)
def test_settings_that_do_not_go_together(model, names):
    """Megatron ignores some of these and fails on others after the model was built; none says which setting it was."""
    message = refused(model=model)
    for name in names:
        assert name in message


def test_matrices_that_fp8_cannot_take():
    """cuBLAS says no in the first forward pass, after the weights were loaded."""
    fp8 = {"precision": "fp8"}
    odd = Architecture(ffn_hidden_size=520)
    assert "ffn_hidden_size / parallel.tensor gives matrices of 520" in refused(architecture=odd, model=fp8)
    narrow = Architecture(num_heads=4, num_kv_heads=4, head_dim=8, hidden_size=64)
    message = refused(2, narrow, model=fp8 | {"fp8_recipe": "mxfp8"}, parallel={"tensor": 2})
    assert "num_heads x head_dim / parallel.tensor gives matrices of 16" in message
    assert "multiple of 32" in message


def test_tokens_that_fp8_cannot_take():
    """Windows of any length were accepted; with context or sequence parallelism a process has a share of one."""
    message = refused(model={"precision": "fp8"}, train={"steps": 4, "seq_length": 500})
    assert "train.seq_length (500) x micro_batch_size (1) gives 500 tokens per process" in message
    assert "multiple of 16; use 512 tokens" in message
    parallel = {"tensor": 2, "sequence": True, "context": 2}
    message = refused(4, model={"precision": "fp8"}, train={"steps": 4, "seq_length": 328}, parallel=parallel)
    assert "/ parallel.context / parallel.tensor (sequence-parallel) gives 82 tokens" in message
    config = config_from_dict(
        {"train": {"steps": 4, "seq_length": 500, "micro_batch_size": 4}, "model": {"precision": "fp8"}}
        | {"run": {"arms": ["ntp"]}}
    )
    assert resolve_layout(config, 1, ARCH).micro_batches == 2
