"""Fast paths as `ra3 doctor` explains them, on machines that are not here."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from ra3_megatron.model.optional import OptionalPackage
from ra3_megatron.stages import doctor
from ra3_megatron.stages.fast_paths import FastPath, Machine, fast_paths

NONE = OptionalPackage(False, None, "is not installed")
THERE = OptionalPackage(True, "1.0", "")
CPU = Machine(False, NONE, {}, NONE, False, NONE, ("flash (CPU)",), triton=True)
BARE_GPU = replace(CPU, gpu=True, attention=("flash", "cuDNN", "memory-efficient"))
HOPPER = replace(BARE_GPU, te=THERE, te_recipes={"delayed, tensorwise": "", "blockwise": "", "mxfp8": "needs sm_100"})
AMPERE = replace(BARE_GPU, te=THERE, te_recipes={"delayed, tensorwise": "needs sm_89", "blockwise": "needs sm_90"})


def paths(machine: Machine) -> dict[str, FastPath]:
    keys = ("layers", "FP8", "attention", "loss", "weight gradients", "norm", "Adam", "graphs")
    found = dict(zip(keys, fast_paths(machine), strict=True))
    assert all(key.split()[0].lower() in path.name.lower() for key, path in found.items())
    return found


def test_a_laptop_is_told_that_gpu_paths_need_a_gpu() -> None:
    """A CPU's user was told to build Transformer Engine, which does not run there."""
    found = paths(CPU)
    assert {key for key, path in found.items() if path.state == "no GPU"} == {
        "layers", "FP8", "loss", "weight gradients", "norm", "graphs",
    }  # fmt: skip
    assert found["Adam"].state == found["attention"].state == "on"


def test_every_path_that_is_off_says_what_it_costs_and_what_brings_it() -> None:
    """`off` alone left the reader to guess whether it mattered."""
    for machine in (CPU, BARE_GPU, HOPPER, AMPERE):
        for path in fast_paths(machine):
            assert path.found
            if path.state != "on":
                assert path.cost
    off = [key for key, path in paths(BARE_GPU).items() if path.state == "off"]
    assert off == ["layers", "FP8", "weight gradients", "norm"]


def test_without_triton_the_loss_copies_the_logits() -> None:
    """The largest tensor of a step was doubled with no word."""
    assert paths(BARE_GPU)["loss"].state == "on"
    assert "fp32" in paths(replace(BARE_GPU, triton=False))["loss"].cost


def test_recipes_are_those_of_the_chip() -> None:
    """MXFP8 was promised on Hopper, and FP8 on Ampere."""
    assert paths(HOPPER)["FP8"].found == "recipes delayed, tensorwise, blockwise (not mxfp8: needs sm_100)"
    ampere = paths(AMPERE)["FP8"]
    assert ampere.state == "off"
    assert "needs sm_89" in ampere.found


def test_the_output_layer_needs_apex_beside_transformer_engine() -> None:
    """Megatron-Core's own linear layer is not Transformer Engine's: the largest matrix of all was overlooked."""
    without = paths(HOPPER)["weight gradients"]
    assert without.state == "on"
    assert "output layer apart" in without.found
    assert "apex" in without.cost
    whole = paths(replace(HOPPER, weight_gradients=THERE))["weight gradients"]
    assert whole.cost == ""


def test_apex_without_its_kernels_speeds_up_no_norm() -> None:
    """apex built for Python alone has the module that finds the kernels, and not the kernels."""
    apex = replace(BARE_GPU, apex=THERE)
    assert paths(apex)["norm"].state == "off"
    assert paths(replace(apex, multi_tensor=True))["norm"].state == "on"


def test_plain_attention_is_not_called_fast() -> None:
    """torch's fallback keeps the scores; the memory-efficient kernel does not, but is not the fast one."""
    assert paths(replace(BARE_GPU, attention=()))["attention"].state == "off"
    efficient = paths(replace(BARE_GPU, attention=("memory-efficient",)))["attention"]
    assert efficient.state == "on"
    assert "slower" in efficient.cost


def test_transformer_engine_that_does_not_load_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    """One built for another torch ended the doctor with a traceback about symbols."""

    def found() -> Machine:
        raise ImportError("undefined symbol: _ZN3c10\nmore")

    monkeypatch.setattr(Machine, "found", found)
    paths, checks = doctor.look_for_paths()
    assert paths == []
    assert checks[0].state == "problem"
    assert "undefined symbol" in checks[0].found


def test_the_doctor_shows_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets of `ra3-megatron[te]` are no style."""
    monkeypatch.setattr(doctor, "examine", lambda: doctor.Examination([], [], fast_paths(CPU)))
    out = io.StringIO()
    doctor.run_doctor(Console(file=out, width=200))
    assert "ra3-megatron[te]" in out.getvalue()
    assert "no GPU" in out.getvalue()
