"""Rationale files of a run made small and safe enough to lie inside a page: what the rationale viewer shows."""

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ra3_megatron.config.errors import UserError

STEP_FILES = (("before", "rationales-before.jsonl"), ("after", "rationales-after.jsonl"))
"""Names and places in `data/` of the rollouts an E-step draws before and after its training."""

MEASURED_PREFIX = "rationales-"
"""Rollouts of a `measure` stage lie in `data/rationales-<arm>.jsonl`; the base model is the arm `base`."""

_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True)
class Source:
    """Rationale files of one stage that show the same snippets."""

    label: str
    """Name of the stage's folder."""
    files: tuple[tuple[str, Path], ...]
    """Version, such as `before`, and its file, in the order of the page; at least one."""


@dataclass(frozen=True)
class Rationales:
    """What goes into the page."""

    json: str
    """The data, escaped for a `<script type="application/json">`."""
    shown: int
    """Snippets in the page."""
    found: int
    """Snippets in the files."""


@dataclass
class _Snippet:
    """One snippet of a source and everything rolled out on it."""

    key: str
    name: str
    texts: list[str]
    tokens: list[int]
    rollouts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    """By number of the version."""


def rationale_sources(folder: Path) -> Iterator[Source]:
    """The rationale files of one stage folder, if it has any."""
    files = [(version, folder / "data" / name) for version, name in STEP_FILES]
    if found := [(version, path) for version, path in files if path.is_file()]:
        yield Source(folder.name, tuple(found))
        return
    paths = sorted((folder / "data").glob(f"{MEASURED_PREFIX}*.jsonl"))
    named = [(path.stem.removeprefix(MEASURED_PREFIX), path) for path in paths]
    if named:
        # The base model first: it is what the arms are seen against.
        yield Source(folder.name, tuple(sorted(named, key=lambda item: item[0] != "base")))


def read_rationales(path: Path) -> list[dict[str, Any]]:
    """Records of a rationale file, in order. Raises UserError, with the line, for what is none."""
    records = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            _ = record["snippet"], record["name"], record["member"], record["reward"]
            _ = [(entry["text"], entry["tokens"], entry["log_prob"], entry["thought"]) for entry in record["lines"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}, line {number} is no rationale record ({type(error).__name__}: {error}); remove the file, or "
                "its line, and build the report again"
            ) from None
        records.append(record)
    return records


def embed_rationales(sources: Sequence[Source], limit_bytes: int) -> Rationales:
    """All sources as one JSON text of at most about `limit_bytes`.

    Snippets are taken in the order of the files; every source gets the same room, and what one leaves is the others'.
    Raises UserError for a damaged file.
    """
    gathered = [(source, _gather(source)) for source in sources]
    # Small sources first, so that what they leave is known when the large ones are cut.
    order = sorted(range(len(gathered)), key=lambda i: sum(len(_dump(_plain(s))) for s in gathered[i][1]))
    groups: dict[int, str] = {}
    room, shown = limit_bytes, 0
    for left, i in zip(range(len(order), 0, -1), order, strict=True):
        source, snippets = gathered[i]
        taken = _fitting(snippets, room // left)
        shown += len(taken)
        head = {"label": source.label, "versions": [version for version, _ in source.files], "found": len(snippets)}
        groups[i] = f'{_dump(head)[:-1]},"snippets":[{",".join(taken)}]}}'
        room -= len(groups[i])
    text = f"[{','.join(groups[i] for i in range(len(gathered)))}]"
    return Rationales(text, shown, sum(len(snippets) for _, snippets in gathered))


def _gather(source: Source) -> list[_Snippet]:
    """Snippets of all versions, those of the same id and the same lines put together."""
    found: dict[tuple[str, ...], _Snippet] = {}
    for version, (_, path) in enumerate(source.files):
        for record in read_rationales(path):
            texts = [str(entry["text"]) for entry in record["lines"]]
            snippet = found.setdefault(
                (str(record["snippet"]), *texts),
                _Snippet(
                    str(record["snippet"]), str(record["name"]), texts, [int(e["tokens"]) for e in record["lines"]]
                ),
            )
            snippet.rollouts.setdefault(version, []).append(_rollout(record))
    return list(found.values())


def _rollout(record: dict[str, Any]) -> dict[str, Any]:
    """One rollout without its lines' texts: `l` nats of every line, `p` of a thought there, `z` thoughts by line."""
    lines = record["lines"]
    thoughts = {
        str(i): [
            str(entry["thought"]),
            entry.get("thought_tokens", 0),
            _short(entry.get("gain")),
            _short(entry.get("advantage")),
        ]
        for i, entry in enumerate(lines)
        if entry["thought"] is not None
    }
    return {
        "m": record["member"],
        "r": _short(record["reward"]),
        "l": [_short(entry["log_prob"]) for entry in lines],
        "p": [_short(entry.get("p_think"), 3) for entry in lines],
        "z": thoughts,
    }


def _plain(snippet: _Snippet) -> dict[str, Any]:
    rollouts = {str(version): rolled for version, rolled in snippet.rollouts.items()}
    return {"id": snippet.key, "name": snippet.name, "x": snippet.texts, "n": snippet.tokens, "v": rollouts}


def _fitting(snippets: Sequence[_Snippet], room: int) -> list[str]:
    """The first snippets as JSON, as many as `room` bytes hold; a snippet too large for itself is passed over."""
    taken = []
    for snippet in snippets:
        text = _dump(_plain(snippet))
        if len(text) <= room:
            taken.append(text)
            room -= len(text) + 1
    return taken


def _dump(content: Any) -> str:
    """JSON in ASCII that cannot end, or open, an element of the page it stands in."""
    return json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":")).translate(_ESCAPES)


def _short(value: float | None, figures: int = 4) -> float | None:
    """`value` to a few figures; None for what is no number."""
    if value is None or not math.isfinite(value):
        return None
    return float(f"{value:.{figures}g}")
