"""What happens to a stage in the middle of its steps, on a real Slurm: it ends with the weights of an unbroken run."""

import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ra3_megatron.config.control import REQUEST_FILE, STOP_FILE
from ra3_megatron.launch.attempts import Record
from ra3_megatron.launch.startup import moment_of
from tests.slurm.cluster import ROOT, SANDBOXED
from tests.slurm.runs import RLVR, STAGE, Run, Runs

EARLY = 5
"""Steps after which things happen: past the first checkpoint, far from the end."""


@pytest.fixture
def run(runs: Runs, tmp_path) -> Run:
    return runs.prepared(tmp_path)


def test_undisturbed(run, runs):
    """Two nodes with a process each took a process for the whole node's share, and no group could be made."""
    jobs = run.launch()
    assert list(jobs) == [STAGE], "what is done is not submitted"
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events() == ["started", "done"]


def test_signal_saves_requeues_and_resumes(run, runs):
    """A job at its time limit lost what it had done since the last checkpoint, or ended as if it were done."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    run.cluster.output(["scancel", "--batch", "--signal=USR1", jobs[STAGE]])
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events() == ["started", "saved", "started", "done"]
    assert run.cluster.facts(jobs[STAGE])["Restarts"] == "1"
    attempts = sorted(p.name for p in (run.run / "jobs" / STAGE).iterdir() if p.is_dir() and not p.is_symlink())
    assert attempts == [f"{jobs[STAGE]}-0", f"{jobs[STAGE]}-1"]
    assert (run.run / "jobs" / STAGE / "latest").resolve().name == attempts[-1]


def test_a_dead_rank_tears_the_others_down_and_the_job_goes_on(run, runs):
    """One process died, the others waited for it until the time limit, on all nodes (prime-rl#2574)."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    os.kill(run.rank_process(1)[1], signal.SIGKILL)
    run.cluster.wait(lambda: "crash" in run.events(), 240, "the job notices")
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events() == ["started", "crash", "started", "done"]


def test_cancelled_is_never_requeued(run, runs):
    """scancel sends SIGTERM, as a requeue does; the job that took it for one came back for ever."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    run.cluster.output(["scancel", jobs[STAGE]])
    run.wait_for_end(jobs[STAGE], "CANCELLED")
    time.sleep(3)
    assert run.cluster.facts(jobs[STAGE])["Restarts"] == "0"
    assert not run.done()
    said = run.cluster.output(["slurm/chain.sh", str(run.run)], env=run.env)
    run.wait_for_end(re.findall(rf"^{STAGE}: submitted (\S+)", said, re.MULTILINE)[0])
    assert run.result() == runs.reference
    assert run.events() == ["started", "terminated", "started", "done"]


def test_stop_file_and_resume(run, runs):
    """The stop file ended the processes and the job started them again."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    (run.run / STOP_FILE).touch()
    run.wait_for_end(jobs[STAGE], "FAILED")
    assert run.cluster.facts(jobs[STAGE])["ExitCode"] == "86:0"
    refused = run.ra3("launch", str(run.run))
    assert refused.returncode == 2
    assert "resume.sh" in refused.stderr
    done = run.cluster.run(["slurm/resume.sh", str(run.run)], env=run.env)
    assert done.returncode == 0, done.stderr
    assert "stopped: the stop file" in done.stdout
    (again,) = [w for line in done.stdout.splitlines() if ": submitted " in line for w in [line.split()[2]]]
    run.wait_for_end(again)
    assert run.result() == runs.reference


def test_no_progress_ends_the_chain(run):
    """A job that dies at once was requeued until somebody looked (Megatron-Bridge PR#4765)."""
    run.env |= {"RA3_PYTHON": "/bin/false"}
    config = run.config.read_text().replace("enabled: false", "enabled: true")
    run.config.write_text(config)
    jobs = run.launch()
    assert list(jobs) == [STAGE, "02-export"]
    run.wait_for_end(jobs[STAGE], "FAILED")
    assert run.cluster.facts(jobs[STAGE])["ExitCode"] == "93:0"
    assert run.events() == ["started", "crash"] * 3
    run.wait_for_end(jobs["02-export"], "CANCELLED")
    told = run.cluster.output(["slurm/status.sh", str(run.run)], env=run.env)
    assert "crash: exit code 1" in told


def test_user_error_is_not_tried_again(run):
    """A configuration that can never work was started three times on hundreds of GPUs."""
    (run.stage("00-prepare") / "DONE").unlink()
    shape = ["--nodes=2", "--gpus-per-node=8", f"--output={run.folder}/job.log", str(ROOT / "slurm" / "midtrain.sh")]
    job = run.cluster.output(["sbatch", "--parsable", *shape, str(run.config), "--stage", "ntp"], env=run.env | {
        "RA3_PROCESSES": "1"}).strip()  # fmt: skip
    run.wait_for_end(job, "FAILED")
    assert run.cluster.facts(job)["ExitCode"] == "2:0"
    assert run.events() == ["started", "user_error"]
    assert "stage ntp needs prepare" in (run.folder / "job.log").read_text()


@pytest.mark.slow
def test_hang_is_found_and_dumped(run, runs):
    """A process stuck on one node kept all of them until the time limit, and nobody knew where it stood."""
    run.env |= {"RA3_HANG_STEP_S": "15", "RA3_STRAGGLER_S": "0"}
    jobs = run.launch()
    run.wait_for_step(EARLY)
    _, process = run.rank_process(0)
    attempt = (run.run / "jobs" / STAGE / "latest").resolve()
    os.kill(process, signal.SIGSTOP)
    run.wait_for_end(jobs[STAGE])
    assert run.events() == ["started", "hang", "started", "done"]
    assert run.result() == runs.reference
    # The process that was stopped cannot say anything; the one that waited for it does, by itself and through py-spy.
    assert "rank 1" in (attempt / "dump.log").read_text()
    assert "stages/sft.py" in (attempt / "node1.log").read_text()
    assert "(ra3_megatron/stages/sft.py" in (attempt / "stacks-1.txt").read_text()


def test_bad_node_gives_way_to_a_spare(run, runs):
    """A node with a broken GPU killed the start, again and again on the same nodes."""
    run.cluster.break_gpu("node001")
    try:
        jobs = run.launch("--spares", "1", "--sbatch", "--nodelist=node[001-003]")
        run.wait_for_end(jobs[STAGE])
    finally:
        run.cluster.repair_gpu("node001")
    assert run.result() == runs.reference
    assert run.events() == ["started", "done"]
    listed = (run.run / "bad_nodes.txt").read_text()
    assert listed.startswith("node001 ")
    assert "7 of 8 GPUs" in listed
    assert "GPU 2 has 3 uncorrected memory errors" in listed


@pytest.mark.slow
def test_bad_node_without_a_spare_is_excluded(run, runs):
    """A job that cannot start on its nodes has to start on others."""
    run.cluster.break_gpu("node002")
    try:
        jobs = run.launch()
        run.wait_for_end(jobs[STAGE])
    finally:
        run.cluster.repair_gpu("node002")
    assert run.result() == runs.reference
    assert run.events() == ["started", "bad_nodes", "started", "done"]
    assert "node002" in run.cluster.facts(jobs[STAGE])["ExcNodeList"]


@pytest.mark.slow
def test_slurmd_killed(run, runs):
    """A daemon that is restarted must not cost anything."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    node, _ = run.rank_process(1)
    run.cluster.script("kill-slurmd", node)
    try:
        run.cluster.script(
            "exec-on", node, "bash", "-c", "(exec setsid slurmd -N $(hostname) < /dev/null > /dev/null 2>&1) &"
        )
        run.wait_for_end(jobs[STAGE])
    finally:
        run.cluster.cancel_all()
    assert run.result() == runs.reference
    assert run.events() == ["started", "done"]


@pytest.mark.slow
@pytest.mark.parametrize("rank", [1, 0], ids=["another node", "the head node"])
def test_power_cut(rank, run, runs):
    """A node died and the run with it; or the job came back and began anew."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    node, _ = run.rank_process(rank)
    run.cluster.script("poweroff", node)
    try:
        run.wait_for_end(jobs[STAGE])
    finally:
        run.cluster.script("poweron", node)
        run.cluster.wait(lambda: "down" not in run.cluster.output(["sinfo", "-h", "-o", "%t"]), 240, "node is back")
    assert run.result() == runs.reference
    assert run.events().count("started") == 2


@contextmanager
def held_up(run: Run, rank: int) -> Iterator[Path]:
    """The newest attempt's folder, while one of its processes is stopped: no step is made."""
    _, process = run.rank_process(rank)
    os.kill(process, signal.SIGSTOP)
    try:
        yield (run.run / "jobs" / STAGE / "latest").resolve()
    finally:
        os.kill(process, signal.SIGCONT)


@pytest.mark.slow
def test_real_time_limit(run, runs):
    """The signal of a real limit, which Slurm may send a minute early."""
    jobs = run.launch("--time", "2", "--grace-s", "45")
    run.wait_for_step(EARLY)
    with held_up(run, 1) as attempt:
        run.cluster.wait((attempt / REQUEST_FILE).exists, 240, f"the signal comes; {run.logs()}")
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events()[-3:] == ["saved", "started", "done"]
    assert "crash" not in run.events()


NO_SIGNAL = ("--sbatch", "--signal=B:URG@60")
"""Another signal than ours, which nobody heeds: as on a site that sends none."""


@pytest.mark.slow
def test_no_signal_comes(run, runs):
    """Where the signal got lost the job ran into its limit, and all since the last checkpoint was lost."""
    jobs = run.launch("--time", "1", "--grace-s", "60", *NO_SIGNAL)
    run.wait_for_step(EARLY)
    with held_up(run, 1) as attempt:
        ends = moment_of(run.cluster.facts(jobs[STAGE])["EndTime"])
        run.cluster.wait(lambda: time.time() > ends - 29, 120, "the moment to save has come")
    assert not (attempt / REQUEST_FILE).exists()
    run.cluster.wait(lambda: run.events().count("started") > 1, 240, f"requeued; {run.logs()}")
    reasons = [e["reason"] for e in Record(run.run / "jobs" / STAGE).events() if e["event"] == "saved"]
    assert all("the moment of RA3_MUST_SAVE_BY has come; saved after step" in reason for reason in reasons)
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events()[:3] == ["started", "saved", "started"]
    assert run.events()[-1] == "done"


@pytest.mark.slow
def test_a_save_that_does_not_end_before_the_limit(runs, tmp_path):
    """The job was ended as TIMEOUT, all that waited for it was cancelled, and the run stood still until morning."""
    run = runs.prepared(tmp_path, export={"enabled": True})
    jobs = run.launch("--time", "1", "--grace-s", "1", *NO_SIGNAL)
    run.wait_for_step(EARLY)
    _, process = run.rank_process(1)
    os.kill(process, signal.SIGSTOP)
    run.cluster.wait(lambda: run.events()[:3] == ["started", "limit", "started"], 300, f"past the limit; {run.logs()}")
    assert run.cluster.state(jobs["02-export"]) == "PENDING"
    assert run.cluster.facts(jobs[STAGE])["Reason"] == "None", "a later cancellation must not be taken for a limit"
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events() == ["started", "limit", "started", "done"]
    run.wait_for_end(jobs["02-export"])


@pytest.mark.slow
def test_rlvr_is_asked_to_leave_and_loses_a_process(runs, tmp_path):
    """Answers drawn twice or judged otherwise after a requeue; sandboxes that outlived their judge (verl#1466)."""
    run = runs.rlvr(tmp_path)
    jobs = run.launch()
    assert list(jobs) == ["00-tasks", RLVR]
    run.wait_for_step(EARLY, stage=RLVR)
    run.cluster.output(["scancel", "--batch", "--signal=USR1", jobs[RLVR]])
    run.cluster.wait(lambda: run.events(RLVR)[-1:] == ["started"] and "saved" in run.events(RLVR), 240, "goes on")
    run.wait_for_step(run.step(RLVR) + 4, stage=RLVR)
    here = [name for names in run.cluster.leftovers().values() for name in names]
    os.kill(run.rank_process(1, job=RLVR)[1], signal.SIGKILL)
    run.wait_for_end(jobs[RLVR])
    assert run.events(RLVR) == ["started", "saved", "started", "crash", "started", "done"]
    assert run.result(RLVR) == runs.rlvr_reference
    assert [name for name in here if name.endswith(SANDBOXED)], f"sandboxes are seen, were they left behind: {here}"


@pytest.mark.slow
def test_rlvr_with_a_node_that_only_generates(runs, tmp_path):
    """Two worlds in one allocation: ranks of the wrong node on a side, a side that goes on when the other has died."""
    alone = runs.rlvr(tmp_path / "alone", draw_ahead=True)
    runs.local(alone, ["rlvr", str(alone.config)], world=1)
    run = runs.rlvr(tmp_path / "divided", generating=1, draw_ahead=True)
    jobs = run.launch()
    run.wait_for_step(EARLY, stage=RLVR)
    run.cluster.output(["scancel", "--batch", "--signal=USR1", jobs[RLVR]])
    run.cluster.wait(lambda: run.events(RLVR)[-1:] == ["started"] and "saved" in run.events(RLVR), 240, "goes on")
    run.wait_for_step(run.step(RLVR) + 2, stage=RLVR)
    os.kill(run.rank_process(1, job=RLVR)[1], signal.SIGKILL)
    run.wait_for_end(jobs[RLVR])
    assert run.events(RLVR) == ["started", "saved", "started", "crash", "started", "done"]
    assert run.result(RLVR)["parameters_sha256"] == alone.result(RLVR)["parameters_sha256"]
    (curve,) = run.run.glob(f"{RLVR}/metrics.jsonl")
    assert "generator_idle_seconds" in curve.read_text()


@pytest.mark.slow
def test_preempted(run, runs):
    """A preempted job that ends by itself in the time it is given counted as failed."""
    jobs = run.launch()
    run.wait_for_step(EARLY)
    urgent = run.cluster.output(["sbatch", "--parsable", "--partition=urgent", "--nodes=4", "--gpus-per-node=8",
                                 "--output=/dev/null", "--wrap", "sleep 5"]).strip()  # fmt: skip
    run.cluster.wait_for_state(urgent, "COMPLETED")
    run.wait_for_end(jobs[STAGE])
    assert run.result() == runs.reference
    assert run.events() == ["started", "saved", "started", "done"]
    assert run.cluster.facts(jobs[STAGE])["Restarts"] == "1"


@pytest.mark.slow
def test_two_runs_on_the_same_nodes(runs, tmp_path):
    """Two jobs on a node chose the same port."""
    both = [runs.prepared(tmp_path / name) for name in "ab"]
    jobs = [run.launch("--gpus-per-node", "2", "--sbatch", "--nodelist=node[001-002]")[STAGE] for run in both]
    for run, job in zip(both, jobs, strict=True):
        run.wait_for_end(job)
        assert run.result() == runs.reference
        assert run.cluster.facts(job)["NodeList"] == "node[001-002]"
