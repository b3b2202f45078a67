"""What reference solutions give for the inputs of EvalPlus: computed once, in other processes, and kept.

A reference is code of the data set, trusted as its tests are; it runs in a process of its own all the same, with
limits, no environment and an empty working folder.
"""

import gzip
import os
import pickle
import resource
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_bytes
from ra3_megatron.evaluation.benchmarks.plain import dumps, loads
from ra3_megatron.evaluation.benchmarks.task import digest_of

_VERSION = 1
"""Raised when outputs are computed or written otherwise."""
_CPU_S = 300
"""Processor seconds of the references of one chunk, at most."""
_WALL_S = 1800
"""Wall seconds of the same; a busy machine fails nothing."""
_MEMORY = 4 << 30
"""Address space of a process, bytes."""
_CHUNK = 12
"""Tasks of one process: many, so that its start costs little; few, so that all cores have work."""


@dataclass(frozen=True)
class Asked:
    """A reference and what it is to be called with."""

    name: str
    """Of the task, for messages."""
    program: str
    """The reference solution, whole."""
    entry_point: str
    """Function it defines."""
    inputs: list[list]
    """Arguments of every call."""
    presence: bool = False
    """Only whether it gives anything but None is kept: its outputs are no plain data."""


@dataclass(frozen=True)
class Answered:
    """What a reference gave."""

    outputs: list[Any]
    """For every input, in order."""
    seconds: list[float]
    """Processor seconds of every call."""


def cache_folder(configured: str | None) -> Path:
    """Where outputs are kept: the configured folder, else `ra3_megatron` in the user's cache folder."""
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(configured) if configured else Path(home) / "ra3_megatron"


def expected_outputs(
    asked: Sequence[Asked], cache: Path, name: str, fingerprint: str, say: Callable[[str], None] = lambda text: None
) -> list[Answered]:
    """Outputs of all references, from the cache when they were computed before for the same data (`fingerprint`).

    Raises UserError naming the first task whose reference fails.
    """
    key = digest_of([str(_VERSION), name, fingerprint, ".".join(map(str, sys.version_info[:2]))])
    path = cache / f"expected-{name.replace('+', '-plus')}-{key[:16]}.bin.gz"
    answers = _kept(path, key, len(asked))
    if answers is None:
        say(f"{name}: running the {len(asked)} reference solutions once; their outputs are kept in {cache}")
        answers = _computed(asked)
        for question, found in zip(asked, answers, strict=True):
            if "error" in found:
                raise UserError(
                    f"the reference solution of {question.name} fails on its own inputs ({found['error']}); "
                    "the file is damaged or of another version: fetch it again"
                )
        content = gzip.compress(dumps({"key": key, "answers": answers}), compresslevel=1, mtime=0)
        try:
            atomic_write_bytes(path, content)
        except OSError as error:
            raise UserError(f"{cache} cannot be written ({error.strerror}); set evaluation.cache_dir") from None
    return [Answered(found["outputs"], found["seconds"]) for found in answers]


def _kept(path: Path, key: str, count: int) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    try:
        content = loads(gzip.decompress(path.read_bytes()))
        whole = content["key"] == key and len(content["answers"]) == count
    except (ValueError, OSError, EOFError, zlib.error, pickle.UnpicklingError, KeyError, TypeError):
        # A cache: what cannot be read is computed again.
        return None
    return content["answers"] if whole else None


def _computed(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    # Dealt out, not cut into runs: slow references stand together in the files.
    chunks = max(1, -(-len(asked) // _CHUNK))
    numbers = [range(start, len(asked), chunks) for start in range(chunks)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        parts = list(pool.map(lambda chosen: _one_process([asked[n] for n in chosen]), numbers))
    found = {
        n: answer for chosen, part in zip(numbers, parts, strict=True) for n, answer in zip(chosen, part, strict=True)
    }
    return [found[n] for n in range(len(asked))]


def _one_process(asked: Sequence[Asked]) -> list[dict[str, Any]]:
    framed = bytearray()
    for question in asked:
        content = dumps(vars(question))
        framed += len(content).to_bytes(8, "big") + content
    guest = Path(__file__).with_name("reference_guest.py")
    with tempfile.TemporaryDirectory(prefix="ra3-reference-") as folder:
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(guest)],
                input=bytes(framed), capture_output=True, cwd=folder, env={}, timeout=_WALL_S, preexec_fn=_limit,
                check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise UserError(
                f"the reference solutions of {asked[0].name} and {len(asked) - 1} others did not end in {_WALL_S} s; "
                "try again when the machine has less to do"
            ) from None
    answers, place = [], 0
    while place < len(done.stdout):
        size = int.from_bytes(done.stdout[place : place + 8], "big")
        answers.append(loads(done.stdout[place + 8 : place + 8 + size]))
        place += 8 + size
    if len(answers) < len(asked):
        last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        answers.append({"error": f"it ended the process: {last}"[:300]})
        answers += [{"error": "an earlier reference ended the process"}] * (len(asked) - len(answers))
    return answers


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
