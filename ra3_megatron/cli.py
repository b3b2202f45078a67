"""The command `ra3`: one subcommand per job a user has.

Nothing heavy is imported before a command runs, so that `ra3 --help` answers at once.
Exit codes: 0 done, 1 a bug or a crash (with traceback), 2 an error the user can cure (one line), 85 saved on request
and fit to go on, 86 saved since the stop file is there, 130 Ctrl-C; more in `ra3_megatron.config.control`.
"""

import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ra3_megatron.config.control import EXIT_CRASH, EXIT_USER, Interrupted, exit_code, write_outcome
from ra3_megatron.config.errors import UserError
from ra3_megatron.launch import cli as cluster
from ra3_megatron.stages.profile_command import profile

if TYPE_CHECKING:
    from ra3_megatron.config.run import RunConfig

GRACE_S = 3.0
"""Seconds a rank other than 0 waits before it prints a user error.

When every rank has the same error, rank 0 says it and the launcher ends the others within that time; when only
this rank has it, nobody else speaks and it is printed.
"""

app = typer.Typer(
    name="ra3",
    help="Mid-training of code language models with RA3 on Megatron-Core.",
    no_args_is_help=True,
    add_completion=False,
    # Locals in a traceback could show secrets, and a user of torchrun reads plain ones in a log file.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
convert = typer.Typer(
    name="convert", help="Hugging Face weights in, out, and proof that they agree.", no_args_is_help=True
)
app.add_typer(convert)
judge = typer.Typer(name="judge", help="Judging of programs, for other machines.", no_args_is_help=True)
app.add_typer(judge)
tasks = typer.Typer(name="tasks", help="Sets of tasks for reinforcement learning.", no_args_is_help=True)
app.add_typer(tasks)


def process_rank() -> int:
    """Rank of this process as its launcher (torchrun, srun) tells it; 0 without one, or when it tells nonsense."""
    from ra3_megatron.parallel.launch import launch_from_env

    try:
        return launch_from_env().rank
    except UserError:
        # Whoever starts the process groups raises it again, with the command under way; printing must not.
        return 0


def say(text: str) -> None:
    """Print ordinary output, on rank 0 only."""
    if process_rank() == 0:
        print(text, flush=True)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        from ra3_megatron import __version__

        say(f"ra3-megatron {__version__}")
        raise typer.Exit


@app.command(no_args_is_help=True)
def midtrain(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, such as configs/quickstart.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, batches and memory of the run, and start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of processes a dry run reckons with.", show_default=False)
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory of a device: a dry run prints the largest micro-batch for it.", show_default=False
        ),
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with a run whose configuration was changed on purpose.")
    ] = False,
    stage: Annotated[
        str | None, typer.Option(help="Run this stage alone, such as variational; what it needs must be done.")
    ] = None,
    arm: Annotated[str | None, typer.Option(help="Arm of that stage; the first of run.arms unless given.")] = None,
    round: Annotated[int | None, typer.Option(min=1, help="EM round of that stage; 1 unless given.")] = None,
    part: Annotated[
        str | None, typer.Option(help="With --stage generate: draw this part of the shards alone, such as 3/16.")
    ] = None,
    status: Annotated[bool, typer.Option("--status", help="Print which stages are done, and start nothing.")] = False,
) -> None:
    """Train a model: corpus in, trained model and report out. Run it again to go on where it stopped."""
    from ra3_megatron.config.run import load_config

    if stage is None and (arm is not None or round is not None):
        raise UserError("--arm and --round say which stage is meant; give --stage too")
    run_config = load_config(config, overrides or [])
    _run(run_config, dry_run, (world_size, memory_gib), status, accept_changes, stage, arm, round, part)


@app.command(no_args_is_help=True)
def rlvr(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, such as configs/smollm2-135m-rlvr.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print sizes, batches and memory of the run, and start nothing.")
    ] = False,
    world_size: Annotated[
        int | None, typer.Option(min=1, help="Number of processes a dry run reckons with.", show_default=False)
    ] = None,
    memory_gib: Annotated[
        float | None,
        typer.Option(
            min=0, help="Memory of a device: a dry run prints the largest micro-batch for it.", show_default=False
        ),
    ] = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with a run whose configuration was changed on purpose.")
    ] = False,
    stage: Annotated[str | None, typer.Option(help="Run this stage alone, such as tasks or rlvr.")] = None,
    status: Annotated[bool, typer.Option("--status", help="Print which stages are done, and start nothing.")] = False,
) -> None:
    """Reinforcement learning with judged programs alone: no mid-training before. Run it again to go on."""
    from ra3_megatron.config.run import load_config, without_arms

    run_config = without_arms(load_config(config, overrides or []))
    _run(run_config, dry_run, (world_size, memory_gib), status, accept_changes, stage)


