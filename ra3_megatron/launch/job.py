"""What a batch script runs on the first node: one stage, watched over from the check of the nodes to the requeue.

Exit codes: 0 the stage is DONE; 2 an error the user can cure; 86 stopped by the stop file; 93 no progress; 143 ended by
Slurm or the user; 85 wants to go on and could not be requeued (with RA3_RESTART=copies: the next copy does).
"""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.control import (
    ATTEMPT_DIR,
    EXIT_CRASH,
    EXIT_DONE,
    EXIT_GO_ON,
    EXIT_NO_PROGRESS,
    EXIT_STOPPED,
    EXIT_USER,
    MUST_SAVE_BY,
    OUTCOME_FILE,
    SETUP_LIMIT,
    STOP_FILE,
    STRAGGLERS_FILE,
    process_start,
    read_json,
)
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.run import RunConfig
from ra3_megatron.launch import nodes as node_choice
from ra3_megatron.launch import slurm, startup
from ra3_megatron.launch.attempts import STARTED, STARTUP, Record, Work, fruitless
from ra3_megatron.launch.folder import JOBS, LaunchFolder
from ra3_megatron.launch.settings import JobVariables, job_variables
from ra3_megatron.launch.step import Step, choose_launcher, port_of, process_environment, start_command
from ra3_megatron.launch.watch import Ended, Signals, run_step, say
from ra3_megatron.stages.graph import ONE_PROCESS, Node, find, graph

EXIT_TERMINATED = 143
"""Ended by SIGTERM: a cancellation, a node's end. Never followed by a requeue of ours."""

CANCELLED, PREEMPTED, PAST_LIMIT = "cancelled", "preempted", "past the limit"
"""What SIGTERM to a job can mean."""

KILL_PATIENCE_S = 90.0
"""How long a job that was requeued waits to be killed, seconds."""


@dataclass(frozen=True)
class Wanted:
    """The stage a job is for."""

    stage: str
    """Kind of stage."""
    arm: str | None
    """Arm, none = the first."""
    round: int | None
    """Round, none = the first."""
    join: bool = False
    """The end of a generation whose shards an array has made."""


