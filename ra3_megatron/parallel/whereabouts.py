"""Who is where: every rank writes its phase to the store, so that a timeout can name who is missing."""

import json
import math
import time
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ra3_megatron.config.errors import UserError


class CollectiveTimeout(RuntimeError):
    """A collective did not finish by its deadline, or a peer was lost; the message names the ranks and their phase."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing
        """Global ranks that did not arrive."""


class PeerFailed(RuntimeError):
    """Another rank raised; the message carries its traceback."""

    def __init__(self, message: str, ranks: tuple[int, ...]) -> None:
        super().__init__(message)
        self.ranks = ranks
        """Global ranks that raised."""


class PeerUserError(UserError, PeerFailed):
    """Another rank raised a UserError; the message is its own, without a traceback."""


ALIVE_S = 5.0
"""Least seconds between two signs of life within a phase."""

_USER_ERROR = "UserError\n"
"""Start of a published failure that is a message for the user and no traceback."""


@dataclass(frozen=True)
class Group:
    """A set of ranks that act together.

    `device_group` carries tensors where the model lives (NCCL on GPUs); `control_group` is always gloo and carries
    objects, counters and barriers, so a stuck GPU cannot swallow the message that says so.
    """

    name: str
    """`world`, `tp`, `pp`, `cp`, `dp`, `dp_cp` or `mp`; between the worlds of a split run `both`, `leaders`, `part`."""
    ranks: tuple[int, ...]
    """Numbers among all processes of the run, in group order."""
    rank: int
    """Position of this process in the group."""
    device_group: Any
    """torch process group for tensors on the model's device."""
    control_group: Any
    """torch process group on gloo."""
    whereabouts: "Whereabouts"
    """Where the ranks say what they are doing."""
    timeout_s: float
    """Deadline of a collective that names none, seconds."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def key(self) -> str:
        """Name of this very group among its siblings, e.g. `tp:0,1`."""
        return f"{self.name}:{self.ranks[0]}-{self.ranks[-1]}x{len(self.ranks)}"


@dataclass(frozen=True)
class Sighting:
    """What one rank last said about itself."""

    rank: int
    """Global rank."""
    phase: str
    """Name of the phase or collective it is in, or was in last."""
    inside: bool
    """Whether it is still in that phase."""
    seconds: float
    """Time since it said so, seconds."""
    counts: dict[str, int]
    """Per group key, how many collectives it has entered."""


class Whereabouts:
    """One rank's diary in the store, and a reader of everybody's.

    A write costs one message to the store (about 0.1 ms on a node).
    """

    def __init__(self, store: dist.Store, rank: int) -> None:
        self._store = store
        self._rank = rank
        self._counts: dict[str, int] = {}
        self._phase = "start"
        self._alone = False
        self._inside, self._written = True, 0.0

    def run_alone(self) -> None:
        """Stop writing: with one rank there is nobody to read."""
        self._alone = True

    @property
    def store(self) -> dist.Store:
        """The store behind the diary."""
        return self._store

    def _write(self, inside: bool) -> None:
        if self._alone:
            return
        self._inside, self._written = inside, time.monotonic()
        record = {"phase": self._phase, "inside": inside, "t": time.time(), "counts": self._counts}
        try:
            self._store.set(f"at/{self._rank}", json.dumps(record))
        except dist.DistNetworkError as lost:
            raise self._storeless(f'"{self._phase}"', lost) from lost

    def alive(self) -> None:
        """Say that this rank still works at what it last said, where it said so `ALIVE_S` ago or earlier."""
        if time.monotonic() - self._written > ALIVE_S:
            self._write(self._inside)

    def mark(self, phase: str) -> None:
        """Say that this rank now is at `phase`."""
        self._phase = phase
        self._write(inside=False)

    def enter(self, key: str, phase: str) -> int:
        """Say that this rank enters collective `phase` of group `key`; return how many it has entered there."""
        self._counts[key] = self._counts.get(key, 0) + 1
        self._phase = phase
        self._write(inside=True)
        return self._counts[key]

    def leave(self) -> None:
        """Say that the collective is done."""
        self._write(inside=False)

    def fail(self, traceback_text: str, user_error: UserError | None = None) -> None:
        """Publish this rank's traceback, or its message to the user, so that the others can say why they stop."""
        text = traceback_text if user_error is None else f"{_USER_ERROR}{user_error}"
        try:
            self._store.set(f"failed/{self._rank}", text)
            self._store.set("failed/any", str(self._rank))
        except dist.DistNetworkError:
            return  # whoever served the store is gone; the error itself must not be lost over that

    def failures(self, ranks: tuple[int, ...], store: dist.Store | None = None) -> dict[int, str]:
        """Published tracebacks among `ranks`, by rank."""
        store = store or self._store
        if not store.check(["failed/any"]):
            return {}
        return {r: store.get(f"failed/{r}").decode() for r in ranks if store.check([f"failed/{r}"])}

    def sightings(self, ranks: tuple[int, ...], store: dist.Store | None = None) -> list[Sighting]:
        """What each of `ranks` last said; a rank that never spoke is at "start"."""
        store, now, found = store or self._store, time.time(), []
        for rank in ranks:
            record: dict[str, Any] = {"phase": "start", "inside": True, "t": now, "counts": {}}
            if store.check([f"at/{rank}"]):
                record = json.loads(store.get(f"at/{rank}").decode())
            found.append(Sighting(rank, record["phase"], record["inside"], now - record["t"], record["counts"]))
        return found

    def _storeless(self, where: str, lost: RuntimeError) -> CollectiveTimeout:
        return CollectiveTimeout(
            f"rank {self._rank} at {where} cannot reach the store any more ({lost}); the process that serves it "
            "(rank 0 or the launcher) is gone: look at its log first"
        )

    def silence(self, group: Group, count: int) -> float:
        """Seconds since anything was heard of the ranks of `group` that have not entered its collective `count`;
        infinite where all have, and where the store cannot be reached."""
        try:
            sightings = self.sightings(group.ranks)
        except RuntimeError:
            return math.inf
        absent = [s for s in sightings if s.counts.get(group.key, 0) < count and s.rank != self._rank]
        return min((s.seconds for s in absent), default=math.inf)

    def explain(
        self, group: Group, phase: str, count: int, waited: float, store: dist.Store | None = None
    ) -> Exception:
        """Build the error for a collective of `group` that did not finish: a peer's traceback, or who is missing."""
        try:
            failures = self.failures(group.ranks, store)
            sightings = self.sightings(group.ranks, store)
        except RuntimeError as lost:
            return self._storeless(f'"{phase}", where it waited {waited:.1f} s,', lost)
        failures.pop(self._rank, None)
        if failures:
            return peer_failed(phase, failures)
        absent = [s for s in sightings if s.counts.get(group.key, 0) < count and s.rank != self._rank]
        lines = [
            f'rank {s.rank} did not arrive at "{phase}" within {waited:.1f} s; '
            f'last seen {"inside" if s.inside else "at"} "{s.phase}" {s.seconds:.1f} s ago'
            for s in absent
        ]
        strays = [s for s in sightings if s.counts.get(group.key, 0) == count and s.phase != phase and s.inside]
        lines += [f'rank {s.rank} is in "{s.phase}" where this rank is in "{phase}"' for s in strays]
        if not lines:
            where = ", ".join(f'rank {s.rank} in "{s.phase}" for {s.seconds:.1f} s' for s in sightings)
            lines = [f'all ranks arrived at "{phase}" but it did not finish within {waited:.1f} s: {where}']
        return CollectiveTimeout("\n".join(lines), tuple(s.rank for s in absent))


def peer_failed(phase: str, failures: dict[int, str]) -> PeerFailed:
    """The error every rank raises when `failures` (rank → what it published) happened in `phase`."""
    ranks = tuple(sorted(failures))
    if failures[ranks[0]].startswith(_USER_ERROR):
        return PeerUserError(failures[ranks[0]].removeprefix(_USER_ERROR), ranks)
    text = "\n".join(f"--- rank {rank} ---\n{trace.rstrip()}" for rank, trace in sorted(failures.items()))
    names = ", ".join(str(r) for r in sorted(failures))
    return PeerFailed(f'rank {names} failed in "{phase}":\n{text}', tuple(sorted(failures)))
