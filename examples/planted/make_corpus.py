"""A corpus in which a thought pays by construction, at lines that are known.

    python examples/planted/make_corpus.py FOLDER [--snippets 6000] [--seed 0]

Every snippet is a walk through a house of eight rooms. A move takes each room to one other, always the same, so that a
path of six moves is a chain of six look-ups: more than a small model does in one forward pass, but easy room by
room. The lines after a path tell where it led. Part of the snippets carry comments: before the line that tells,
the rooms on the way (what helps) or a remark; before any other line a remark (what does not). A base model
trained on them writes both kinds now and then; mid-training strips them and has to find out which ones pay.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

WINGS = ("east", "west", "north", "south")
FLOORS = ("one", "two")
ROOMS = ("attic", "bath", "cellar", "hall", "kitchen", "loft", "study", "tower")
"""Room number 2 * wing + floor."""
MOVES = ("left", "right", "up")
REMARKS = ("take the key", "the next room", "here is the lamp", "go on")
"""Comments that say nothing about the coming lines."""
THINGS = ("lamp", "key")
FIRST_TELLING_LINE = "wing = "
"""Beginning of the line before which a thought pays."""


@dataclass(frozen=True)
class Comments:
    """How often a snippet with comments has which."""

    snippets: float = 1.0
    """Share of the snippets that have any."""
    way: float = 0.5
    """Chance of the rooms on the way, before a line that tells where a path led."""
    remark: float = 0.2
    """Chance of a remark, before any line (and of the others, before a line that tells)."""


House = dict[str, tuple[int, ...]]


def house() -> House:
    """Move → where it leads from each room; the same house in every corpus."""
    chance = random.Random(20)
    return {move: tuple(chance.sample(range(len(ROOMS)), len(ROOMS))) for move in MOVES}


def rooms_on_the_way(moves: House, room: int, path: list[str]) -> list[str]:
    """Names of the rooms that the moves of `path` lead through, starting from number `room`."""
    names = []
    for move in path:
        room = moves[move][room]
        names.append(ROOMS[room])
    return names


def snippet(chance: random.Random, moves: House, paths: int, steps: int, comments: Comments) -> str:
    """One snippet of `paths` paths of `steps` moves each."""
    commented = chance.random() < comments.snippets
    lines: list[str] = []

    def put(line: str, way: str | None = None) -> None:
        draw = chance.random()
        if commented and way is not None and draw < comments.way:
            lines.append(f"# {way}")
        elif commented and draw > 1 - comments.remark:
            lines.append(f"{line[: len(line) - len(line.lstrip())]}# {chance.choice(REMARKS)}")
        lines.append(line)

    room = chance.randrange(len(ROOMS))
    for _ in range(paths):
        path = [chance.choice(MOVES) for _ in range(steps)]
        put(f'path = "{ROOMS[room]} {" ".join(path)}"')
        way = rooms_on_the_way(moves, room, path)
        room = ROOMS.index(way[-1])
        put(f"wing = {WINGS[room // 2]}", " ".join(way))
        put(f"floor = {FLOORS[room % 2]}")
        put(f"room = {ROOMS[room]}")
        thing = chance.choice(THINGS)
        put(f"next = {thing}")
        put("take(next)")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--snippets", type=int, default=6000)
    parser.add_argument("--paths", type=int, default=2, help="paths of a snippet")
    parser.add_argument("--steps", type=int, default=6, help="moves of a path")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    chance, moves = random.Random(options.seed), house()
    for number in range(options.snippets):
        text = snippet(chance, moves, options.paths, options.steps, Comments())
        (options.folder / f"walk_{number:05}.py").write_text(text)
    print(f"{options.snippets} snippets in {options.folder}")


if __name__ == "__main__":
    main()
