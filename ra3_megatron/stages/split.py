"""What the two sides of a split stage say to one another: the side that trains orders, the other one draws.

An order is done while training goes on; what it gave is collected before the next one. Weights travel between orders.
So which weights draw what is decided by those that train alone, and is the same however fast either side is.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ra3_megatron.config.control import Interrupted
from ra3_megatron.config.validate import sides as words
from ra3_megatron.parallel.collectives import broadcast_object, gather_objects, wait_for_all
from ra3_megatron.parallel.split import Side, split
from ra3_megatron.rollout.transfer import WeightTransfer
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.interrupt import pass_on, was_asked


@dataclass(frozen=True)
class Order:
    """What the training side wants next."""

    kind: Literal["weights", "work", "end"]
    """Take the weights in training, do `task`, or leave."""
    version: int = 0
    """Steps that these weights have taken."""
    task: Any = None
    """What to do, for the stage's own generator."""
    reason: tuple[str, int] | None = None
    """Why a run is left before its end, and the exit code (`Interrupted`)."""


@dataclass(frozen=True)
class Delivery:
    """What one generating replica made of an order."""

    result: Any
    seconds: float
    """Time the work took."""
    idle_seconds: float
    """Time it had waited for orders since the work before."""


@dataclass(frozen=True)
class Collected:
    """What an order gave."""

    results: Any
    """As `select` made it of the results of all generating replicas."""
    seconds: float
    """Time of the slowest replica."""
    idle_seconds: float
    """Time the generating replicas had waited before, mean."""


@contextmanager
def sides(context: Context) -> Iterator[tuple[Context, Side]]:
    """The stage's context on this process's side, and the side; both sides come together again at the end."""
    context.say(words(context.layout))
    with split(context.parallel, context.layout.generating, silence(context)) as side:
        yield context.on(side.parallel), side


def silence(context: Context) -> float:
    """Seconds without a sign of life after which one side gives the other one up: training may be in a save."""
    return context.config.parallel.timeout_s + context.config.checkpoint.timeout_s


class Generators:
    """The other side, as those that train see it; every process of the training side makes the same calls."""

    def __init__(self, context: Context, side: Side, chunks: Sequence[torch.nn.Module]) -> None:
        self._side, self._parallel, self._silence = side, side.parallel, silence(context)
        self._version: int | None = None
        # The first meeting: loading a model may take one side longer.
        self._hear("models of both sides")
        self._transfer = WeightTransfer(chunks, side.parallel, side.part)
        self._transfer_seconds, self._idle_seconds = 0.0, 0.0

    def order(self, task: Any, version: int) -> None:
        """Have `task` done with the weights in training, which have taken `version` steps; `collect` what it gives."""
        if version != self._version:
            self._say(Order("weights", version))
            self._transfer_seconds += self._transfer.exchange(version)
            self._version = version
        self._say(Order("work", version, task))

    def collect(self, what: str, select: Callable[[list[Any]], Any]) -> Collected:
        """Wait for what was ordered. `select`: from the results of all generating replicas, in order, to what this
        replica needs of them; only that reaches all its processes."""
        side, start = self._side, time.monotonic()
        self._hear(what)
        self._idle_seconds += time.monotonic() - start
        found = None
        if side.leaders is not None:
            delivered = gather_objects(side.leaders, None, what)[side.training :]
            idle = sum(d.idle_seconds for d in delivered) / len(delivered)
            found = Collected(select([d.result for d in delivered]), max(d.seconds for d in delivered), idle)
        return broadcast_object(self._parallel.group("mp"), found, what)

    def waited(self) -> dict[str, float]:
        """Seconds since the last call that this process waited and that transfers took, by their names in the metrics'
        schema."""
        waited = {"trainer_idle_seconds": self._idle_seconds, "transfer_seconds": self._transfer_seconds}
        self._idle_seconds = self._transfer_seconds = 0.0
        return waited

    def end(self, reason: Interrupted | None = None) -> None:
        """Send them home."""
        self._say(Order("end", reason=None if reason is None else (reason.reason, reason.code)))

    def _say(self, order: Order) -> None:
        self._hear("order")
        broadcast_object(self._side.both, order, "order")

    def _hear(self, what: str) -> None:
        hear(self._side, what, self._silence)


def idle_of(walls: Mapping[str, float]) -> tuple[float | None, float | None]:
    """Seconds that either side waited, out of a step's clock readings; none where every replica does both."""
    return walls.get("trainer_idle_seconds"), walls.get("generator_idle_seconds")


def hear(side: Side, what: str, silence_s: float) -> None:
    """Wait until all processes of both sides are here; a signal that came to one counts for all."""
    if wait_for_all(side.both, int(was_asked()), what, silence_s):
        pass_on()


def serve(
    context: Context, side: Side, chunks: Sequence[torch.nn.Module], perform: Callable[[Any, int], Any], what: str
) -> None:
    """Do what is ordered until the end of the stage: the life of a generating process.

    `chunks` get the weights; `perform(task, version)` makes the result of an order with the weights of `version`, which
    is of this replica and wanted of its first process alone. `what`: what results are called in the errors of a hang.
    Raises Interrupted when the run is left.
    """
    patience, idle = silence(context), 0.0
    hear(side, "models of both sides", patience)
    transfer = WeightTransfer(chunks, side.parallel, side.part)
    while True:
        start = time.monotonic()
        hear(side, "order", patience)
        order: Order = broadcast_object(side.both, None, "order")
        idle += time.monotonic() - start
        if order.kind == "end":
            break
        if order.kind == "weights":
            transfer.exchange(order.version)
            continue
        start = time.monotonic()
        result = perform(order.task, order.version)
        seconds = time.monotonic() - start
        start = time.monotonic()
        hear(side, what, patience)
        if side.leaders is not None:
            gather_objects(side.leaders, Delivery(result, seconds, idle), what)
        idle = time.monotonic() - start
    if order.reason is not None:
        raise Interrupted(*order.reason)
