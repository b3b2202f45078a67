"""The main job as a user starts it: torchrun, two processes, and what it leaves; then the same command again."""

import json
import os
import subprocess
import sys

import pytest
import torch

from ra3_megatron.data.packing import PackedWindows
from ra3_megatron.data.prepare import open_prepared
from ra3_megatron.report.schema import read_metrics
from tests.e2e.forked import ROOT
from tests.e2e.small import write_config

STEPS = 12
SEQ, EVAL_WINDOWS = 128, 8


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*command, "-m", "ra3_megatron", *arguments],
        cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run over two tensor-parallel processes, its vocabulary padded, started by torchrun."""
    folder = tmp_path_factory.mktemp("torchrun")
    path = write_config(folder, train={"steps": STEPS, "eval_interval": 6}, parallel={"tensor": 2})
    done = torchrun("midtrain", str(path))
    assert done.returncode == 0, done.stderr[-4000:]
    return folder / "run", path, done


def test_leaves_what_it_promises(finished):
    """A run that "worked" without a marker, report or model (Megatron-Bridge#4188)."""
    run, _, done = finished
    assert sorted(p.parent.name for p in run.glob("*/DONE")) == ["00-prepare", "01-ntp", "02-export"]
    assert (run / "report.html").stat().st_size > 1000
    for stage in ("00-prepare", "01-ntp", "02-export"):
        assert (run / stage / "logs" / "latest").resolve().name == "0001"
    trained = json.loads((run / "01-ntp" / "DONE").read_text())
    assert trained["step"] == STEPS
    assert trained["samples"] == STEPS * 8
    assert (run / trained["checkpoint"] / "DONE").is_file()
    records = read_metrics(run / "01-ntp" / "metrics.jsonl")
    assert sorted({r["step"] for r in records}) == list(range(STEPS + 1))
    assert trained["validation_loss"] < trained["validation_loss_before"]
    assert done.stdout.count("done:") == 1, "each rank printed the summary"
    for line in ("validation loss", "checkpoint", "Hugging Face", "report"):
        assert line in done.stdout


def test_exported_model_has_our_loss(finished):
    """Identical weights, other logits: transformers must find the loss we measured (Megatron-Bridge#2381)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run, _, _ = finished
    folder = run / "02-export" / "hf"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    corpus = open_prepared(run / "00-prepare" / "data" / "corpus")
    windows = PackedWindows(corpus.validation, SEQ, corpus.tokenizer.eos_id, 1, 7)
    total = weight = 0.0
    sample = None
    for number in range(min(EVAL_WINDOWS, len(windows))):
        for sequence in windows[number]:
            ids = torch.tensor(sequence.ids, dtype=torch.long)
            w = torch.tensor(sequence.weights["cross_entropy"][1:])
            with torch.no_grad():
                log_probs = model(ids[None]).logits[0, :-1].log_softmax(-1)
            total -= float((log_probs.gather(-1, ids[1:, None])[:, 0] * w).sum())
            weight += float(w.sum())
            sample = sequence.ids.tolist() if sample is None else sample
    ours = [r["validation_loss"] for r in read_metrics(run / "01-ntp" / "metrics.jsonl") if "validation_loss" in r]
    assert len(ours) == 3
    assert weight > 100
    assert total / weight == pytest.approx(ours[-1], rel=1e-4)
    text = corpus.tokenizer.decode(sample)
    assert tokenizer.encode(text, add_special_tokens=False) == corpus.tokenizer.encode(text)
    assert model.config.eos_token_id == tokenizer.eos_token_id == corpus.tokenizer.eos_id


def written(run):
    """Modification times of what a finished run has, but the report, which is built again, and the lock."""
    return {p: p.stat().st_mtime_ns for p in run.rglob("*") if p.is_file() and p.name not in ("report.html", ".lock")}


def test_second_call_does_nothing(finished, server):
    """Idempotence: the same command on a finished run trains nothing, copies nothing, and is quick."""
    run, path, _ = finished
    before = written(run)
    ended = server.cli(["midtrain", str(path)], world=2, timeout=60)
    assert [e.code for e in ended] == [0, 0], ended[0].err[-2000:]
    assert ended[0].seconds < 30, "2 s on a quiet machine; training again would take longer than this on a busy one"
    assert f"{STEPS} steps" in ended[0].out
    assert written(run) == before


def test_export_deleted_is_made_again_alone(finished, server):
    """A stage without DONE runs again; finished ones before it do not."""
    run, path, _ = finished
    before = written(run / "01-ntp")
    weights = (run / "02-export" / "hf" / "model.safetensors").read_bytes()
    (run / "02-export" / "DONE").unlink()
    (run / "02-export" / "hf" / "model.safetensors").unlink()
    ended = server.cli(["midtrain", str(path)], world=2, timeout=60)
    assert [e.code for e in ended] == [0, 0], ended[0].err[-2000:]
    assert written(run / "01-ntp") == before
    assert (run / "02-export" / "DONE").is_file()
    assert (run / "02-export" / "hf" / "model.safetensors").read_bytes() == weights


def test_continues_from_an_exported_model(finished, server, tmp_path):
    """Import → train: the first validation loss of a run on our own export is the last of the run that made it."""
    run, _, _ = finished
    path = write_config(
        tmp_path,
        model={"source": str(run / "02-export" / "hf"), "architecture": None},
        data={"tokenizer": {"kind": "hf"}},
        train={"steps": 3, "eval_interval": 0},
    )
    (ended,) = server.cli(["midtrain", str(path)], timeout=60)
    assert ended.code == 0, ended.err[-3000:]
    first = json.loads((run / "01-ntp" / "DONE").read_text())
    second = json.loads((tmp_path / "run" / "02-ntp" / "DONE").read_text())
    assert second["validation_loss_before"] == pytest.approx(first["validation_loss"], rel=1e-5)


def test_torchrun_names_the_mistake(tmp_path):
    """Under the real launcher the line of rank 0 is there, once, and the exit is not zero."""
    path = write_config(tmp_path, parallel={"tensor": 4})
    done = torchrun("midtrain", str(path))
    assert done.returncode != 0
    # On a slow machine other ranks may add "error (rank 1): ..." before the launcher ends them.
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "parallel.tensor 4" in lines[0]
    assert not list((tmp_path / "run").glob("*/checkpoints"))