def _run(
    config: "RunConfig",
    dry_run: bool,
    machine: tuple[int | None, float | None],
    status: bool,
    accept_changes: bool,
    stage: str | None = None,
    arm: str | None = None,
    round: int | None = None,
    part: str | None = None,
) -> None:
    """What `midtrain` and `rlvr` have in common. `machine`: processes a dry run reckons with, and GiB of each."""
    if dry_run:
        from ra3_megatron.stages.dry_run import dry_run as print_dry_run

        # Under a launcher every process comes here; one answer is enough.
        if process_rank() == 0:
            print_dry_run(config, *machine)
        return
    world_size, memory_gib = machine
    if world_size is not None:
        raise UserError(f"--world-size {world_size} was given without --dry-run; start the processes with torchrun")
    if memory_gib is not None:
        raise UserError(f"--memory-gib {memory_gib:g} was given without --dry-run; add it, or leave --memory-gib out")
    from ra3_megatron.stages import pipeline

    if status:
        say(pipeline.status(config))
        return
    shards = pipeline.parse_part(part, stage)
    pipeline.run(config, accept_changes, pipeline.Only(stage, arm, round, shards) if stage is not None else None)


app.command(no_args_is_help=True)(profile)
app.command(no_args_is_help=True)(cluster.launch)
app.command(hidden=True)(cluster.job)


@app.command(no_args_is_help=True)
def compare(
    config: Annotated[Path, typer.Argument(help="YAML file of the runs; run.arms and run.seed are replaced.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings that replace the file's.")
    ] = None,
    arms: Annotated[str, typer.Option(help="Arms to compare, such as ntp,self_comment,bolt,brite,ra3.")] = "ntp,ra3",
    seeds: Annotated[str, typer.Option(help="Seeds, one run each, such as 1,2,3.")] = "1,2,3",
    prices: Annotated[
        str, typer.Option(help="Prices of a thought to run the E-step with, such as 0.01,0.05,0.2.")
    ] = "",
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on with runs whose configuration was changed on purpose.")
    ] = False,
) -> None:
    """Train arms with several seeds and compare them on held-out code. Run it again to go on where it stopped."""
    from ra3_megatron.config.run import load_config

    chosen, numbers = _listed("--arms", arms, str), _listed("--seeds", seeds, int)
    swept, run_config = _listed("--prices", prices, float), load_config(config, overrides or [])
    from ra3_megatron.stages.compare import run_compare

    run_compare(run_config, chosen, numbers, accept_changes, swept)


def _listed[T](option: str, text: str, kind: Callable[[str], T]) -> list[T]:
    """Values between commas. Raises UserError for what is none."""
    try:
        return [kind(part.strip()) for part in text.split(",") if part.strip()]
    except ValueError:
        raise UserError(f"{option} {text}: give values with commas between them, such as 1,2,3") from None


@convert.command("import", no_args_is_help=True)
def import_(
    source: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file.")],
    out: Annotated[Path, typer.Argument(help="Folder of the Megatron checkpoint to write.")],
    dtype: Annotated[str, typer.Option(help="source, float32, bfloat16 or float16.")] = "source",
) -> None:
    """Hugging Face weights (or GGUF) to a Megatron checkpoint that loads at any parallel sizes."""
    from ra3_megatron.checkpoint.convert import import_hf

    _one_process("convert import")
    say(str(import_hf(source, out, dtype=dtype)))


@convert.command("export", no_args_is_help=True)
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron checkpoint, imported or trained.")],
    out: Annotated[Path, typer.Argument(help="Hugging Face folder to write.")],
    dtype: Annotated[str, typer.Option(help="checkpoint, float32, bfloat16 or float16.")] = "checkpoint",
    max_shard_gb: Annotated[float, typer.Option(help="Largest safetensors file, GB.")] = 5.0,
) -> None:
    """A Megatron checkpoint to a Hugging Face folder."""
    from ra3_megatron.checkpoint.convert import export_hf

    _one_process("convert export")
    say(str(export_hf(checkpoint, out, dtype=dtype, max_shard_gb=max_shard_gb)))


@convert.command("verify", no_args_is_help=True)
def verify_(
    checkpoint: Annotated[Path, typer.Argument(help="Megatron checkpoint.")],
    hf_folder: Annotated[Path, typer.Argument(help="Hugging Face folder or GGUF file to compare with.")],
) -> None:
    """Compare a checkpoint with a Hugging Face folder: tensors, and logits on text. Exit code 1 if they differ."""
    from ra3_megatron.checkpoint.verify import verify

    _one_process("convert verify")
    outcome = verify(checkpoint, hf_folder)
    say(str(outcome))
    raise typer.Exit(0 if outcome.ok else 1)


