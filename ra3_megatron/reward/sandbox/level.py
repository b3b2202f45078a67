"""Levels of isolation, from what a sandbox has measured of itself."""

from dataclasses import dataclass
from typing import Any

from ra3_megatron.config.judge import LEVELS

MEANING = {
    "limits": "resource limits only: programs reach the network, files and other processes of their user",
    "syscalls": "a system call filter: no network, no other processes or programs; files of their user can be read",
    "files": "the same, and no files but Python's library and a work folder",
    "namespaces": "the same, in process, network, mount and IPC namespaces of their own",
}
"""What each level keeps in; the names are `config.judge.LEVELS`."""


@dataclass(frozen=True)
class Level:
    """Isolation that was reached, with an account for people."""

    name: str
    """One of `config.judge.LEVELS`."""
    made_of: str
    """What it is made of."""
    missing: tuple[str, ...]
    """What is not there, and why."""

    def at_least(self, minimum: str) -> bool:
        """Whether this level is `minimum` or stronger."""
        return LEVELS.index(self.name) >= LEVELS.index(minimum)

    def account(self) -> str:
        """One line: the level, what it is made of, what is missing."""
        missing = f"; missing: {'; '.join(self.missing)}" if self.missing else ""
        return f"isolation level {self.name} ({MEANING[self.name]}): {self.made_of}{missing}"


def measured(hello: dict[str, Any], missing: tuple[str, ...]) -> Level:
    """The level of a sandbox from its first message: what it has tried counts, not what it has asked for."""
    possible = hello["possible"]
    by_trying = [f"a jailed program can reach: {name}" for name in _HOLES if possible[name]]
    if not possible["library"]:
        by_trying.append("a jailed program cannot read Python's library")
    made_of = ", ".join(
        text
        for text, there in (
            (f"{hello['namespaces']} namespaces", hello["namespaces"] != "none"),
            ("seccomp", hello["seccomp"]),
            (f"Landlock ABI {hello['landlock']}", hello["landlock"] > 0),
            (f"user id {hello['uid']}", True),
        )
        if there
    )
    if not hello["seccomp"] or possible["network"] or possible["processes"] or possible["signals"] or possible["root"]:
        name = "limits"
    elif possible["files"]:
        name = "syscalls"
    elif hello["namespaces"] == "none" or not hello["landlock"]:
        name = "files"
    else:
        name = "namespaces"
    return Level(name, made_of, (*missing, *hello["missing"], *by_trying))


_HOLES = ("network", "processes", "signals", "files", "root")
