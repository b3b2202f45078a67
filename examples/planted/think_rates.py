"""Think rate by kind of line, before and after: did the E-step find the lines where a thought pays?

    python examples/planted/think_rates.py RUN_FOLDER

Reads the rationale files that the run has written: those of the E-step's probe, and those of the held-out measurement.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

from make_corpus import FIRST_TELLING_LINE, ROOMS, house, rooms_on_the_way


def rates(path: Path) -> None:
    """Print a line per kind of line for one rationale file."""
    moves = house()
    thinks, sums, nats = defaultdict(list), defaultdict(float), defaultdict(int)
    right = []
    for text in path.read_text(encoding="utf-8").splitlines():
        lines = json.loads(text)["lines"]
        way: list[str] = []
        for line in lines:
            code = line["text"].strip()
            if code.startswith("path"):
                room, *steps = code.split('"')[1].split()
                way = rooms_on_the_way(moves, ROOMS.index(room), steps)
            kind = "useful" if code.startswith(FIRST_TELLING_LINE) else "elsewhere"
            if line["p_think"] is not None:
                thinks[kind].append(line["thought"] is not None)
            if kind == "useful" and line["thought"] is not None:
                right.append(line["thought"].split() == way)
            telling = code.startswith(("wing", "floor"))
            sums[telling] += line["log_prob"]
            nats[telling] += line["tokens"]
    shown = ", ".join(f"{kind} {100 * sum(t) / len(t):5.1f} % of {len(t)}" for kind, t in sorted(thinks.items()))
    correct = f"{100 * sum(right) / len(right):5.1f} %" if right else "none"
    print(f"{path.parent.name}/{path.name}: think rate {shown}; right way at useful lines {correct}")
    print(
        f"    nats per token where it tells {-sums[True] / nats[True]:.3f}, elsewhere {-sums[False] / nats[False]:.3f}"
    )


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    files = sorted(Path(sys.argv[1]).glob("*/**/rationales*.jsonl"))
    if not files:
        raise SystemExit(f"no rationale files under {sys.argv[1]}; run ra3 midtrain examples/planted/config.yaml first")
    for path in files:
        rates(path)


if __name__ == "__main__":
    main()
