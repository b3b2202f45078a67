"""Rollouts of one text share the computation of it for as long as they are the same."""

from dataclasses import replace
from typing import Any, Protocol

from ra3_megatron.rollout.engine import Answer, Extend


class Member(Protocol):
    """A rollout on its way."""

    place: tuple[int, int]
    """(number of its text, number within its group)"""
    row: int
    """The engine's row it is in."""
    shared: bool
    """Whether others are in that row; it then leaves for a copy of it when it begins a thought."""

    @property
    def done(self) -> bool:
        """Whether the whole text is there."""

    def extend(self) -> Extend:
        """What the row needs next; members of one row differ in the random numbers of their questions alone."""

    def absorb(self, extend: Extend, answer: Answer) -> None:
        """Go on with the answer to what `extend` asked."""

    def result(self) -> Any:
        """The finished rollout."""


class Party:
    """Rollouts of one text that have thought nothing yet and so share a row, or one rollout with a row of its own.

    What each asks differs by its random numbers alone. Who begins a thought leaves, with a copy of the row up to there.
    A party takes at most as many rows, with those who leave it, as it had members.
    """

    def __init__(self, members: list[Member]) -> None:
        self.members = members
        self._asked: list[Extend] = []

    def join(self, member: Member) -> None:
        """Take in a rollout that was given this party's row."""
        self.members[0].shared = True
        self.members.append(member)

    @property
    def row(self) -> int:
        """The members' row."""
        return self.members[0].row

    def extend(self) -> Extend:
        """What the row needs next: the questions of all members, one member's after the other's."""
        self._asked = [m.extend() for m in self.members]
        first = self._asked[0]
        return replace(first, queries=[q for asked in self._asked for q in asked.queries])

    def absorb(self, answer: Answer) -> list["Party"]:
        """Go on with the answer; what has become of the party."""
        count, staying = len(self._asked[0].queries), 0
        for i, (member, asked) in enumerate(zip(self.members, self._asked, strict=True)):
            if i == len(self.members) - 1 and not staying:
                member.shared = False  # the others have left: it keeps the row
            own = slice(i * count, (i + 1) * count)
            member.absorb(
                asked, Answer(answer.log_probs, answer.log_masses[own], answer.drawn[own], answer.drawn_log_probs[own])
            )
            staying += member.shared
        together = [m for m in self.members if m.shared]
        if len(together) == 1:
            together[0].shared = False
        return [Party([m]) for m in self.members if m not in together] + ([Party(together)] if together else [])
