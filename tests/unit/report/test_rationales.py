"""Rationales inside a page: nothing is lost without being said, and nothing gets out of its element."""

import json
from pathlib import Path

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.report.rationales import Source, embed_rationales, rationale_sources, read_rationales
from tests.unit.report.sample_run import HOSTILE, rollouts, write_estep, write_lines, write_measure


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """Six snippets of two members, before and after."""
    write_estep(tmp_path / "02-ra3-variational-1", steps=1, snippets=6)
    [source] = rationale_sources(tmp_path / "02-ra3-variational-1")
    return source


def test_every_figure_of_a_rollout_reaches_the_page(source: Source) -> None:
    """Members of the second version were put with the first, and a thought stood one line too late."""
    embedded = embed_rationales([source], 10_000_000)
    [group] = json.loads(embedded.json)
    assert (embedded.shown, embedded.found) == (6, 6)
    assert group["versions"] == ["before", "after"]
    for version, (_, path) in enumerate(source.files):
        for record in read_rationales(path):
            [snippet] = [s for s in group["snippets"] if s["id"] == str(record["snippet"])]
            [rolled] = [r for r in snippet["v"][str(version)] if r["m"] == record["member"]]
            assert snippet["x"] == [line["text"] for line in record["lines"]]
            assert snippet["n"] == [line["tokens"] for line in record["lines"]]
            assert rolled["r"] == pytest.approx(record["reward"], rel=1e-3)
            assert rolled["l"] == pytest.approx([line["log_prob"] for line in record["lines"]], rel=1e-3)
            thoughts = {str(i): line for i, line in enumerate(record["lines"]) if line["thought"] is not None}
            assert rolled["z"].keys() == thoughts.keys()
            for at, (text, tokens, gain, advantage) in rolled["z"].items():
                assert (text, tokens) == (thoughts[at]["thought"], thoughts[at]["thought_tokens"])
                assert gain == pytest.approx(thoughts[at]["gain"], rel=1e-3)
                assert advantage == pytest.approx(thoughts[at]["advantage"], rel=1e-3)


def test_text_cannot_leave_its_element(source: Source) -> None:
    """A thought with `</script>` ended the data, and the rest of it was page."""
    text = embed_rationales([source], 10_000_000).json
    assert HOSTILE in [z[0] for s in json.loads(text)[0]["snippets"] for r in s["v"]["0"] for z in r["z"].values()]
    assert text.isascii()
    assert not set("<>&") & set(text)


def test_the_page_has_a_limit_and_says_what_it_left_out(source: Source, tmp_path: Path) -> None:
    """Five hundred snippets made a page of 60 MB; one large stage took the room of all others."""
    many = tmp_path / "09-measure"
    write_lines(many / "data" / "rationales-base.jsonl", rollouts(40, 0.5, 0.0, 8))
    whole = len(embed_rationales([source], 10_000_000).json)
    large = [*rationale_sources(many), source]
    embedded = embed_rationales(large, 2 * whole + 1000)
    assert len(embedded.json) <= 2 * whole + 1000
    groups = json.loads(embedded.json)
    assert [g["label"] for g in groups] == ["09-measure", "02-ra3-variational-1"]
    assert [g["found"] for g in groups] == [40, 6]
    assert len(groups[1]["snippets"]) == 6, "the small one fits"
    assert 0 < len(groups[0]["snippets"]) < 40
    assert embedded.shown == sum(len(g["snippets"]) for g in groups)
    assert embedded.found == 46


def test_a_snippet_that_is_too_large_leaves_room_for_others(tmp_path: Path) -> None:
    """The first snippet was longer than the limit, and the viewer was empty."""
    records = list(rollouts(3, 0.5, 0.0, 8, members=1))
    records[0]["lines"] *= 200
    write_lines(tmp_path / "09-measure" / "data" / "rationales-base.jsonl", iter(records))
    [source] = rationale_sources(tmp_path / "09-measure")
    assert embed_rationales([source], 60_000).shown == 2


def test_versions_with_other_lines_are_other_snippets(tmp_path: Path) -> None:
    """Figures of one text were drawn beside the lines of another that had its number."""
    stage = tmp_path / "09-measure"
    write_lines(stage / "data" / "rationales-base.jsonl", rollouts(1, 0.5, 0.0, 8, members=1))
    [record] = rollouts(1, 0.5, 0.0, 9, members=1)
    record["lines"] = record["lines"][:3]
    write_lines(stage / "data" / "rationales-ra3.jsonl", iter([record]))
    [source] = rationale_sources(stage)
    [group] = json.loads(embed_rationales([source], 1_000_000).json)
    assert [list(s["v"]) for s in group["snippets"]] == [["0"], ["1"]]


def test_base_comes_first(tmp_path: Path) -> None:
    """The page showed the arms with the base model in the middle, as the alphabet has it."""
    write_measure(tmp_path / "08-measure", snippets=1)
    write_lines(tmp_path / "08-measure" / "data" / "rationales-a.jsonl", rollouts(1, 0.5, 0.0, 8))
    [source] = rationale_sources(tmp_path / "08-measure")
    assert [name for name, _ in source.files] == ["base", "a", "ra3"]


def test_missing_figures_are_none(tmp_path: Path) -> None:
    """A line that was not scored stopped the report."""
    [record] = rollouts(1, 1.0, 0.0, 8, members=1)
    record["reward"] = None
    for line in record["lines"]:
        line["log_prob"] = line["gain"] = line["advantage"] = line["p_think"] = None
    write_lines(tmp_path / "09-measure" / "data" / "rationales-base.jsonl", iter([record]))
    [source] = rationale_sources(tmp_path / "09-measure")
    [rolled] = json.loads(embed_rationales([source], 1_000_000).json)[0]["snippets"][0]["v"]["0"]
    assert rolled["r"] is None
    assert set(rolled["l"]) == set(rolled["p"]) == {None}


@pytest.mark.parametrize("line", ["{", '{"snippet": 1}', "[]", '{"snippet": 1, "name": "", "member": 0, "reward": 0}'])
def test_damage_is_named_with_its_line(tmp_path: Path, line: str) -> None:
    """A traceback from the middle of the report for a file cut by a full disk."""
    path = tmp_path / "rationales-after.jsonl"
    write_lines(path, rollouts(1, 0.5, 0.0, 8, members=1))
    path.write_text(path.read_text(encoding="utf-8") + line + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"rationales-after\.jsonl, line 2 is no rationale record"):
        read_rationales(path)