class Job:
    """One attempt at a stage."""

    def __init__(self, config: RunConfig, config_path: Path, wanted: Wanted) -> None:
        self.config, self.config_path, self.wanted = config, config_path, wanted
        self.env = os.environ
        self.v: JobVariables = job_variables()
        self.folder = LaunchFolder(Path(config.run.dir).absolute())
        self.node: Node = find(config, wanted.stage, wanted.arm, wanted.round)
        number = graph(config).index(self.node)
        self.part = self._part()
        self.work = Work(self.folder.run / f"{number:02d}-{self.node.name}", self.part)
        name = self.work.stage.name + ("-join" if wanted.join else "")
        self.jobs = self.folder.run / JOBS / name
        if self.part is not None:
            self.jobs = self.jobs / f"part-{self.part[0]:04d}"
        self.record = Record(self.jobs)
        self.id, self.restart = slurm.own_id(), int(self.env.get("SLURM_RESTART_COUNT", "0"))
        self.signals = Signals()
        self.granted: float | None = None
        # `exec` has made this process of the script's.
        self.moments = {"script": process_start(), "job": time.time()}

    def _part(self) -> tuple[int, int] | None:
        if self.wanted.stage != "generate" or "SLURM_ARRAY_TASK_ID" not in self.env:
            return None
        first, last = int(self.env["SLURM_ARRAY_TASK_MIN"]), int(self.env["SLURM_ARRAY_TASK_MAX"])
        if first != 0 or int(self.env["SLURM_ARRAY_TASK_COUNT"]) != last + 1:
            raise UserError(
                f"the array runs from {first} to {last} with {self.env['SLURM_ARRAY_TASK_COUNT']} elements; the shards "
                "are divided among elements 0 to n - 1: submit with --array=0-15 or the like"
            )
        return int(self.env["SLURM_ARRAY_TASK_ID"]), last + 1

    # ---------------------------------------------------------------- the attempt

    def run(self) -> int:
        """Do what is left to do; returns the exit code of the job."""
        self.signals.listen()
        if self.work.done:
            say(f"{self.work.stage} is done already")
            return EXIT_DONE
        if (self.folder.run / STOP_FILE).exists():
            say(f"{self.folder.run / STOP_FILE} is there: nothing is started; slurm/resume.sh goes on")
            return EXIT_STOPPED
        if (verdict := self._give_up()) is not None:
            return verdict
        attempt = self._new_attempt()
        allocated = slurm.hostnames(self.env["SLURM_JOB_NODELIST"])
        needed = 1 if self._alone else len(allocated) - self.v.spares
        if needed < 1:
            raise UserError(f"RA3_SPARES = {self.v.spares} of {len(allocated)} nodes; leave at least one to work")
        self._refuse_too_few_cores()
        choice = self._choose(allocated, needed, attempt)
        self.moments["checked"] = time.time()
        self.record.add(STARTED, job=self.id, restart=self.restart, progress=self.work.progress(),
                        nodes=list(choice.chosen))  # fmt: skip
        if len(choice.chosen) < needed:
            return self._elsewhere(choice, len(allocated))
        for node, why in choice.bad.items():
            say(f"{node} stays out: {why}")
        return self._conclude(self._start(choice.chosen, attempt), attempt)

    def _refuse_too_few_cores(self) -> None:
        processes, cores = 1 if self._alone else self._processes(), int(self.env.get("SLURM_CPUS_ON_NODE", "0"))
        if 0 < cores < processes and choose_launcher(self.v) == "srun":
            raise UserError(
                f"the job has {cores} cores on a node for {processes} processes; submit it with --ntasks-per-node="
                f"{processes} (and --cpus-per-task), or --exclusive"
            )

    @property
    def _alone(self) -> bool:
        return self.wanted.stage in ONE_PROCESS or self.wanted.join

    def _new_attempt(self) -> Path:
        """`<run>/jobs/<job>/<id>-<restart>` and the link `latest` to it."""
        attempt = self.jobs / f"{self.id}-{self.restart}"
        attempt.mkdir(parents=True, exist_ok=True)
        link = self.jobs / f".latest.{os.getpid()}"
        link.unlink(missing_ok=True)
        link.symlink_to(attempt.name)
        os.replace(link, self.jobs / "latest")
        return attempt

    def _choose(self, allocated: Sequence[str], needed: int, attempt: Path) -> node_choice.Choice:
        listed = [self.folder.run / node_choice.BAD_NODES]
        listed += [Path(self.v.bad_nodes)] if self.v.bad_nodes else []
        bad = node_choice.read_bad(listed)
        asked = [node for node in allocated if node not in bad]
        if self.v.check != "off" and asked:
            script = self.folder.code_of_job(self.env) / "slurm" / "node_check.sh"
            self.env["RA3_EXPECT_GPUS"] = self.env.get("SLURM_GPUS_ON_NODE", "0")
            failed = node_choice.check_nodes(asked, script, attempt, self.v.check_timeout_s)
            # When every node fails, what they share is at fault: none of them is put on the list for good.
            if len(failed) < max(2, len(asked)):
                node_choice.add_bad(listed[0], failed)
            bad |= failed
        return node_choice.choose(allocated, needed, bad)

    def _start(self, nodes: tuple[str, ...], attempt: Path) -> Ended:
        processes = 1 if self._alone else self._processes()
        port = port_of(int(self.env["SLURM_JOB_ID"]), self.restart)
        mounts = (self.folder.run, self.folder.code_of_job(self.env), Path.cwd())
        step = Step(nodes, processes, port, attempt, mounts)
        self.env[ATTEMPT_DIR] = str(attempt)
        facts = slurm.job_facts(self.env["SLURM_JOB_ID"])
        self.granted = startup.moment_of(facts.get("StartTime", ""))
        if (limit := startup.moment_of(facts.get("EndTime", ""))) is not None:
            # Half the grace before the limit: the second net, under Slurm's signal.
            self.env[MUST_SAVE_BY] = f"{limit - self.v.grace_s / 2:.0f}"
        env = process_environment(step, choose_launcher(self.v))
        say(f"{self.work.stage.name}, attempt {attempt.name}: {len(nodes)} x {processes} processes on "
            f"{','.join(nodes)}; logs in {attempt}")  # fmt: skip
        if self.v.check_allreduce_gb_s and not self._alone:
            slow = self._slow_network(step, env)
            if slow is not None:
                return slow
        setup = float(self.env.get(SETUP_LIMIT) or 1800.0)
        arguments = start_command(step, self.v, ["ra3_megatron", *self._arguments()])
        return run_step(arguments, env, step, self.signals, setup + 60.0, self.v.hang_poll_s)

    def _slow_network(self, step: Step, env: dict[str, str]) -> Ended | None:
        """None when the all-reduce over all processes is fast enough."""
        floor = str(self.v.check_allreduce_gb_s)
        arguments = start_command(step, self.v, ["ra3_megatron.stages.bandwidth", floor])
        ended = run_step(arguments, env, step, self.signals, 600.0, self.v.hang_poll_s)
        return None if ended.code == 0 and not ended.hung else ended

    def _processes(self) -> int:
        gpus = self.env.get("SLURM_GPUS_ON_NODE", "")
        return self.v.processes or (int(gpus) if gpus.isdigit() else 0) or 1

    def _arguments(self) -> list[str]:
        arguments = ["midtrain", str(self.config_path), "--stage", self.node.kind]
        arguments += ["--arm", self.node.arm] if self.node.arm else []
        arguments += ["--round", str(self.node.round)] if self.node.round else []
        return arguments + (["--part", f"{self.part[0]}/{self.part[1]}"] if self.part else [])

    # ---------------------------------------------------------------- the end

    def _conclude(self, ended: Ended, attempt: Path) -> int:
        outcome = read_json(attempt / OUTCOME_FILE) or {}
        code, reason = int(outcome.get("code", ended.code)), str(outcome.get("reason", f"exit code {ended.code}"))
        self._note_stragglers(attempt)
        if seconds := startup.seconds_of(self.granted, self.moments, attempt):
            self.record.add(STARTUP, seconds=seconds)
            say(startup.in_words(seconds))
        if self.work.done:
            # DONE is written last: what failed after it, such as the report, can be made again from the files.
            text = "done" if ended.code == EXIT_DONE else f"done; then {reason}; see node*.log"
            return self._say_end("done", EXIT_DONE, text, attempt)
        if code == EXIT_STOPPED or (self.folder.run / STOP_FILE).exists():
            return self._say_end("stopped", EXIT_STOPPED, reason, attempt)
        if code == EXIT_USER:
            return self._say_end("user_error", EXIT_USER, reason, attempt)
        why = self._why_terminated() if self.signals.end else ""
        if why == CANCELLED:
            return self._say_end("terminated", EXIT_TERMINATED, "SIGTERM came: cancelled, or a node's end", attempt)
        if ended.hung:
            self._say_end("hang", EXIT_CRASH, ended.hung, attempt)
        elif code == EXIT_GO_ON:
            self._say_end("saved", EXIT_GO_ON, reason, attempt)
        elif why == PAST_LIMIT:
            text = f"not saved before the time limit; give more --grace-s than {self.v.grace_s:.0f}"
            self._say_end("limit", EXIT_CRASH, text, attempt)
        else:
            self._say_end("crash", EXIT_CRASH, f"{reason}; see node*.log", attempt)
        verdict = self._give_up()
        return self._again() if verdict is None else verdict

    def _why_terminated(self) -> str:
        """Why Slurm ends this job.

        It requeues neither one that fails after a notice of preemption nor one past its limit; both can requeue
        themselves until they are killed.
        """
        facts = slurm.job_facts(self.env["SLURM_JOB_ID"])
        if facts.get("PreemptTime", "None") not in ("", "None", "Unknown"):
            return PREEMPTED
        return PAST_LIMIT if facts.get("Reason") == "TimeLimit" else CANCELLED

    def _say_end(self, event: str, code: int, reason: str, attempt: Path) -> int:
        self.record.add(event, job=self.id, restart=self.restart, reason=reason, progress=self.work.progress())
        say(f"{event}: {reason} ({attempt})")
        return code

    def _note_stragglers(self, attempt: Path) -> None:
        """Nodes that were slow for long stay out of the next attempt."""
        found: dict[str, Any] = read_json(attempt / STRAGGLERS_FILE) or {}
        if slow := found.get("slow", {}):
            say(f"slow nodes: {slow}")
            node_choice.add_bad(self.folder.run / node_choice.BAD_NODES, slow)

    def _give_up(self) -> int | None:
        """Exit code of a job that has brought nothing forward too often; else none."""
        count = fruitless(self.record.events(), self.work.progress())
        if count.ended < self.v.max_fruitless and count.lost < self.v.max_lost:
            return None
        tries = f"{count.ended} attempts that ended by themselves and {count.lost} that were lost"
        say(f"no progress in {tries}: given up; what waits for this job is cancelled; slurm/resume.sh starts it anew")
        return EXIT_NO_PROGRESS

    def _again(self) -> int:
        if self.v.restart == "copies":
            say("the next copy of this job goes on")
            return EXIT_GO_ON
        say("requeued")
        # Slurm ends this job with SIGTERM to all its processes, scontrol among them.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        try:
            slurm.persistently(["scontrol", "requeue", self.id])
        except UserError as error:
            raise UserError(f"{error}; where jobs may not be requeued, launch with --copies") from None
        return self._wait_for_the_end()

    def _elsewhere(self, choice: node_choice.Choice, allocated: int) -> int:
        """Have Slurm run the job again on other nodes: those that are bad are excluded."""
        reason = f"{len(choice.bad)} of {allocated} nodes are bad: {choice.bad}"
        self._say_end("bad_nodes", EXIT_GO_ON, reason, self.jobs)
        verdict = self._give_up()
        if verdict is not None:
            return verdict
        if self.v.restart == "copies":
            say("the next copy of this job goes on; give the bad nodes to sbatch --exclude")
            return EXIT_GO_ON
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for arguments in (
            ["scontrol", "requeuehold", self.id],
            ["scontrol", "update", f"JobId={self.id}", f"ExcNodeList={','.join(choice.bad)}"],
            ["scontrol", "release", self.id],
        ):
            slurm.persistently(arguments)
        return self._wait_for_the_end()

    def _wait_for_the_end(self) -> int:
        """A requeued job is killed by Slurm; one that leaves earlier by itself could be taken for failed."""
        end = time.monotonic() + KILL_PATIENCE_S
        while time.monotonic() < end:
            time.sleep(1.0)
        return EXIT_GO_ON


def run_job(config: RunConfig, config_path: Path, wanted: Wanted) -> int:
    """Run one attempt at a stage inside a Slurm job; returns the job's exit code.

    Raises UserError, after leaving word in the job's record, for what starting again cannot cure.
    """
    if "SLURM_JOB_ID" not in os.environ:
        raise UserError(
            "this is the inside of a Slurm job; submit it: sbatch slurm/midtrain.sh CONFIG, or slurm/chain.sh"
        )
    job = Job(config, config_path, wanted)
    try:
        return job.run()
    except UserError as error:
        job.record.add("user_error", job=job.id, restart=job.restart, reason=str(error), progress=job.work.progress())
        raise
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
