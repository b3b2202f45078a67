"""When a job gives up, which nodes it takes, when silence is a hang, what an estimate is made of."""

import json
import os
import time
from pathlib import Path

import pytest

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.control import HEARTBEAT_FILE, PARTS_FOLDER, exit_code, part_name, write_outcome
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.launch import slurm
from ra3_megatron.launch.attempts import RESET, STARTED, Record, Work, fruitless
from ra3_megatron.launch.estimate import job_hours, measured_speed, planned_flops
from ra3_megatron.launch.nodes import _verdict, add_bad, choose, read_bad
from ra3_megatron.launch.plan import plan
from ra3_megatron.launch.settings import Settings
from ra3_megatron.launch.watch import Heartbeat
from ra3_megatron.report.environment import driver_version, environment


def started(*progress):
    return {"event": STARTED, "progress": list(progress)}


def ended(event):
    return {"event": event}


def test_attempts_without_progress_are_counted():
    """A job that gets on a little every time was given up; one that never does went on for ever."""
    crash = ended("crash")
    count = fruitless([started(0, 0, 0), crash, started(0, 0, 0), crash], [0, 0, 0])
    assert (count.ended, count.lost) == (2, 0)
    count = fruitless([started(0, 0, 0), crash, started(4, 0, 0), crash], [4, 0, 0])
    assert (count.ended, count.lost) == (1, 0), "the first brought a checkpoint"
    assert fruitless([started(0, 0, 0), crash], [0, 0, 10]).ended == 0, "rollouts are progress too"
    count = fruitless([started(0, 0, 0), started(0, 0, 0), ended("terminated")], [0, 0, 0])
    assert (count.ended, count.lost) == (0, 2), "a node that died is not the job's fault"
    count = fruitless([started(0, 0, 0), crash, ended(RESET), started(0, 0, 0), crash], [0, 0, 0])
    assert count.ended == 1, "resume.sh starts anew"
    assert fruitless([started(0, 0, 0), ended("saved")] * 3, [0, 0, 0]).ended == 3, "a limit shorter than a step"


def test_progress_and_end_of_work(tmp_path):
    """A checkpoint that is still being written counted as progress."""
    work = Work(tmp_path, (3, 16))
    assert work.progress() == [0, 0, 0]
    for name in ("step_00000004", "step_00000012.partial"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "checkpoints" / name / "DONE").touch()
    (tmp_path / "checkpoints" / "step_00000009").mkdir()
    (tmp_path / "data" / "shards").mkdir(parents=True)
    (tmp_path / "data" / "shards" / "shard-000001.json").touch()
    (tmp_path / "data" / "rollouts").mkdir()
    (tmp_path / "data" / "rollouts" / "x").write_bytes(b"123")
    assert work.progress() == [4, 1, 3]
    assert not work.done
    (tmp_path / PARTS_FOLDER).mkdir()
    (tmp_path / PARTS_FOLDER / part_name(3, 16)).touch()
    assert work.done
    assert not Work(tmp_path, (3, 8)).done, "another array divides the shards otherwise"
    assert not Work(tmp_path).done
    (tmp_path / "DONE").touch()
    assert Work(tmp_path).done


def test_record_survives_a_power_cut(tmp_path):
    """A torn line made the whole record unreadable, or swallowed the next one."""
    record = Record(tmp_path)
    record.add(STARTED, progress=[0])
    with open(record.path, "a") as file:
        file.write('{"event": "cra')
    record.add("done")
    assert [e["event"] for e in record.events()] == [STARTED, "done"]
    assert record.last()["event"] == "done"


def test_bad_nodes_and_spares(tmp_path):
    """A listed node was used; a spare was used though all were well."""
    path = tmp_path / "bad_nodes.txt"
    path.write_text("# ours\nn2   # fan\n\nn7\n")
    assert read_bad([path, tmp_path / "none"]) == {"n2": "fan", "n7": "listed"}
    add_bad(path, {"n2": "again", "n3": "Xid 79"})
    assert list(read_bad([path])) == ["n2", "n7", "n3"]
    choice = choose(["n1", "n2", "n3", "n4", "n5"], 2, read_bad([path]))
    assert choice.chosen == ("n1", "n4")
    assert list(choice.bad) == ["n2", "n3"]
    assert choose(["n2", "n3"], 1, read_bad([path])).chosen == ()


def test_answers_of_the_check(tmp_path):
    """A node that did not answer, or whose clock was wrong, passed."""
    now = time.time()

    def verdict(text):
        (tmp_path / "n").write_text(text)
        return _verdict(tmp_path / "n", now, now + 2)

    assert verdict(f"clock {now:.0f}\nend\n") == ""
    assert (
        verdict(f"clock {now:.0f}\nFAIL 7 of 8 GPUs\nFAIL /tmp has 0 GB free\nend\n")
        == "7 of 8 GPUs; /tmp has 0 GB free"
    )
    assert verdict(f"clock {now - 300:.0f}\nend\n") == "clock is off by -300 s"
    assert verdict(f"clock {now:.0f}\n") == "the check did not end"
    assert _verdict(tmp_path / "m", now, now) == "did not answer the check"


