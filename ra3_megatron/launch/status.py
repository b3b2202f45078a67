"""Where a run on a cluster stands, in one table; and what to clear before it goes on."""

import time
from pathlib import Path

from ra3_megatron.config.control import HEARTBEAT_FILE, STOP_FILE, read_json
from ra3_megatron.config.files import is_done
from ra3_megatron.config.run import RunConfig
from ra3_megatron.launch.attempts import RECORD, RESET, Record, Work
from ra3_megatron.launch.folder import JOBS, LaunchFolder
from ra3_megatron.launch.nodes import BAD_NODES, read_bad
from ra3_megatron.launch.plan import JobSpec, plan
from ra3_megatron.launch.settings import Settings
from ra3_megatron.launch.slurm import Queued, queue
from ra3_megatron.launch.submit import job_name


def status(config: RunConfig, folder: LaunchFolder, settings: Settings) -> str:
    """A line per job: done or not, in the queue or not, how far, when last heard of, how the last attempt ended."""
    waiting = queue()
    rows = [("job", "state", "step", "heard of", "last attempt")]
    rows += [_row(folder, spec, waiting.get(job_name(folder.run, spec), [])) for spec in plan(config, settings)]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = [str(folder.run)]
    lines += [
        "  " + "  ".join([*(c.ljust(w) for c, w in zip(row, widths, strict=False)), row[4]]).rstrip() for row in rows
    ]
    if (folder.run / STOP_FILE).exists():
        lines.append(f"  {STOP_FILE} is there: nothing starts until slurm/resume.sh {folder.run}")
    for node, why in read_bad([folder.run / BAD_NODES]).items():
        lines.append(f"  not used: {node} ({why})")
    return "\n".join(lines)


def _row(folder: LaunchFolder, spec: JobSpec, queued: list[Queued]) -> tuple[str, str, str, str, str]:
    jobs, work = folder.run / JOBS / spec.name, Work(folder.run / spec.stage)
    if is_done(folder.run / spec.stage):
        return spec.name, "DONE", "", "", ""
    states = sorted({q.state for q in queued})
    state = f"{'/'.join(states)} {queued[0].job}" if queued else "not queued"
    if queued and states == ["PENDING"]:
        state += f" {queued[0].reason}"
    progress = work.progress()
    step = f"{progress[0]}" if progress[0] else (f"{progress[1]} shards" if progress[1] else "")
    return spec.name, state, step, _heard(jobs), _last(jobs, spec, bool(queued))


def _heard(jobs: Path) -> str:
    """Seconds since the newest heartbeat of a job or of its array's elements."""
    beats = [
        read_json(path) for path in [*jobs.glob(f"latest/{HEARTBEAT_FILE}"), *jobs.glob(f"*/latest/{HEARTBEAT_FILE}")]
    ]
    times = [float(beat["time"]) for beat in beats if beat]
    return f"{time.time() - max(times):.0f} s ago" if times else ""


def _last(jobs: Path, spec: JobSpec, queued: bool) -> str:
    """How the newest attempt ended; of an array, what its elements say, counted."""
    records = [jobs] if not spec.array else sorted(p for p in jobs.glob("part-*") if (p / RECORD).exists())
    texts = []
    for record in records:
        event = Record(record).last()
        if event is not None:
            name = f"{record.name}: " if spec.array else ""
            texts.append(f"{name}{event['event']}: {event.get('reason', '')}")
    if not texts and not queued and jobs.exists() and not any(p for p in jobs.iterdir() if p.name != "latest"):
        return "never began: cancelled with what it waited for, or see sacct"
    return "; ".join(texts[:3]) + (f"; and {len(texts) - 3} more" if len(texts) > 3 else "")


def clear(config: RunConfig, folder: LaunchFolder, settings: Settings) -> list[str]:
    """Remove the stop file and start the counts of fruitless attempts anew; returns what was done."""
    said = []
    if (folder.run / STOP_FILE).exists():
        (folder.run / STOP_FILE).unlink()
        said.append(f"removed {folder.run / STOP_FILE}")
    for spec in plan(config, settings):
        jobs = folder.run / JOBS / spec.name
        for path in [*jobs.glob(RECORD), *jobs.glob(f"part-*/{RECORD}")]:
            record = Record(path.parent)
            last = record.last()
            if last is not None and last["event"] != "done":
                said.append(f"{path.parent.relative_to(folder.run / JOBS)}: {last['event']}: {last.get('reason', '')}")
                record.add(RESET)
    return said
