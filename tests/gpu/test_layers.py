"""Transformer Engine's layers against torch's on the same weights, and packed windows."""

import ast
import inspect
from pathlib import Path

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.precision import describe_layers, layer_facts, renew_quantised_weights
from tests.gpu.models import FAMILIES, build, packed_logits, relative, same_weights

LENGTHS = (100, 28, 1, 383)


def ids(arch, parallel):
    g = torch.Generator().manual_seed(1)
    return torch.randint(arch.vocab_size, (sum(LENGTHS),), generator=g).to(parallel.device)


@pytest.mark.parametrize("name", FAMILIES)
def test_bf16_equals_torch_layers_in_fp32(te, parallel, name):
    """Rotary positions, scaling, biases, norms and head groups as the fused kernels read them.

    Largest error within 1 % of the largest logit, and no further from fp32 than torch's layers in BF16 are.
    """
    arch = FAMILIES[name]
    [chunk] = build(arch, parallel, layers="te")
    [plain] = build(arch, parallel, layers="local")
    [local] = build(arch, parallel, layers="local", precision="fp32")
    # The same numbers, not their roundings: what is compared are the layers.
    for other in (plain, local):
        same_weights(chunk, other)
    tokens = ids(arch, parallel)
    reference = packed_logits(local, tokens, LENGTHS)
    found = packed_logits(chunk, tokens, LENGTHS)
    largest = float((found - reference).abs().max() / reference.abs().max())
    error, torchs = relative(found, reference), relative(packed_logits(plain, tokens, LENGTHS), reference)
    print(f"{name}: largest error {largest:.2e}; norms: {error:.2e}, torch's layers in BF16 {torchs:.2e}")
    # Norms of heads make attention with random weights sharp, and BF16's rounding larger.
    assert largest <= (2e-2 if arch.qk_norm else 1e-2)
    assert torchs <= 2e-2
    assert error <= 1.3 * torchs
    assert "TEDotProductAttention" in describe_layers(layer_facts([chunk]))[0]


@pytest.mark.parametrize("layers", ["te", "local"])
def test_packed_equals_separate(te, parallel, layers):
    """A sequence that sees the one before it, or whose positions go on from there."""
    arch = FAMILIES["qwen3"]
    [chunk] = build(arch, parallel, layers=layers)
    tokens = ids(arch, parallel)
    together = packed_logits(chunk, tokens, LENGTHS)
    alone = torch.cat([packed_logits(chunk, part, (len(part),)) for part in tokens.split(list(LENGTHS))])
    error = relative(together, alone)
    print(f"{layers}: packed against separate, relative {error:.2e}")
    assert error <= 1e-2
    # Other neighbours, same numbers: nothing leaks.
    other = tokens.clone()
    other[:100] = (other[:100] + 7) % arch.vocab_size
    assert relative(packed_logits(chunk, other, LENGTHS)[100:], together[100:]) <= 5e-3


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise"])
def test_fp8_logits_are_near_bf16(hopper, parallel, recipe):
    """FP8 products of the wrong layout are not near at all."""
    arch = FAMILIES["qwen2"]
    [bf16] = build(arch, parallel, layers="te")
    [chunk] = build(arch, parallel, precision="fp8", fp8_recipe=recipe)
    same_weights(bf16, chunk)
    tokens = ids(arch, parallel)
    reference = packed_logits(bf16, tokens, LENGTHS)
    positions = torch.cat([torch.arange(n) for n in LENGTHS]).to(parallel.device)[None]
    for _ in range(3):  # the delayed recipe's first scales are 1; they are updated in passes with gradients alone
        chunk(tokens[None], positions, None, packed_seq_params=packed_params(LENGTHS, parallel.device))
        renew_quantised_weights([chunk])
    error = relative(packed_logits(chunk, tokens, LENGTHS), reference)
    print(f"{recipe}: relative error of the logits against BF16 {error:.2e}")
    assert error <= 0.15


def test_recipes_of_another_chip_are_refused(te, parallel):
    """mxfp8 on Hopper failed in the first forward pass, after the weights were loaded."""
    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this chip has mxfp8")
    for recipe in ("mxfp8", "nvfp4"):
        with pytest.raises(UserError, match=rf"{recipe} on .*compute capability"):
            build(FAMILIES["qwen2"], parallel, precision="fp8", fp8_recipe=recipe)


def test_the_stand_in_has_the_real_signatures(te):
    """Tests on a CPU would pass with arguments that the real package refuses."""
    import transformer_engine.pytorch as real

    source = Path(__file__).parents[1] / "fake_te" / "transformer_engine" / "pytorch"
    checked = 0
    for path, names in (
        ("modules.py", ("Linear", "RMSNorm", "GroupedLinear")),
        ("attention/__init__.py", ("DotProductAttention",)),
    ):
        for node in ast.walk(ast.parse((source / path).read_text())):
            if isinstance(node, ast.ClassDef) and node.name in names:
                init = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__")
                ours = {a.arg for a in init.args.args} - {"self"}
                theirs = inspect.signature(getattr(real, node.name).__init__).parameters
                open_ended = any(p.kind is p.VAR_KEYWORD for p in theirs.values())
                assert open_ended or ours <= set(theirs), (node.name, ours - set(theirs))
                checked += 1
    assert checked == 4
