"""Transformer Engine and apex as they are found on real machines, with fake packages on the path."""

import importlib
import sys

import pytest
import torch

from ra3_megatron.config.errors import UserError
from ra3_megatron.model import optional


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """A folder on the path for fake packages."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    importlib.invalidate_caches()
    for name in [m for m in sys.modules if m.split(".")[0] in ("apex", "transformer_engine")]:
        del sys.modules[name]


def _fake(folder, name, version=None):
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text("")
    if version:
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    importlib.invalidate_caches()


def test_wrong_apex_is_named(packages):
    """The registry's apex is a web toolkit of 2013; with it Megatron's import ends in a ValueError."""
    optional.check_apex()
    _fake(packages, "apex")
    with pytest.raises(UserError, match="pip uninstall apex"):
        optional.check_apex()
    _fake(packages / "apex", "multi_tensor_apply")
    optional.check_apex()


def test_apex_and_its_extension_are_told_apart(packages, monkeypatch):
    """An apex built without its CUDA extensions was taken for one with fused weight gradients."""
    assert not optional.apex().usable
    assert "not installed" in optional.fused_weight_gradients().reason
    _fake(packages, "apex")
    assert "not NVIDIA's" in optional.apex().reason
    assert "not NVIDIA's" in optional.fused_weight_gradients().reason
    _fake(packages / "apex", "multi_tensor_apply")
    assert optional.apex() == optional.OptionalPackage(True, None, "")
    assert "built without" in optional.fused_weight_gradients().reason
    (packages / f"{optional.FUSED_WEIGHT_GRADIENTS}.py").write_text("")
    importlib.invalidate_caches()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "needs a GPU" in optional.fused_weight_gradients().reason
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert optional.fused_weight_gradients().usable


@pytest.mark.parametrize(
    ("version", "gpu", "usable", "reason"),
    [
        ("2.20.2", True, True, ""),
        ("2.18", True, True, ""),
        ("2.20.2", False, False, "needs a GPU"),
        ("2.21.0", True, False, ">=2.18,<2.21"),
        ("1.13.0", True, False, ">=2.18,<2.21"),
        (None, True, False, "without release information"),
    ],
)
def test_transformer_engine_releases(packages, monkeypatch, version, gpu, usable, reason):
    """A release Megatron was not made for fails in the middle of building a layer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    _fake(packages, "transformer_engine", version)
    found = optional.transformer_engine()
    assert found.usable is usable
    assert reason in found.reason
    if not usable:
        with pytest.raises(UserError, match=r"'ra3-megatron\[te\]'"):
            optional.require_te("model.precision fp8")


@pytest.mark.parametrize(
    ("version", "gpu", "reason"),
    [
        (None, True, "vllm is not installed"),
        ("0.10.2", True, "vllm 0.10.2 is installed; 0.15"),
        ("0.33.0", False, "needs a GPU"),
        ("0.33.0", True, ""),
    ],
)
def test_vllm_releases(packages, monkeypatch, version, gpu, reason):
    """An old release takes the arguments and answers something else."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    if version:
        _fake(packages, "vllm", version)
    found = optional.vllm()
    assert reason in found.reason
    assert found.usable is not bool(reason)
    if reason:
        with pytest.raises(UserError, match=r"'ra3-megatron\[vllm\]'.*latent\.engine=megatron"):
            optional.require_vllm("latent.engine=vllm")
