"""A profile as people read it: tables on the terminal, and a page with pictures, out of `profile.json`."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.arms import ArmsTable
from ra3_megatron.report.charts import HALF, Bar, Line, bar_chart, line_chart
from ra3_megatron.report.figures import Row, format_bytes, number, scaled
from ra3_megatron.report.op_kinds import KINDS
from ra3_megatron.report.page import write_page

PROFILE_FILE = "profile.json"
PROFILE_PAGE = "profile.html"

Profile = Mapping[str, Any]
"""Content of `profile.json`; docs/profile.md names the fields."""


def build_profile_page(folder: Path) -> Path:
    """Write `profile.html` beside the `profile.json` in `folder` and return its path. Raises UserError without one."""
    path = folder / PROFILE_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no profile ({error}); make one with ra3 profile") from None
    head, rows = phase_rows(found)
    operations = operation_rows(found)
    return write_page(
        folder / PROFILE_PAGE,
        "profile.html.j2",
        title=f"{found['stage']}: {_seconds(found['step_seconds'])} a step",
        cards=cards(found),
        charts=[Markup(chart) for chart in _charts(found)],
        phases=ArmsTable(head, rows),
        operations=ArmsTable(*operations) if operations else None,
        traced=traced_note(found),
        top=ArmsTable(("operation", "seconds", "calls"), _top(found)),
        notes=notes(found),
        facts=_facts(found),
    )


def print_profile(found: Profile, console: Console | None = None) -> None:
    """The same tables on the terminal."""
    console = console or Console(soft_wrap=True, highlight=False)
    console.print(f"\n[bold]{found['stage']}[/]: {_seconds(found['step_seconds'])} a step "
                  f"({found['steps']} steps on {found['device']})")  # fmt: skip
    console.print(_table("", *phase_rows(found)))
    for note in notes(found):
        console.print(note, markup=False)
    operations = operation_rows(found)
    if operations:
        console.print(_table("what the phases are made of", *operations))
        console.print(traced_note(found), markup=False)
    for label, value in cards(found):
        console.print(f"{label}: {value}", markup=False)


def _table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title or None, title_justify="left", show_edge=False)
    for place, name in enumerate(head):
        table.add_column(name, justify="left" if place == 0 or name == "kind" else "right")
    for row in rows:
        table.add_row(*row)
    return table


# ---------------------------------------------------------------------------------------------------- tables


def phase_rows(found: Profile) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Head and rows: seconds of every phase, their share of the step, the floor, and how far from it they are."""
    floors = {f["phase"]: f for f in found["floors"]}
    rows: list[tuple[str, ...]] = []
    for phase in found["phases"]:
        path = f"{phase['within']}/{phase['name']}" if phase["within"] else phase["name"]
        floor = floors.pop(path, None)
        indent = "\N{NO-BREAK SPACE}" * 3 * (path.count("/"))
        rows.append(
            (
                indent + phase["name"],
                _seconds(phase["seconds"]),
                f"{phase['seconds'] / found['step_seconds']:.1%}",
                _seconds(floor["seconds"]) if floor else "–",
                f"{phase['seconds'] / floor['seconds']:.2f}×" if floor and floor["seconds"] else "–",
                format_bytes(phase["peak"]) if phase["peak"] else "–",
            )
        )
    # Floors of what overlaps the phases have no row of their own to stand in.
    rows += [(name, "–", "–", _seconds(floor["seconds"]), "–", "–") for name, floor in floors.items()]
    return ("phase", "per step", "share", "floor", "× floor", "most memory"), rows


def operation_rows(found: Profile) -> tuple[tuple[str, ...], list[tuple[str, ...]]] | None:
    """Head and rows: seconds per traced step by phase and kind, what takes under a thousandth left out; none where
    nothing was traced."""
    trace = found.get("trace")
    if not trace:
        return None
    total = sum(part["seconds"] for part in trace["parts"]) or 1.0
    rows: list[tuple[str, ...]] = [
        (part["phase"], part["kind"], _seconds(part["seconds"] / trace["steps"]), f"{part['seconds'] / total:.1%}")
        for part in trace["parts"]
        if part["seconds"] >= 1e-3 * total
    ]
    return ("phase", "kind", "per step", "share"), rows


def _top(found: Profile) -> list[tuple[str, ...]]:
    trace = found.get("trace") or {"top": []}
    return [(name[:120], _seconds(seconds), f"{calls:,}") for name, seconds, calls in trace["top"]]


def traced_note(found: Profile) -> str:
    """How much tracing slowed the steps, and how much of the communication nothing covers."""
    trace = found.get("trace")
    if not trace:
        return ""
    text = (
        f"Of {trace['steps']} traced step(s), which took {_seconds(trace['step_seconds'])} each: the tracing itself "
        "makes them slower, mostly where operations are small."
    )
    if trace["communication"]:
        exposed = trace["exposed"] / trace["communication"]
        text += (
            f" Communication was under way for {_seconds(trace['communication'] / trace['steps'])} a step; "
            f"{exposed:.0%} of it is exposed: nothing was computed meanwhile."
        )
    return text


