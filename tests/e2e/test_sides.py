"""A world in two sides: groups of either, what they exchange, and how one learns that the other hangs."""

import time
from typing import Any

import torch

from ra3_megatron.config.sections import ParallelConfig
from ra3_megatron.parallel.collectives import all_reduce_sum, barrier, wait_for_all
from ra3_megatron.parallel.groups import Parallel, initialize
from ra3_megatron.parallel.split import Side, split
from ra3_megatron.rollout.transfer import WeightTransfer
from tests.e2e.forked import ForkServer

SILENCE_S = 1.0


def facts(side: Side) -> dict[str, Any]:
    own = side.parallel
    return {
        "trains": side.trains,
        "sizes": [own.sizes.tensor, own.sizes.data, own.sizes.world],
        "ranks": [own.rank, own.data_rank, own.tensor_rank],
        "main": own.is_main,
        "world": own.world.ranks,
        "leaders": side.leaders and side.leaders.ranks,
        "part": side.part and side.part.ranks,
        "sum": all_reduce_sum(own.world, 1, "count"),
    }


def late_but_alive(side: Side) -> float:
    """A generating process comes long after the silence that is allowed, and says on the way that it lives."""
    start = time.monotonic()
    if not side.trains:
        for i in range(3):
            time.sleep(SILENCE_S / 2)
            side.parallel.mark(f"answer {i}")
    assert wait_for_all(side.both, side.both.rank, "late", SILENCE_S) == side.both.size - 1
    return time.monotonic() - start


def there_and_back(generating: int, **sizes: int) -> list[Any]:
    out: list[Any] = []
    with initialize(ParallelConfig(timeout_s=60, **sizes)) as whole:
        for attempt in range(2):
            with split(whole, generating, SILENCE_S + 60) as side:
                out.append(facts(side))
                if attempt == 0:
                    out[0]["waited"] = late_but_alive(side)
            out.append(all_reduce_sum(whole.world, 1, "count"))
    return out


def test_each_side_is_a_world_of_its_own(server: ForkServer) -> None:
    """Groups of the wrong processes; a world that could not be put together again; the late taken for missing."""
    ranks = server.call(f"{__name__}:there_and_back", {"generating": 1}, world=3)
    for rank, (first, between, second, after) in enumerate(ranks):
        assert between == after == 3
        assert first.pop("waited") > SILENCE_S
        assert first == second
        trains = rank < 2
        assert first["trains"] is trains
        assert first["main"] is (rank == 0)
        assert first["sum"] == (2 if trains else 1)
        assert first["sizes"] == ([1, 2, 2] if trains else [1, 1, 1])
        assert first["world"] == ([0, 1] if trains else [2])
        assert first["leaders"] == [0, 1, 2]
        assert first["part"] == (None if rank == 1 else [0, 2])


class Torn(WeightTransfer):
    """Loses a bit on the way."""

    def _broadcast(self, part: Any) -> None:
        super()._broadcast(part)
        if part.rank > 0:
            self._chunks[0].weight.data[1, 2] += 1e-3


def model(rank: int, width: int = 5) -> list[torch.nn.Module]:
    torch.manual_seed(rank)
    return [torch.nn.Linear(width, 3).requires_grad_(rank == 0), torch.nn.Linear(3, 3).bfloat16()]


def said(action: Any) -> str:
    try:
        action()
    except RuntimeError as error:
        return str(error)
    return ""


def weights() -> dict[str, Any]:
    out: dict[str, Any] = {}
    with initialize(ParallelConfig(timeout_s=60)) as whole, split(whole, 1, 60) as side:
        chunks = model(whole.rank)
        transfer = WeightTransfer(chunks, side.parallel, side.part)
        before = [p.clone() for c in chunks for p in c.parameters()]
        transfer.exchange(0)
        out["same"] = [
            bool((a == b).all()) for a, b in zip(before, (p for c in chunks for p in c.parameters()), strict=True)
        ]
        out["sums"] = [p.double().sum().item() for c in chunks for p in c.parameters()]
        out["version"] = said(lambda: transfer.exchange(3 + whole.rank))
        barrier(side.both, "next")
        out["shape"] = said(lambda: WeightTransfer(model(0, 5 + whole.rank), side.parallel, side.part))
        torn = Torn(chunks, side.parallel, side.part)
        out["torn"] = said(lambda: torn.exchange(4))
    return out


def test_weights_arrive_or_all_are_told(server: ForkServer) -> None:
    """Generators drew with weights that were sent for another step, to another model, or damaged on the way."""
    sender, receiver = server.call(f"{__name__}:weights", {}, world=2)
    assert all(sender["same"])
    assert not any(receiver["same"])
    assert sender["sums"] == receiver["sums"]
    for got in (sender, receiver):
        assert "version at the transfer of the weights of step" in got["version"]
        assert "processes [1] have another than process 0, which sends: 4 instead of 3" in got["version"]
        assert "parameters of the model: processes [1]" in got["shape"]
        assert "hash after the transfer of the weights of step 4: processes [1]" in got["torn"]


def waits_for_a_sleeper() -> str:
    with initialize(ParallelConfig(timeout_s=60)) as whole:
        return said(lambda: sleeper(whole))


def sleeper(whole: Parallel) -> None:
    with split(whole, 1, 1.0) as side:
        if not side.trains:
            time.sleep(3.0)
        wait_for_all(side.both, 0, "answers of step 7", 1.0)


def test_a_side_that_hangs_is_named(server: ForkServer) -> None:
    """The other side waited until the launcher's patience ended, with no cause."""
    first, _ = server.call(f"{__name__}:waits_for_a_sleeper", {}, world=2)
    assert 'rank 1 did not arrive at "answers of step 7" within' in first
