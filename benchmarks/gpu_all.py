"""All GPU checks and benchmarks, each in a process of its own with its own time limit; one results file as they come.

    python benchmarks/gpu_all.py [--parts smoke,training] [--wheels DIR] [--out results/gpu] [--limit 570] [--tiny]

The order is that of worth. Whatever fails, hangs or runs into its limit loses only its own figures that were not known
yet: OUT/results.json and OUT/results.md (tables for docs/performance.md) are written after every part, OUT/<part>.log
has what it said. Without --parts as many are run as fit into --limit seconds; the rest says NOT RUN, for a next call
with the same --out, which keeps what is there. Exit code 0 when every part that ran ended well.

On a machine with nothing but Python 3.12, torch and transformers, give --wheels a folder with the wheels that
docs/performance.md lists: they are installed into a temporary folder, without an index and without dependencies, and
only the parts see them. This script itself needs the standard library alone.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEAST_S = 20.0
"""A part is not begun with less time than this."""
LINES = 200
"""Lines that are kept of a part that writes no figures."""
TAIL = 15
"""Lines of a part's output that are shown when it ended badly."""


@dataclass(frozen=True)
class Part:
    """One process."""

    name: str
    what: str
    """For --help and the results."""
    limit: float
    """Seconds it may take."""
    command: tuple[str, ...]
    """Arguments of Python."""
    writes: bool = True
    """Whether it takes `--results`; else what it prints is its result."""
    tiny: tuple[str, ...] | None = ("--tiny",)
    """Arguments that make it run on any machine; none = it has no such form."""
    device: tuple[str, ...] = field(default=())
    """Arguments on a GPU alone."""
    proof: str = ""
    """What the output has when something was done; without it the part counts as NOT RUN."""


def script(name: str) -> str:
    """Path of a benchmark."""
    return str(ROOT / "benchmarks" / name)


PARTS = (
    Part("smoke", "every kind of layer once", 90, (script("gpu_smoke.py"),)),
    Part("training", "Qwen2.5-1.5B shape, packed windows of 4096", 180, (script("gpu_training.py"),)),
    Part(
        "tests", "tests/gpu", 240, ("-m", "pytest", "-v", "-s", "-rfE", str(ROOT / "tests" / "gpu")), writes=False,
        tiny=(), proof=" passed",
    ),
    Part("rollout", "rollouts, generation, log-prob gap", 150, (script("gpu_rollout.py"),)),
    Part("estep", "a whole E-step, Qwen3-0.6B shape", 120, (script("gpu_estep.py"),)),
    Part("memory", "estimate against peaks", 150, (script("gpu_memory.py"), "--only", "estimate")),
    Part(
        "long", "Qwen3-0.6B shape at 16k", 120, (script("gpu_training.py"),),
        device=("--shape", "qwen3-0.6b", "--seq", "16384", "--windows", "1", "--settings", "te-bf16,fp8-tensorwise"),
    ),
    Part(
        "decode", "passes of one token, with and without CUDA graphs", 120, (script("gpu_decode.py"),), writes=False,
        tiny=("--shape", "tiny", "--batches", "1", "--tokens", "4"),
        device=("--shape", "qwen2.5-1.5b", "--precision", "bf16"),
    ),
    Part("largest", "largest model that trains", 240, (script("gpu_memory.py"), "--only", "largest")),
)  # fmt: skip
"""In order of worth."""