def notes(found: Profile) -> list[str]:
    """What the table of phases does not say."""
    said = [f"{f['phase']}: {f['what']}." for f in found["floors"]]
    if found.get("save"):
        stall, interval = found["save"]["stall_seconds"], found["checkpoint_interval"]
        said.append(
            f"A checkpoint keeps the training for {_seconds(stall)} and is on disk after "
            f"{_seconds(found['save']['seconds'])}; one every {interval} steps is {_seconds(stall / interval)} a step."
        )
    times = found["ranks"]["step_seconds"]
    if len(times) > 1:
        said.append(f"Over {len(times)} ranks a step took {_seconds(min(times))} to {_seconds(max(times))}.")
        peaks = found["ranks"]["peak_memory"]
        said.append(f"Most memory of a rank: {format_bytes(min(peaks))} to {format_bytes(max(peaks))}.")
    if found["layout"]["pipeline"] > 1:
        said.append("In a pipeline, waiting for the neighbour's tensors counts as communication.")
    return said


def cards(found: Profile) -> list[Row]:
    """The figures a reader asks for first."""
    used = found["utilisation"]
    rows = [
        ("a step", _seconds(found["step_seconds"])),
        ("model FLOPs per step", scaled(found["flops_per_step"], "FLOP")),
        ("per rank", scaled(used["flops_per_second_and_rank"], "FLOP/s")),
        ("MFU of the measured product", f"{used['of_measured']:.1%}"),
    ]
    if "of_bf16_peak" in used:
        rows.append((f"MFU of {found['chip']['name']} in BF16", f"{used['of_bf16_peak']:.1%}"))
    if found["utilisation_of_update"]:
        update = found["utilisation_of_update"]
        rows.append(("MFU of the update alone", f"{update['of_measured']:.1%}"))
    rate = found["work_per_step"]["trained"] / found["step_seconds"]
    rows.append(("tokens trained on", f"{scaled(rate, '')}/s"))
    rows.append(("most memory", format_bytes(found["peak_memory"])))
    return rows


def _facts(found: Profile) -> list[Row]:
    speed, work, layout = found["speed"], found["work_per_step"], found["layout"]
    rows = [
        ("device", found["device"]),
        ("precision", found["model"]["precision"]),
        ("layers", found["model"]["layers"]),
        ("parameters", f"{found['model']['parameters']:,}"),
        ("weights", found["model"]["weights"]),
        ("processes", f"tensor {layout['tensor']} x pipeline {layout['pipeline']} x context {layout['context']} x data "
                      f"{layout['data']}"),
        ("matrix product", f"{scaled(speed['flops'], 'FLOP/s')} ({speed['matrix']} rows and columns, measured)"),
        ("copy", f"{scaled(speed['bytes'], 'B/s')} read and written (measured)"),
    ]  # fmt: skip
    if found["threads"] is not None:
        rows.append(("CPU threads", str(found["threads"])))
    for name, rate in found["network_bytes_per_second"].items():
        rows.append((f"network, group {name}", f"{scaled(rate, 'B/s')} bus bandwidth (measured)"))
    counted = [name for name in ("trained", "scored", "rolled_out", "forward_passes", "updates") if work[name]]
    return [*rows, *((f"{name.replace('_', ' ')} per step", number(work[name], ",.6g")) for name in counted)]


# ---------------------------------------------------------------------------------------------------- pictures


def _charts(found: Profile) -> list[str]:
    phases = {p["name"]: p["seconds"] for p in found["phases"] if not p["within"]}
    rows = [Bar("step", phases)]
    charts = [bar_chart(rows, "A step by phase", "seconds", salt="phases")]
    operations = found.get("trace")
    if operations:
        kinds: dict[str, dict[str, float]] = {}
        for part in operations["parts"]:
            own = kinds.setdefault(part["phase"], dict.fromkeys(KINDS, 0.0))
            own[part["kind"]] += part["seconds"] / operations["steps"]
        present = [k for k in KINDS if any(own[k] for own in kinds.values())]
        whole = sum(sum(own.values()) for own in kinds.values())
        seen = [phase for phase, own in kinds.items() if sum(own.values()) > 1e-3 * whole]
        order = sorted(seen, key=lambda phase: -sum(kinds[phase].values()))
        bars = [Bar(phase, {k: kinds[phase][k] for k in present}) for phase in order]
        charts.append(bar_chart(bars, "Traced steps by kind of operation", "seconds per step", salt="kinds"))
    if found["memory"]:
        charts.append(_memory_chart(found["memory"]))
    return charts


def _memory_chart(moments: Sequence[Mapping[str, Any]]) -> str:
    """Memory at the ends of phases and the most inside of them, over time."""
    gib = 1 / 2**30
    lines = [
        Line("most inside the phase", [(m["seconds"], m["peak"] * gib) for m in moments]),
        Line("held at its end", [(m["seconds"], m["held"] * gib) for m in moments], "marked"),
    ]
    size = (HALF[0] * 2, HALF[1])
    return line_chart(
        lines, "Memory", "GiB", size, "memory", from_zero=True, x_label="seconds from the first timed step"
    )


def _seconds(value: float) -> str:
    """Such as `1.23 s` or `4.56 ms`."""
    if value >= 0.9995:
        return f"{value:.3g} s" if value < 100 else f"{value:.0f} s"
    return f"{value * 1e3:.3g} ms"
