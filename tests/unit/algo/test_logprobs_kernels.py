"""Runs `triton_cases.py` in a process of its own: Triton must know that it interprets before it is first imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernels of a GPU need triton, which comes with torch's CUDA builds")


def test_kernels_interpreted() -> None:
    """See the docstrings in the file; its output is shown when one of its tests fails."""
    cases = Path(__file__).with_name("triton_cases.py")
    root = Path(__file__).parents[3]
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_kernels_compile_for_hopper(tmp_path, monkeypatch) -> None:
    """What the interpreter takes and the compiler does not, found on the first GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from ra3_megatron.algo import logprobs_triton as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    shared = {"labels": "*i64", "stride": "i32", "start": "i32", "inverse_temperature": "fp32", "BLOCK": "constexpr"}
    forward = {"maxima": "*fp32", "sums": "*fp32", "chosen": "*fp32", "valid": "constexpr"}
    backward = {"normaliser": "*fp32", "grad": "*fp32", "width": "i32", "valid": "i32"}
    for kernel, more, constants in (
        (kernels._forward, {"logits": "*bf16", **forward}, {"valid": 151936, "BLOCK": kernels.BLOCK}),
        (kernels._backward, {"logits": "*bf16", "gradient": "*bf16", **backward}, {"BLOCK": kernels.BLOCK}),
    ):
        types = {**shared, **more}
        signature = {name: types[name] for name in kernel.arg_names}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        assert "cubin" in compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 16}).asm