def install(wheels: Path, target: Path) -> None:
    """Put all wheels of a folder into `target`. Ends the program with pip's words when it cannot."""
    found = sorted(str(p) for p in wheels.glob("*.whl"))
    if not found:
        sys.exit(f"no *.whl in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target)]
    done = subprocess.run([*command, *found], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the wheels of {wheels} cannot be installed:\n{done.stderr[-2000:]}")
    print(f"installed {len(found)} wheels into {target}", flush=True)


def library_folders() -> list[str]:
    """Folders of the CUDA libraries that came with torch's wheels: Transformer Engine's machine code looks for them."""
    spec = importlib.util.find_spec("nvidia")
    places = list(spec.submodule_search_locations or []) if spec else []
    return sorted(str(p) for place in places for p in Path(place).glob("*/lib") if p.is_dir())


def environment(packages: Path | None) -> dict[str, str]:
    """What the parts see: this checkout, the installed wheels, torch's CUDA libraries."""
    env = dict(os.environ)

    def put_first(name: str, values: Sequence[str]) -> None:
        env[name] = os.pathsep.join([*values, *([env[name]] if env.get(name) else [])])

    put_first("PYTHONPATH", [str(ROOT), *([str(packages)] if packages else [])])
    if folders := library_folders():
        put_first("LD_LIBRARY_PATH", folders)
    # Megatron-Core's sequence parallelism wants its kernels in the order of their launches.
    env.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    return env


@dataclass(frozen=True)
class Outcome:
    """How a part ended."""

    state: str
    """`ok`, `some cases failed`, `failed (exit code N)`, `stopped after N s`, or `NOT RUN: why`."""
    seconds: float = 0.0


def run(part: Part, limit: float, out: Path, env: dict[str, str], tiny: bool) -> Outcome:
    """The part in a process group of its own, killed with all its children at its limit."""
    command = [sys.executable, *part.command, *((part.tiny or ()) if tiny else part.device)]
    results = out / f"{part.name}.json"
    results.unlink(missing_ok=True)
    if part.writes:
        command += ["--results", str(results)]
    print(f"\n== {part.name}: {part.what} (at most {limit:.0f} s)\n   {' '.join(command)}", flush=True)
    log, begin = out / f"{part.name}.log", time.monotonic()
    with open(log, "wb") as sink:
        process = subprocess.Popen(
            command, stdout=sink, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            code = process.wait(timeout=limit)
            state = "ok" if code == 0 else f"failed (exit code {code})"
        except subprocess.TimeoutExpired:
            state = f"stopped after {limit:.0f} s"
        finally:
            # Its children too, whether it ended or not: none may hold the device's memory.
            _end(process)
    if state == "ok" and any(r["note"].startswith("FAILED") for r in rows_of(part, out)):
        state = "some cases failed"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    if state == "ok" and part.proof and not any(part.proof in line for line in lines):
        state = f"NOT RUN: {lines[-1].strip('= ') if lines else 'it said nothing'}"
    shown = lines if state == "ok" and not part.writes else lines[-TAIL:] if state != "ok" else _figures(part, lines)
    print("\n".join(shown[-40:]), f"\n   {part.name}: {state}, {time.monotonic() - begin:.0f} s", sep="", flush=True)
    return Outcome(state, time.monotonic() - begin)


def _figures(part: Part, lines: list[str]) -> list[str]:
    """Lines that a benchmark prints with its figures; they begin with its name."""
    return [line for line in lines if "  " in line and not line.startswith((" ", "["))]


def _end(process: "subprocess.Popen[bytes]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def rows_of(part: Part, out: Path) -> list[dict]:
    """The figures a part has written, whole or not; lines of its output where it writes none."""
    if part.writes:
        try:
            return json.loads((out / f"{part.name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return []
    try:
        lines = (out / f"{part.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    # Of pytest's own lines the last one says how many passed.
    said = [line for line in lines[:-1] if line.strip() and not line.startswith(("=", "ERROR"))] + lines[-1:]
    return [{"part": part.name, "case": line.strip("= "), "value": None, "note": ""} for line in said[-LINES:]]


def write(out: Path, outcomes: dict[str, Outcome], device: str) -> None:
    """results.json and results.md, whole or not at all."""
    found = {
        part.name: {"state": outcomes[part.name].state, "seconds": round(outcomes[part.name].seconds, 1),
                    "what": part.what, "rows": rows_of(part, out)}
        for part in PARTS if part.name in outcomes
    }  # fmt: skip
    content = {"device": device, "written": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "parts": found}
    for name, text in (("results.json", json.dumps(content, indent=1)), ("results.md", markdown(content))):
        temporary = out / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out / name)


def markdown(content: dict) -> str:
    """Tables as docs/performance.md has them, a part each."""
    said = [f"On {content['device']}, {content['written']}.", ""]
    for name, part in content["parts"].items():
        said += [f"### {name}: {part['what']} ({part['state']}, {part['seconds']:.0f} s)", ""]
        figures = [r for r in part["rows"] if r["value"] is not None]
        others = [r for r in part["rows"] if r["value"] is None]
        if figures:
            said += ["| case | figure | target | |", "|---|---|---|---|"]
            said += [_table_row(r) for r in figures]
            said.append("")
        said += [f"- {r['case']}{': ' + r['note'] if r.get('note') else ''}" for r in others]
        said += [""] * bool(others)
    return "\n".join(said)


def _table_row(row: dict) -> str:
    verdict = {True: "met", False: "**missed**", None: ""}[row.get("met")]
    cells = (row["case"], f"{row['value']:.4g} {row['unit']}".strip(), row.get("target", ""), verdict)
    note = f" ({row['note']})" if row.get("note") else ""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (cells[0] + note, *cells[1:])) + " |"


def earlier(out: Path, device: str) -> dict[str, Outcome]:
    """How parts of a call before ended, by the file that it left in `out`; none of another device's."""
    try:
        content = json.loads((out / "results.json").read_text(encoding="utf-8"))
        if content["device"] != device:
            return {}
        return {name: Outcome(part["state"], part["seconds"]) for name, part in content["parts"].items()}
    except (OSError, ValueError, KeyError):
        return {}


def device_name(env: dict[str, str]) -> str:
    """The GPU as torch calls it, asked in a process of its own: a broken driver must not end this one."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU (CPU)')"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    return (done.stdout.strip().splitlines() or [f"torch does not start: {done.stderr[-200:]}"])[-1]


def chosen_parts(text: str | None) -> list[Part]:
    """Parts between commas, in order of worth; all unless given."""
    if text is None:
        return list(PARTS)
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = {part.name for part in PARTS}
    if wrong := [name for name in names if name not in known]:
        sys.exit(f"--parts {wrong[0]} is none of {', '.join(p.name for p in PARTS)}")
    return [part for part in PARTS if part.name in names]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="parts: " + "; ".join(f"{p.name} ({p.what}, {p.limit:.0f} s)" for p in PARTS),
    )  # fmt: skip
    parser.add_argument("--parts", help="names with commas; all unless given")
    parser.add_argument("--wheels", type=Path, help="folder of wheels that this machine lacks")
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder for results and logs")
    parser.add_argument("--limit", type=float, default=570.0, help="seconds of the whole call")
    parser.add_argument("--tiny", action="store_true", help="models of no size on any machine: shows that all run")
    options = parser.parse_args()
    end, parts = time.monotonic() + options.limit, chosen_parts(options.parts)
    options.out.mkdir(parents=True, exist_ok=True)
    out, packages = options.out.resolve(), None
    if options.wheels is not None:
        packages = Path(tempfile.mkdtemp(prefix="ra3-gpu-"))
    try:
        if packages is not None:
            install(options.wheels, packages)
        env = environment(packages)
        device = device_name(env)
        outcomes = earlier(out, device)
        print(f"device: {device}", flush=True)
        for part in parts:
            left = end - time.monotonic()
            if options.tiny and part.tiny is None:
                outcomes[part.name] = Outcome("NOT RUN: it has no tiny form")
            elif left < LEAST_S:
                outcomes[part.name] = Outcome(f"NOT RUN: no time left of {options.limit:.0f} s")
            else:
                outcomes[part.name] = run(part, min(part.limit, left), out, env, options.tiny)
            write(out, outcomes, device)
    finally:
        if packages is not None:
            shutil.rmtree(packages, ignore_errors=True)
    print(f"\n{out / 'results.json'}\n{out / 'results.md'}")
    ran = [outcomes[p.name].state for p in parts if not outcomes[p.name].state.startswith("NOT RUN")]
    sys.exit(0 if all(state == "ok" for state in ran) else 1)


if __name__ == "__main__":
    main()
