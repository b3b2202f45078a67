"""Chains of jobs on a real Slurm: what is submitted, what waits for what, and what a whole chain ends with."""

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml

from ra3_megatron.launch.attempts import STARTUP, Record
from ra3_megatron.launch.startup import in_words
from ra3_megatron.report.schema import read_metrics
from tests.e2e import rl
from tests.slurm.cluster import ROOT, Cluster
from tests.slurm.runs import LIGHT_WORKER, PREPARE, STAGE, Runs

MIDTRAIN = str(ROOT / "slurm" / "midtrain.sh")
CHAIN = {
    "run": {"arms": ["ra3", "ntp"]},
    "base": {"tokens": 8192},
    "latent": {"max_latent_tokens": 4, "max_batch": 16},
    "variational": {"steps": 2, "snippets_per_step": 4, "group_size": 2, "probe_snippets": 2, "flat_window": 0},
    "generate": {"shard_snippets": 20},
    "measure": {"snippets": 4},
    "train": {"steps": None, "tokens": 8192},
    "export": {"enabled": True},
}
RLVR = {
    "steps": 2, "prompts_per_step": 4, "group_size": 4, "max_tokens": 24, "max_refills": 1, "overlong": "keep",
    "validation_tasks": 4, "checkpoint_interval": 1, "lr": 3e-3,
}  # fmt: skip
PROBLEM = {
    "task_id": "HumanEval/0", "prompt": "def f(x):\n    return x  #", "entry_point": "f", "canonical_solution": "\n",
    "test": "def check(candidate):\n    assert candidate(1) == 1\n",
}  # fmt: skip
"""Passed by an answer that stays in the comment."""


def chain(runs: Runs, folder):
    """Everything that a run can do, a little of each; runs beside one another share tasks and problems."""
    data = folder.parent / "data"
    tasks, problems = rl.write_tasks(data / "tasks.jsonl"), data / "HumanEval.jsonl"
    problems.write_text("".join(json.dumps({**PROBLEM, "task_id": f"HumanEval/{n}"}) + "\n" for n in range(3)))
    asked = {"samples": 2, "temperature": 1.0, "max_tokens": 12, "start_token": "auto"}
    more = {
        "rlvr": {**RLVR, "tasks": str(tasks)},
        "evaluation": {"benchmarks": ["humaneval"], "data_dir": str(data), **asked},
        "judge": {"workers": 1},
    }
    run = runs.fresh(folder, **CHAIN, **more)
    config = yaml.safe_load(run.config.read_text())
    config["data"] |= {"snippet_tokens": 100, "corpus": {**config["data"]["corpus"], "limit": 4}}
    run.config.write_text(yaml.safe_dump(config))
    return run


def sbatch(run, *arguments: str, **options) -> str:
    return run.cluster.output(["sbatch", "--parsable", *arguments], env=run.env, **options).strip()


def fails_once(path: Path, shard: int, python: str) -> Path:
    """A stand-in for Python: the first attempt at a part of the generation ends at once, all else is `python`'s."""
    path.write_text(
        "#!/bin/bash\n"
        f'if [[ $RA3_ATTEMPT_DIR == */part-{shard:04d}/*-0 ]]; then echo "this shard fails once"; exit 1; fi\n'
        f'exec {python} "$@"\n'
    )
    path.chmod(0o755)
    return path


