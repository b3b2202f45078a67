"""Which nodes of the allocation work: the check before the start, the list of bad ones, spares."""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

BAD_NODES = "bad_nodes.txt"
"""In the run's folder: a node per line, with the reason behind it. Yours to edit."""

CLOCK_S = 30.0
"""Largest difference of a node's clock to the job's own, seconds; certificates and file times go wrong beyond."""


def read_bad(files: Iterable[Path]) -> dict[str, str]:
    """Nodes that are listed, with why; `#` begins a comment."""
    found: dict[str, str] = {}
    for path in files:
        if not path.is_file():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            name, _, why = line.partition("#")
            if name.strip():
                found[name.split()[0]] = why.strip() or "listed"
    return found


def add_bad(path: Path, nodes: dict[str, str]) -> None:
    """Append nodes that are not listed yet."""
    known = read_bad([path])
    lines = [
        f"{node}  # {time.strftime('%Y-%m-%d %H:%M:%S')} {why}\n" for node, why in nodes.items() if node not in known
    ]
    if lines:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.writelines(lines)


@dataclass(frozen=True)
class Choice:
    """Nodes that work and nodes that stay out."""

    chosen: tuple[str, ...]
    """As many as are needed, in the order of the allocation; fewer when there are no more."""
    bad: dict[str, str]
    """Nodes of the allocation that must not be used, with why."""


def choose(allocated: Sequence[str], needed: int, bad: dict[str, str]) -> Choice:
    """The first `needed` nodes that are not bad."""
    good = [node for node in allocated if node not in bad]
    return Choice(tuple(good[:needed]), {node: bad[node] for node in allocated if node in bad})


def check_nodes(nodes: Sequence[str], script: Path, folder: Path, seconds: float) -> dict[str, str]:
    """Run `node_check.sh` on every node at once; returns the nodes that failed or did not answer, with why.

    Its answers lie in `folder/check/NODE`, on the file system all nodes share, which thereby is tried as well.
    """
    answers = folder / "check"
    answers.mkdir(parents=True, exist_ok=True)
    canary = f"{os.getpid()}-{time.time()}"
    (answers / "canary").write_text(canary + "\n", encoding="utf-8")
    count = str(len(nodes))
    arguments = ["srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "--input=none",
                 f"--nodelist={','.join(nodes)}", "--kill-on-bad-exit=0", "--overlap",
                 "bash", str(script), str(answers), canary]  # fmt: skip
    before = time.time()
    with open(folder / "check.log", "wb") as log:
        process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    return {node: why for node in nodes if (why := _verdict(answers / node, before, time.time()))}


def _verdict(answer: Path, before: float, after: float) -> str:
    """Why a node must not be used; empty when its answer is good."""
    try:
        text = answer.read_text(encoding="utf-8")
    except OSError:
        return "did not answer the check"
    failed = re.findall(r"^FAIL (.+)$", text, re.MULTILINE)
    clock = re.search(r"^clock (\d+)", text, re.MULTILINE)
    if clock is not None and not before - CLOCK_S <= float(clock[1]) <= after + CLOCK_S:
        failed.append(f"clock is off by {float(clock[1]) - before:.0f} s")
    if not failed and "\nend" not in text:
        return "the check did not end"
    return "; ".join(failed)