def test_silence_is_a_hang_after_what_was_allowed(tmp_path, monkeypatch):
    """A long save was taken for a hang; a hang in the setting up was never found."""
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    heartbeat = Heartbeat(tmp_path, 100.0)
    clock[0] = 99.0
    assert heartbeat.overdue() == ""
    clock[0] = 101.0
    assert "no sign of life" in heartbeat.overdue()

    def beat(what, step, allow):
        facts = {"what": what, "step": step, "allow_s": allow, "stage": "01-sft", "time": clock[0]}
        (tmp_path / HEARTBEAT_FILE).write_text(json.dumps(facts))

    beat("steps", 7, 10.0)
    assert heartbeat.overdue() == ""
    beat("save", None, 600.0)
    clock[0] = 105.0
    assert heartbeat.overdue() == ""
    clock[0] = 650.0
    assert heartbeat.overdue() == "", "saves take long"
    clock[0] = 800.0
    assert "silent for 695 s in 01-sft, save" in heartbeat.overdue()


def test_words_instead_of_exit_codes_under_torchrun(tmp_path, monkeypatch):
    """torchrun restarts what leaves with a code: processes asked to make way came back three times at once."""
    monkeypatch.setenv("RA3_ATTEMPT_DIR", str(tmp_path))
    assert exit_code(85) == 85
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    assert [exit_code(code) for code in (0, 1, 2, 85, 86)] == [0, 1, 0, 0, 0]
    write_outcome(1, "rank 3: ValueError: x\ny", first=True)
    write_outcome(1, "rank 4: PeerFailed", first=True)
    assert json.loads((tmp_path / "outcome.json").read_text()) == {"code": 1, "reason": "rank 3: ValueError: x y"}
    write_outcome(85, "saved")
    assert json.loads((tmp_path / "outcome.json").read_text())["code"] == 85