@pytest.mark.slow
def test_whole_chain_from_one_sbatch(runs, tmp_path):
    """Every stage as a job of its own ends as the same run in one go on this machine does, to the bit.

    A shard of the generation fails once on the way.
    """
    run, alone = chain(runs, tmp_path / "chain"), chain(runs, tmp_path / "alone")
    run.env["RA3_PROCESSES"] = "1"
    run.env["RA3_PYTHON"] = str(fails_once(tmp_path / "worker", 1, run.env["RA3_PYTHON"]))
    first = sbatch(
        run, "--nodes=2", "--gpus-per-node=8", "--time=10", f"--output={tmp_path}/first.log", MIDTRAIN, str(run.config)
    )
    run.wait_for_end(first)
    said = (tmp_path / "first.log").read_text()
    jobs = dict(re.findall(r"^(\S+): submitted (\S+)", said, re.MULTILINE))
    last = list(jobs)[-1]
    assert last.endswith("-evaluate")
    run.wait_for_end(jobs[last], seconds=900)
    runs.local(alone, ["midtrain", str(alone.config)], world=2)
    stages = sorted(p.parent.name for p in run.run.glob("*/DONE"))
    assert stages == sorted(p.parent.name for p in alone.run.glob("*/DONE"))
    assert [name.split("-", 1)[1] for name in stages] == [
        "prepare", "prepare-base", "base", "tasks", "ra3-variational-1", "ra3-generate-1", "ra3-sft-1", "ntp",
        "ra3-rlvr", "ntp-rlvr", "export", "measure", "evaluate",
    ]  # fmt: skip
    for name in stages:
        assert run.result(name) == alone.result(name), name
    assert run.evaluated("12-evaluate") == alone.evaluated("12-evaluate")
    assert len(run.evaluated("12-evaluate")["models"]) == 5
    assert run.result("10-export")["checkpoint"] == run.result("08-ra3-rlvr")["checkpoint"], "exported after RLVR"
    assert [run.events(f"05-ra3-generate-1/part-{i:04d}") for i in range(2)] == [
        ["started", "done"], ["started", "crash", "started", "done"],
    ]  # fmt: skip
    exported = [next(r.run.glob("*-export/hf/model.safetensors")).read_bytes() for r in (run, alone)]
    assert exported[0] == exported[1]
    dossier = json.loads((run.stage("07-ntp") / "logs" / "latest" / "environment.json").read_text())
    assert dossier["variables"]["SLURM_JOB_ID"] == jobs["07-ntp"]
    assert dossier["variables"]["RA3_CODE_COMMIT"]


def test_twice_in_a_row_submits_nothing_twice(runs, tmp_path):
    """Each call of the script queued the whole chain again."""
    run = runs.hollow(tmp_path, export={"enabled": True})
    first = run.launch("--sbatch", "--hold")
    assert list(first) == ["00-prepare", "01-ntp", "02-export"]
    again = run.cluster.output(["slurm/chain.sh", str(run.run)], env=run.env)
    assert re.findall(r"^(\S+): queued (\S+)", again, re.MULTILINE) == list(first.items())
    assert "submitted" not in again
    run.cluster.output(["scancel", first["01-ntp"]])
    gap = run.cluster.output(["slurm/chain.sh", str(run.run)], env=run.env)
    assert re.findall(r": (queued|submitted) ", gap)[:2] == ["queued", "submitted"]
    new = dict(re.findall(r"^(\S+): submitted (\S+)", gap, re.MULTILINE))
    assert f"afterok:{first['00-prepare']}" in run.cluster.facts(new["01-ntp"])["Dependency"]


def test_dry_run_tells_every_command(runs, tmp_path):
    """What would run could only be known by running it."""
    run = runs.hollow(tmp_path, **CHAIN)
    done = run.ra3("launch", str(run.config), "--nodes", "3", "--spares", "1", "--array", "5", "--dry-run")
    assert done.returncode == 2
    assert "variational.snippets_per_step (4) is not a multiple of the 24 replicas" in done.stderr
    shape = ["--nodes", "2", "--processes-per-node", "2", "--spares", "1", "--array", "5"]
    done = run.ra3("launch", str(run.config), *shape, "--dry-run")
    assert done.returncode == 0, done.stderr
    commands = [line.strip() for line in done.stdout.splitlines() if line.strip().startswith("sbatch ")]
    assert len(commands) == 10
    (array,) = [c for c in commands if "--array=0-4" in c]
    assert "slurm/generate.sh" in array
    assert "afterok:<00-prepare>:<03-ra3-variational-1>" in array
    assert all("--nodes=3 " in c for c in commands if "midtrain.sh" in c or "rlvr.sh" in c)
    assert not run.run.exists(), "a dry run leaves nothing"
    assert not run.cluster.output(["squeue", "--noheader"])


