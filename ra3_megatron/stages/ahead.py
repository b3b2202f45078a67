"""Steps that are drawn for at once, and what a checkpoint notes of those that are drawn ahead."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Block:
    """Steps `first` to `last`, drawn for with the same weights."""

    first: int
    last: int
    version: int
    """Steps taken by the weights that draw."""

    @property
    def steps(self) -> range:
        """All of them."""
        return range(self.first, self.last + 1)


def next_block(first: int, count: int, steps: int, version: int) -> Block | None:
    """The next `count` steps from `first` on, of `steps` in all; none after the last."""
    last = min(first + count - 1, steps)
    return Block(first, last, version) if first <= last else None


def note(block: Block | None, settings: str) -> dict[str, Any] | None:
    """What a checkpoint keeps of a block under way; `settings` names what its rollouts depend on."""
    return None if block is None else {**vars(block), "settings": settings}


def noted(facts: dict[str, Any] | None, settings: str, steps: int, say: Callable[[str], None]) -> Block | None:
    """The block that a checkpoint noted: it must be read back, with the weights it was drawn with.

    None without one, and where the settings are others by now: then the weights of the checkpoint draw anew.
    """
    if facts is None:
        return None
    block = Block(facts["first"], facts["last"], facts["version"])
    if facts["settings"] == settings and block.last <= steps:
        return block
    say(f"settings were changed: what steps {block.first} to {block.last} learn from is drawn anew, with newer weights")
    return None