@judge.command("serve")
def judge_serve(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[judge.field=value]...", help="Settings, such as judge.workers=32 judge.secret_file=F."
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; any but loopback needs judge.secret_file.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 = a free one, printed.")] = 8099,
    allow_unsafe: Annotated[
        bool,
        typer.Option("--allow-unsafe", help="Run tests that share a process with the program (parity evaluation)."),
    ] = False,
) -> None:
    """Judge programs for trainers on other machines, over HTTP, until SIGTERM: judge.backend=service is the client."""
    from ra3_megatron.config.run import config_from_dict

    config = config_from_dict({}, overrides or []).judge
    _one_process("judge serve")
    from ra3_megatron.reward.service import serve

    serve(host, port, config, allow_unsafe=allow_unsafe)


def _one_process(command: str) -> None:
    """Raise UserError under a launcher with several processes, which would write the same files side by side."""
    from ra3_megatron.parallel.launch import launch_from_env

    world = launch_from_env().world
    if world > 1:
        raise UserError(
            f"ra3 {command} was started as {world} processes; it is a job for one: start it without torchrun"
        )


@app.command(no_args_is_help=True)
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="Checkpoint, run folder, Hugging Face folder or GGUF file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings, such as judge.workers=8.")
    ] = None,
    benchmarks: Annotated[
        str, typer.Option(help="humaneval, humaneval+, mbpp, mbpp+, livecodebench, codeforces, with commas.")
    ] = "humaneval,mbpp",
    samples: Annotated[int, typer.Option(min=1, help="Answers to each problem.")] = 1,
    mode: Annotated[str, typer.Option(help="strict, or parity with the reference evaluators.")] = "strict",
    temperature: Annotated[float | None, typer.Option(help="0 = greedy; 0.8 with several samples.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 512,
    data_dir: Annotated[str | None, typer.Option(help="Folder with the benchmarks' files; else the hub.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results; evaluations/NAME unless given.")] = None,
    against: Annotated[Path | None, typer.Option(help="Model, or folder of results, to compare with.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many problems of each.")] = None,
) -> None:
    """Measure a model on benchmarks. Run it again to go on where it stopped."""
    from ra3_megatron.stages.evaluate_alone import run_alone

    chosen = {"benchmarks": _listed("--benchmarks", benchmarks, str), "samples": samples, "mode": mode}
    chosen |= {"max_tokens": max_tokens, "limit": limit, "data_dir": data_dir}
    chosen["temperature"] = temperature if temperature is not None else 0.8 if samples > 1 else 0.0
    run_alone(checkpoint, out, against, chosen, overrides or [])


@tasks.command("check", no_args_is_help=True)
def check_tasks(
    path: Annotated[Path, typer.Argument(help="Task file, or a folder with files of the usual names.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.field=value]...", help="Settings, such as judge.cpu_s=8.")
    ] = None,
    layout: Annotated[
        str, typer.Option(help="tasks, mbpp_train, acecode, deepcoder, areal, or a benchmark.")
    ] = "tasks",
) -> None:
    """Read a set of tasks and judge its reference solutions. Exit code 1 if one fails its own tests."""
    from ra3_megatron.stages.evaluate_alone import check_tasks as check

    _one_process("tasks check")
    account, fine = check(path, layout, overrides or [])
    say(account)
    raise typer.Exit(0 if fine else 1)


@app.command()
def doctor() -> None:
    """Say what this machine has, what will work on it and what will not."""
    from ra3_megatron.stages.doctor import run_doctor

    raise typer.Exit(0 if run_doctor() else 1)


@app.command(no_args_is_help=True)
def report(run_dir: Annotated[Path, typer.Argument(help="Run folder, such as runs/quickstart.")]) -> None:
    """Build `report.html` of a run again from the files in its folder."""
    from ra3_megatron.report.run_report import build_report

    say(f"wrote {build_report(run_dir)}")


def report_user_error(error: UserError) -> None:
    """Print `error` as one line on standard error; ranks other than 0 name themselves and wait `GRACE_S` first."""
    rank = process_rank()
    if rank:
        # The launcher's SIGTERM must end the wait even where training has a handler that asks for a last checkpoint.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(GRACE_S)
    where = f" (rank {rank})" if rank else ""
    print(f"error{where}: {' '.join(str(error).split())}", file=sys.stderr, flush=True)


def main() -> None:
    """Entry point of the console script."""
    try:
        app(prog_name="ra3")
    except UserError as error:
        write_outcome(EXIT_USER, " ".join(str(error).split()))
        report_user_error(error)
        sys.exit(exit_code(EXIT_USER))
    except Interrupted as wish:
        write_outcome(wish.code, wish.reason)
        say(f"left: {wish.reason}")
        sys.exit(exit_code(wish.code))
    except Exception as error:
        # Whoever fails first knows why; the others only that a peer is gone.
        write_outcome(EXIT_CRASH, f"rank {process_rank()}: {type(error).__name__}: {error}", first=True)
        raise