def test_array_shard_that_fails_restarts_alone(runs, tmp_path):
    """scontrol requeue of the last element requeued the whole array."""
    run = runs.hollow(tmp_path, "00-prepare", "03-ra3-variational-1", **CHAIN)
    run.env["RA3_PYTHON"] = str(fails_once(tmp_path / "worker", 2, str(LIGHT_WORKER)))
    jobs = run.launch("--array", "3", "--sbatch", "--exclude=node004")
    array = jobs["04-ra3-generate-1"]
    run.wait_for_end(jobs["04-ra3-generate-1-join"])
    assert [run.events(f"04-ra3-generate-1/part-{i:04d}") for i in range(3)] == [
        ["started", "done"], ["started", "done"], ["started", "crash", "started", "done"],
    ]  # fmt: skip
    assert [run.cluster.facts(f"{array}_{i}")["Restarts"] for i in range(2)] == ["0", "0"]
    assert (run.stage("04-ra3-generate-1") / "DONE").exists()


def test_from_a_wrong_folder(runs, tmp_path):
    """The script looked for the project where it was submitted from, or ran something else there."""
    run = runs.hollow(tmp_path / "somewhere", PREPARE)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    log = elsewhere / "job.log"
    wrong = sbatch(run, f"--output={log}", MIDTRAIN, "configs/quickstart.yaml", cwd=elsewhere)
    run.wait_for_end(wrong, "FAILED")
    assert run.cluster.facts(wrong)["ExitCode"] == "2:0"
    assert log.read_text().startswith("error: no configuration at configs/quickstart.yaml; give the path")
    assert len(log.read_text().splitlines()) == 1
    # With whole paths it is no wrong folder at all.
    shape = ["--nodes=2", "--gpus-per-node=8", f"--output={log}"]
    rest = [MIDTRAIN, str(run.config), "--stage", "ntp"]
    narrow = sbatch(run, *shape, *rest, cwd=elsewhere)
    run.wait_for_end(narrow, "FAILED")
    assert "the job has 1 cores on a node for 8 processes; submit it with --ntasks-per-node=8" in log.read_text()
    right = sbatch(run, *shape, "--ntasks-per-node=8", *rest, cwd=elsewhere)
    run.wait_for_end(right)
    assert run.done()


def test_missing_log_folder(runs, tmp_path):
    """Slurm fails a job whose --output lies in a folder that is not there, and says nothing at all."""
    run = runs.hollow(tmp_path, PREPARE)
    jobs = run.launch("--sbatch", "--hold")
    shutil.rmtree(run.run / "jobs")
    run.cluster.output(["scontrol", "release", jobs[STAGE]])
    run.wait_for_end(jobs[STAGE], "FAILED")
    told = run.cluster.output(["slurm/status.sh", str(run.run)], env=run.env)
    assert re.search(rf"{STAGE}\s+not queued", told)
    (again,) = run.launch(target=run.run).values()
    run.wait_for_end(again)
    assert run.done()


def test_container_flags_arrive(cluster, runs, tmp_path):
    """pyxis refused the options, or the run's folder was not mounted."""
    if not cluster.has_pyxis:
        pytest.skip("no compiler or no slurm/spank.h: the stand-in for pyxis was not built")
    run = runs.hollow(tmp_path, PREPARE)
    worker = tmp_path / "worker"
    find = f"{sys.executable} -c 'import ra3_megatron; print(ra3_megatron.__file__)' > {tmp_path}/found"
    worker.write_text(f'#!/bin/bash\nenv | grep ^FAKE_PYXIS_ > {tmp_path}/seen\n{find}\nexec {LIGHT_WORKER} "$@"\n')
    worker.chmod(0o755)
    run.env |= {
        "RA3_PYTHON": str(worker),
        "RA3_CONTAINER": "pyxis:/images/ra3.sqsh",
        "RA3_CONTAINER_MOUNTS": "/data:/data",
    }
    jobs = run.launch("--gpus-per-node", "0")
    run.wait_for_end(jobs[STAGE])
    seen = dict(line.split("=", 1) for line in (tmp_path / "seen").read_text().splitlines())
    assert seen["FAKE_PYXIS_IMAGE"] == "/images/ra3.sqsh"
    mounts = seen["FAKE_PYXIS_MOUNTS"].split(",")
    assert f"{run.run}:{run.run}" in mounts
    assert f"{run.run}/launch/code:{run.run}/launch/code" in mounts
    assert "/data:/data" in mounts
    assert seen["FAKE_PYXIS_WORKDIR"] == str(ROOT)
    # Submitted from the checkout: its own package must not come before the snapshot's.
    assert (tmp_path / "found").read_text().startswith(f"{run.run}/launch/code/")