def test_a_controller_that_is_away_is_asked_again(tmp_path, monkeypatch, capfd):
    """A job that was to be requeued while the controller restarted ended as failed, and the chain with it."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f"#!/bin/bash\necho x >> {tmp_path}/calls; [[ $(wc -l < {tmp_path}/calls) -ge 3 ]] && echo fine && exit 0\n"
        'echo "Unable to contact slurm controller" >&2; exit 1\n'
    )
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert slurm.persistently(["scontrol", "requeue", "7"], pause_s=0.01) == "fine\n"
    assert capfd.readouterr().out.count("Unable to contact slurm controller") == 2
    (tmp_path / "calls").unlink()
    scontrol.write_text(f'#!/bin/bash\necho x >> {tmp_path}/calls; echo "operation is disabled" >&2; exit 1\n')
    with pytest.raises(UserError, match="operation is disabled"):
        slurm.persistently(["scontrol", "requeue", "7"], pause_s=0.01)
    assert (tmp_path / "calls").read_text() == "x\n", "what is refused is not asked for again"


ARCHITECTURE = Architecture(
    family="qwen2", num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, head_dim=8, ffn_hidden_size=64,
    vocab_size=128, tied_embeddings=True, qkv_bias=True, max_positions=256,
)  # fmt: skip


def test_estimate_of_a_run_as_measured(tmp_path):
    """Hours were those of one process, or seconds of a generation were divided by its replicas twice."""
    old = {"run": {"arms": ["ra3", "ntp"]}, "base": {"tokens": 10}, "train": {"tokens": 1000}}
    config_from_dict(old).save(tmp_path / "config.yaml")
    stage = tmp_path / "06-ntp"
    (stage / "checkpoints" / "step_00000002").mkdir(parents=True)
    layout = {"tensor": 2, "pipeline": 1, "context": 1, "data": 2}
    (stage / "checkpoints" / "step_00000002" / "state.json").write_text(json.dumps({"layout": layout}))
    (stage / "DONE").write_text(json.dumps({"flops": 8e12, "seconds": 10.0}))
    generate = tmp_path / "04-ra3-generate-1"
    generate.mkdir()
    (generate / "DONE").write_text(json.dumps({"flops": 6e12, "seconds": 30.0}))
    speed = measured_speed(tmp_path)
    assert speed.by_kind == {"ntp": 8e12 / 40, "generate": 2e11}
    with pytest.raises(UserError, match="no finished stage"):
        measured_speed(tmp_path / "empty")
    config = config_from_dict({"run": {"arms": ["ntp"]}, "train": {"tokens": 1000, "seq_length": 64}})
    (job,) = [j for j in plan(config, Settings(nodes=3)) if j.name.endswith("-ntp")]
    amount = planned_flops(config, ARCHITECTURE, job, None, {})
    assert amount == ARCHITECTURE.flops_per_token(32) * 1000
    assert job_hours(job, amount, speed) == pytest.approx(amount / 2e11 / 24 / 3600)
    assert job_hours(job, None, speed) is None


FULL = {
    "run": {"arms": ["ra3", "ntp"]},
    "base": {"tokens": 10},
    "train": {"tokens": 1000, "seq_length": 64},
    "rlvr": {"steps": 4, "tasks": "t", "prompts_per_step": 8, "group_size": 2, "max_tokens": 16, "eval_interval": 2,
             "validation_tasks": 6, "validation_samples": 3},
    "measure": {"snippets": 5, "samples": 2},
    "evaluation": {"benchmarks": ["humaneval"], "samples": 2, "temperature": 1.0, "max_tokens": 32},
}  # fmt: skip


def finish(run: Path, name: str, attempts: int = 1, layout: dict | None = None, **result) -> None:
    """A finished stage on six processes."""
    stage = run / name
    for attempt in range(attempts):
        (stage / "logs" / f"{attempt + 1:04d}").mkdir(parents=True)
        (stage / "logs" / f"{attempt + 1:04d}" / "environment.json").write_text(json.dumps({"processes": 6}))
    (stage / "logs" / "latest").symlink_to(f"{attempts:04d}")
    if layout is not None:
        checkpoint = stage / "checkpoints" / "step_00000004"
        checkpoint.mkdir(parents=True)
        (checkpoint / "state.json").write_text(json.dumps({"layout": layout}))
        (checkpoint / "architecture.json").write_text(json.dumps(ARCHITECTURE.to_dict()))
    (stage / "DONE").write_text(json.dumps({"seconds": 10.0, **result}))


def test_estimate_covers_rlvr_measurement_and_evaluation(tmp_path):
    """The stages that draw answers had no figure: of a whole chain hours were told that left out half of it."""
    measured = config_from_dict(FULL)
    measured.save(tmp_path / "config.yaml")
    names = {job.kind: job.stage for job in plan(measured, Settings())}
    # One of its three replicas of two only generated: it is in no checkpoint's layout.
    finish(tmp_path, names["rlvr"], layout={"tensor": 2, "data": 2})
    finish(tmp_path, names["measure"])
    finish(tmp_path, names["evaluate"], problems={"humaneval": 7})
    speed = measured_speed(tmp_path)
    forward = ARCHITECTURE.flops_per_token(8) / 3
    answers, held_out = 4 * 8 * 2, 3 * 6 * 3
    assert speed.by_kind["rlvr"] == pytest.approx(((answers + held_out) + 3 * answers) * 16 * forward / 60)
    # Base, two arms, and both after RLVR: five models; measured before RLVR: three.
    evaluated = 5 * 7 * 2 * 32 * ARCHITECTURE.flops_per_token(16) / 3
    assert speed.by_kind["evaluate"] == pytest.approx(evaluated / 60)
    measured_on = 3 * 5 * (1 + 2.5 * 2 * 1.1) * 64 * ARCHITECTURE.flops_per_token(32) / 3
    assert speed.by_kind["measure"] == pytest.approx(measured_on / 60)
    # Twice the steps without measurements in between on twice the processes.
    longer = {**FULL["rlvr"], "steps": 8, "eval_interval": 0}
    planned = config_from_dict(
        {**FULL, "rlvr": longer, "evaluation": {**FULL["evaluation"], "samples": 20, "limit": 3}}
    )
    hours = {}
    for job in plan(planned, Settings(nodes=2, processes_per_node=6)):
        amount = planned_flops(planned, ARCHITECTURE, job, None, speed.problems)
        hours[job.kind] = job_hours(job, amount, speed)
    assert hours["rlvr"] * 3600 == pytest.approx(10 / 2 * (4 * 128 + 2 * 6 * 3) / (4 * answers + held_out))
    assert hours["measure"] * 3600 == pytest.approx(5)
    assert hours["evaluate"] * 3600 == pytest.approx(5 * 10 * 3 / 7)
    # Benchmarks of unknown size, and seconds of a last attempt alone, give no figure.
    (evaluate,) = [job for job in plan(planned, Settings()) if job.kind == "evaluate"]
    assert planned_flops(planned, ARCHITECTURE, evaluate, None, {"mbpp": 5}) is None
    again = tmp_path / "again"
    again.mkdir()
    measured.save(again / "config.yaml")
    finish(again, names["rlvr"], layout={"data": 6})
    finish(again, names["evaluate"], attempts=2, problems={"humaneval": 7})
    assert set(measured_speed(again).by_kind) == {"rlvr"}


def test_dossier_names_nodes_driver_and_commit(tmp_path, monkeypatch):
    """Which nodes an attempt ran on was known only as long as Slurm kept the job; a snapshot had no commit."""
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[01-16]")
    monkeypatch.setenv("RA3_CODE_COMMIT", "abc123")
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = environment()
    assert found["variables"]["SLURM_JOB_NODELIST"] == "gpu[01-16]"
    assert found["git"] == "abc123"
    assert found["processes"] == 1
    assert "secret" not in json.dumps(found)
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.1  Thu\nGCC version: x\n")
    assert driver_version(tmp_path / "version") == "NVIDIA UNIX x86_64 Kernel Module  570.1  Thu"
    assert driver_version(tmp_path / "none") is None
