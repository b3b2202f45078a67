"""The report page, from the files of a run folder."""

import html.parser
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import write_done
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.sections import ReportConfig
from ra3_megatron.report.charts import Line, line_chart, smooth, thin
from ra3_megatron.report.environment import environment, redact, write_environment
from ra3_megatron.report.metrics import MetricsLog
from ra3_megatron.report.run_report import build_report, stage_folders


class Texts(html.parser.HTMLParser):
    """Checks nesting and gathers texts, addresses and ids of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def parse(path: Path) -> Texts:
    page = Texts()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run of two stages."""
    run = tmp_path / "my run <1>"
    run.mkdir()
    config_from_dict({"data": {"tokenizer": {"kind": "train_bpe"}}, "train": {"steps": 60}}).save(run / "config.yaml")
    prepare, train = run / "01-prepare", run / "02-midtrain"
    (prepare / "data").mkdir(parents=True)
    dropped = {"syntax": 12, "near_duplicate": {"count": 130, "meaning": "resembles an earlier document"}}
    counts = {"read": 1200, "dropped": dropped, "sha256": "abc"}
    (prepare / "data" / "report.json").write_text(json.dumps(counts))
    write_done(prepare)
    with MetricsLog(train, ReportConfig(tensorboard=False), is_writer=True) as log:
        log.log(0, validation_loss=5.5)
        for step in range(1, 61):
            log.log(step, loss=5 - step / 20, lr=1e-3, grad_norm=1.0, tokens=step * 512, tokens_per_second=5000.0)
        log.log(60, validation_loss=2.25)
    for name in ("step_9", "step_10"):
        (train / "checkpoints" / name).mkdir(parents=True)
        (train / "checkpoints" / name / "weights").write_bytes(bytes(2048))
        write_done(train / "checkpoints" / name)
    (train / "checkpoints" / ".step_11.tmp").mkdir()
    write_environment(train / "logs" / "1")
    write_done(train, json.dumps({"checkpoint": "checkpoints/step_10", "counters": {"step": 60}}))
    return run


def test_page_says_what_the_files_say(run_dir: Path) -> None:
    """A figure on the page was not the one in the file."""
    path = build_report(run_dir)
    assert path == run_dir / "report.html"
    page = parse(path)
    for text in (
        "my run <1>",
        "5.5000 → 2.2500",
        "30,720",
        "dropped / near duplicate: resembles an earlier document",
        "130",
        "1,200",
        "2 KiB",
    ):
        assert text in page.texts, text
    assert "counters / step" in page.texts
    assert "abc" not in page.texts
    # Checkpoint 9 comes before 10, and a half-written one is not listed.
    names = [t for t in page.texts if "step_" in t]
    assert names.index("step_9") < names.index("step_10")
    assert not any(".tmp" in t for t in names)
    assert page.texts.count("Learning rate") == 1
    assert len(path.read_bytes()) < 300_000


def test_page_is_readable_offline_and_ids_are_unique(run_dir: Path) -> None:
    """The page pulled scripts from the net; two charts shared clip ids, so one was drawn with the other's frame."""
    text = build_report(run_dir).read_text(encoding="utf-8")
    page = parse(run_dir / "report.html")
    assert all(a.startswith("#") for a in page.addresses)
    assert "<script" not in text
    assert not re.search(r"@import|url\((?!#)", text)
    referenced = {i for i in page.ids if f"#{i}" in text}
    assert all(page.ids.count(i) == 1 for i in referenced)


def test_unfinished_run_has_a_page_too(run_dir: Path) -> None:
    """A report was only to be had when nothing had gone wrong."""
    (run_dir / "02-midtrain" / "DONE").unlink()
    (run_dir / "03-export").mkdir()
    with open(run_dir / "02-midtrain" / "metrics.jsonl", "ab") as f:
        f.write(b'{"step": 61, "lo')
    page = parse(build_report(run_dir))
    assert page.texts.count("not finished") == 3


def test_stages_are_in_order_of_their_number(tmp_path: Path) -> None:
    """Stage 10 came before stage 9."""
    for name in ("10-rlvr", "9-sft", "01-prepare", "notes", "checkpoints"):
        (tmp_path / name).mkdir()
    assert [p.name for p in stage_folders(tmp_path)] == ["01-prepare", "9-sft", "10-rlvr"]


def test_no_run_is_a_user_error(tmp_path: Path) -> None:
    """A traceback for a mistyped folder."""
    with pytest.raises(UserError, match=r"config\.yaml does not exist"):
        build_report(tmp_path)


def test_secrets_do_not_reach_the_page(run_dir: Path) -> None:
    """A token in a tracking address or in the environment was published with the report."""
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["report"]["mlflow"] = {"tracking_uri": "https://ann:hunter2@tracking.example", "experiment": "x"}
    config["data"]["hub"] = {"api_key": "hunter3", "auth_token": "hunter4", "tokens": 17}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    text = build_report(run_dir).read_text(encoding="utf-8")
    assert "hunter" not in text
    assert "tokens: 17" in text
    assert "tracking.example" in text


def test_environment_reads_listed_variables_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole environment of the shell was saved, tokens included."""
    monkeypatch.setenv("HF_TOKEN", "hunter5")
    monkeypatch.setenv("WANDB_API_KEY", "hunter6")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    monkeypatch.setattr(sys, "argv", ["ra3", "midtrain", "c.yaml", "hub.api_key=hunter7"])
    found = environment()
    assert "hunter" not in json.dumps(found)
    assert found["variables"]["NCCL_DEBUG"] == "INFO"
    assert found["packages"]["torch"].startswith("2.")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"password": "x", "tokens": 3, "max_tokens": 4}, {"password": "[hidden]", "tokens": 3, "max_tokens": 4}),
        ({"api_key": None}, {"api_key": None}),
        (["https://u:p@h/x"], ["https://[hidden]@h/x"]),
        ({"start_token": "bos"}, {"start_token": "bos"}),
    ],
)
def test_redact(value: object, expected: object) -> None:
    """Token counts and token names were hidden as if they were secrets."""
    assert redact(value) == expected


def test_thinning_keeps_spikes_and_ends() -> None:
    """Every-nth thinning lost the one step whose loss exploded."""
    points = [(float(i), 1.0 + 0.001 * (i % 7)) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    kept = thin(points, 500)
    assert len(kept) <= 500
    assert 4321 in kept
    assert kept[-1] == len(points) - 1
    assert kept == sorted(set(kept))


def test_smoothing_has_no_bias_at_the_start() -> None:
    """A moving average that starts from zero showed a loss rising from nothing; one NaN blanked the rest."""
    points = [(i, math.nan if i == 5 else 3.0) for i in range(20)]
    assert [y for _, y in smooth(points, 10)] == pytest.approx([3.0] * 19)


def test_chart_is_a_themed_element_of_its_own() -> None:
    """Hard colours were unreadable on a dark page; a single point drew nothing."""
    svg = line_chart([Line("a < b", [(1, 2.0)]), Line("c", [(1, math.nan), (2, 3.0)])], "Loss & more", "nats")
    element = ElementTree.fromstring(svg)
    assert element.attrib["aria-label"] == "Loss & more"
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "var(--line-1)" in svg
    assert "<use" in svg
    assert svg == line_chart([Line("a < b", [(1, 2.0)]), Line("c", [(1, math.nan), (2, 3.0)])], "Loss & more", "nats")


def test_report_needs_no_torch(run_dir: Path) -> None:
    """Looking at a run on a login node imported torch for seconds."""
    code = (
        "import sys; from ra3_megatron.report.run_report import build_report; build_report(sys.argv[1]); "
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"