@pytest.mark.slow
def test_copies_where_requeue_is_forbidden(runs, tmp_path):
    """On a site with JobRequeue=0 a chain ended at its first time limit."""
    run = runs.prepared(tmp_path)
    done = run.ra3("launch", str(run.config), "--nodes", "2", "--processes-per-node", "1", "--copies", "3")
    assert done.returncode == 0, done.stderr
    (ids,) = re.findall(r"^\S+: submitted (.+) \(", done.stdout, re.MULTILINE)
    first, second, third = ids.split()
    run.wait_for_step(4)
    run.cluster.output(["scancel", "--batch", "--signal=USR1", first])
    run.wait_for_end(first, "FAILED")
    assert run.cluster.facts(first)["ExitCode"] == "85:0"
    run.wait_for_end(second)
    assert run.result() == runs.reference
    run.wait_for_end(third)
    assert run.events() == ["started", "saved", "started", "done"], "the third copy has nothing to do"


@pytest.mark.slow
def test_requeue_is_forbidden_and_nobody_said_so(runs, tmp_path):
    """The job ended as if it had crashed, after it had asked for its requeue for ten minutes."""
    run = runs.prepared(tmp_path)
    jobs = run.launch("--sbatch", "--no-requeue")
    run.wait_for_step(4)
    run.cluster.output(["scancel", "--batch", "--signal=USR1", jobs[STAGE]])
    run.wait_for_end(jobs[STAGE], "FAILED", seconds=120)
    assert run.cluster.facts(jobs[STAGE])["ExitCode"] == "2:0"
    assert "where jobs may not be requeued, launch with --copies" in run.cluster.output(
        ["slurm/status.sh", str(run.run)], env=run.env
    )
    (again,) = run.launch(target=run.run).values()
    run.wait_for_end(again)
    assert run.result() == runs.reference


@pytest.mark.slow
def test_full_disk(cluster, runs, tmp_path):
    """Saves that failed for want of room counted as checkpoints, or the job was requeued on a full disk for ever."""
    run = runs.prepared(cluster.small_disk / "full")
    run.env |= {"RA3_CHECK_RUN_GB": "0"}
    filler = cluster.small_disk / "filler"
    filler.write_bytes(b"0" * max(0, shutil.disk_usage(cluster.small_disk).free - (12 << 20)))
    try:
        jobs = run.launch()
        run.wait_for_end(jobs[STAGE], "FAILED")
        assert run.cluster.facts(jobs[STAGE])["ExitCode"] == "2:0"
        assert run.events() == ["started", "user_error"]
        told = run.cluster.output(["slurm/status.sh", str(run.run)], env=run.env)
        assert "bytes free" in told
        assert not list(run.stage().glob("checkpoints/step_*")), "nothing half-written"
    finally:
        filler.unlink()
    done = run.cluster.output(["slurm/resume.sh", str(run.run)], env=run.env)
    run.wait_for_end(re.findall(rf"^{STAGE}: submitted (\S+)", done, re.MULTILINE)[0])
    assert run.result() == runs.reference


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_real_processes(launcher, runs, tmp_path):
    """With Python as it is and no zygote: starts, saves on the signal, goes on; prints what that takes."""
    run = runs.prepared(tmp_path)
    run.env |= {"RA3_PYTHON": sys.executable, "RA3_LAUNCHER": launcher, "RA3_MAX_RESTARTS": "1"}
    jobs = run.launch()
    run.wait_for_step(6, seconds=240)
    sent = time.time()
    run.cluster.output(["scancel", "--batch", "--signal=USR1", jobs[STAGE]])
    run.wait_for_end(jobs[STAGE], seconds=300)
    assert run.result() == runs.reference
    assert run.events() == ["started", "saved", "started", "done"]
    events = Record(run.run / "jobs" / STAGE).events()
    (_, first), (again, second) = [(e["time"], e["seconds"]) for e in events if e["event"] == STARTUP]
    saved, started = (next(e["time"] for e in events if e["event"] == name) for name in ("saved", "started"))
    checked = next(e["time"] for e in events if e["event"] == "started" and e["time"] > saved)
    times = [r["wall"]["time"] for r in read_metrics(run.stage() / "metrics.jsonl") if "loss" in r]
    assert started < times[0] < saved < checked < again
    new = next(moment for moment in times if moment > checked)
    print(f"{launcher}: {in_words(first)}")
    print(f"{launcher}, second time: {in_words(second)}")
    print(f"{launcher}: signal to saved {saved - sent:.1f} s, to checked again {checked - sent:.1f} s, "
          f"to the next new step {new - sent:.1f} s")  # fmt: skip


@pytest.mark.slow
def test_torchrun_restarts_inside_the_job(runs, tmp_path):
    """With an agent on every node a dead process costs no requeue."""
    run = runs.prepared(tmp_path)
    run.env |= {"RA3_PYTHON": sys.executable, "RA3_LAUNCHER": "torchrun", "RA3_MAX_RESTARTS": "2"}
    jobs = run.launch()
    run.wait_for_step(6, seconds=240)
    os.kill(run.rank_process(1)[1], signal.SIGKILL)
    run.wait_for_end(jobs[STAGE], seconds=300)
    assert run.events() == ["started", "done"]
    assert run.result() == runs.reference
    assert run.cluster.facts(jobs[STAGE])["Restarts"] == "0"


@pytest.mark.slow
def test_sixty_four_nodes(tmp_path):
    """The plan for 512 GPUs: one array of 64, every stage on all nodes, nothing forgotten."""
    with Cluster(nodes=64) as cluster:
        run = tmp_path / "run"
        env = {"RA3_PYTHON": str(LIGHT_WORKER), "RA3_HANG_POLL_S": "0.5"}
        # Nobody reads them, but a launch looks whether they are there.
        model, file = tmp_path / "model", tmp_path / "some.jsonl"
        model.mkdir()
        file.touch()
        arguments = ["launch", "configs/llama-3.1-8b.yaml", f"run.dir={run}", "run.arms=[ra3]", "run.rounds=1",
                     "parallel.tensor=4", "parallel.pipeline=2", "parallel.context=1", "train.global_batch_size=512",
                     "variational.snippets_per_step=64", f"model.source={model}", f"data.corpus.files=[{file}]",
                     f"rlvr.tasks={file}", f"evaluation.data={{humaneval: {file}}}",
                     "evaluation.benchmarks=[humaneval]", "--nodes", "64", "--array", "64", "--time", "30"]  # fmt: skip
        python = [sys.executable, "-m", "ra3_megatron"]
        planned = cluster.output([*python, *arguments, "--dry-run"], env=env)
        assert "64 nodes x 8 = 512 processes = tensor 4 x pipeline 2 x context 1 x data 64" in planned
        assert "--array=0-63" in planned
        said = cluster.output([*python, *arguments], env=env, timeout=300)
        jobs = dict(re.findall(r"^(\S+): submitted (\S+)", said, re.MULTILINE))
        cluster.wait_for_state(list(jobs.values())[-1], "COMPLETED", 500)
        assert all(cluster.state(job) == "COMPLETED" for job in jobs.values())
        (generated,) = run.glob("*-generate-1/parts")
        assert len(list(generated.iterdir())) == 64
        widest = [len(list(p.glob("here.*"))) for p in run.glob("jobs/*-sft-1/*-0")]
        assert widest == [512]
        cluster.wait(lambda: not cluster.leftovers(), 30, "orphans")
