"""The report in a real browser: what a person sees and can do, and that nothing is asked of the network."""

import html
import json
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ra3_megatron.report.run_report import build_report
from tests.unit.report.sample_run import HOSTILE, write_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((found for name in BROWSERS if (found := shutil.which(name))), None)

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"no browser ({', '.join(BROWSERS)}) on this machine: the report is not looked at"
)

QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
    "--disable-default-apps", "--hide-scrollbars", "--window-size=1400,1000",
    "--host-resolver-rules=MAP * ~NOTFOUND",  # not even what the browser does of its own accord reaches the network
)  # fmt: skip

PROBE = """
<script>
(() => {
  const part = (name) => document.getElementById("rv-" + name);
  const texts = (selector) => [...document.querySelectorAll(selector)].map((e) => e.textContent);
  const look = () => ({
    hash: location.hash,
    items: texts(".rv-item b"),
    chosen: texts(".rv-item[aria-selected=true] b"),
    heads: texts(".rv-head b"),
    rows: document.querySelectorAll(".rv-row:not(.rv-head)").length,
    gaps: texts(".rv-gap"),
    thoughts: texts(".rv-thought code"),
    marks: texts("#rv-code mark"),
    legend: texts(".rv-scale"),
    tints: [...document.querySelectorAll(".rv-line.tint")].map((line) => [
      line.querySelector("em").textContent, getComputedStyle(line).backgroundColor]),
    plain: [...document.querySelectorAll(".rv-line:not(.tint)")].map((line) => getComputedStyle(line).backgroundColor),
    count: part("count").textContent,
  });
  const set = (name, value, event) => {
    const element = part(name);
    if (element.type === "checkbox") element.checked = value; else element.value = value;
    element.dispatchEvent(new Event(event, { bubbles: true }));
  };
  const press = (key) => part("list").dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
  const seen = { title: document.title, start: look() };
  press("ArrowDown"); press("ArrowDown"); press("ArrowUp"); seen.down = look();
  document.querySelectorAll(".rv-item")[2].click(); seen.clicked = look();
  press("ArrowUp"); press("ArrowUp"); press("ArrowUp"); seen.up = look();
  set("thoughts", true, "change"); seen.only = look(); set("thoughts", false, "change");
  set("search", "<\\/SCRIPT>", "input"); seen.hostile = look();
  set("search", "no such words anywhere", "input"); seen.nothing = look();
  set("search", "", "input"); seen.cleared = look();
  set("mode", "logprob", "change"); seen.logprob = look();
  set("mode", "change", "change"); seen.change = look();
  set("right", "-1", "change"); seen.alone = look();
  set("group", "1", "change"); seen.measured = look();
  seen.loaded = performance.getEntriesByType("resource").map((entry) => entry.name);
  seen.images = document.images.length;
  const note = document.createElement("pre");
  note.id = "probe";
  note.textContent = JSON.stringify(seen);
  document.body.append(note);
})();
</script>
"""


@dataclass(frozen=True)
class Visit:
    """What a page was like."""

    dom: str
    """The document when its scripts had run."""
    console: list[str]
    """What it wrote to the console, errors and refusals included."""
    asked: list[str]
    """Addresses the page asked the network for."""


def visit(page: Path, fragment: str = "") -> Visit:
    """Open a page in a browser of its own."""
    own = page.parent / "browser"
    log = page.parent / "net.json"
    address = page.as_uri() + fragment
    command = [
        str(BROWSER), *QUIET, f"--user-data-dir={own}", f"--log-net-log={log}", "--enable-logging=stderr", "--v=0",
        "--virtual-time-budget=4000", "--dump-dom", address,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(own)
    console = re.findall(r"CONSOLE:\d+\] (.*)", done.stderr)
    events = log.read_text(encoding="utf-8").splitlines()
    # What the browser asks for itself has "not an origin" for its initiator.
    own_doing = [e for e in events if '"initiator":' in e and '"initiator":"not an origin"' not in e]
    asked = [url for event in own_doing for url in re.findall(r'"url":"([^"]+)"', event)]
    return Visit(done.stdout, console, asked)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a sample run."""
    return build_report(write_run(tmp_path_factory.mktemp("browser") / "run", steps=12, snippets=6))


@pytest.fixture(scope="module")
def probed(page: Path) -> Visit:
    """The report with a script at its end that uses the viewer and writes down what it sees."""
    copy = page.with_name("probed.html")
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", PROBE + "</body>"), encoding="utf-8")
    return visit(copy)


@pytest.fixture(scope="module")
def seen(probed: Visit) -> dict[str, Any]:
    found = re.search(r'<pre id="probe">(.*?)</pre>', probed.dom, re.DOTALL)
    assert found, probed.console
    return json.loads(html.unescape(found[1]))


def test_page_is_quiet_and_asks_for_nothing(probed: Visit, seen: dict[str, Any]) -> None:
    """A thought with `</script><img src=...>` became page, and the page fetched a picture."""
    assert probed.console == []
    assert probed.asked == []
    assert seen["loaded"] == []
    assert seen["images"] == 0
    assert seen["title"] == "run – RA3 run report"


def test_a_page_that_asks_is_found_out(page: Path) -> None:
    """The check above could not fail: requests were looked for in the wrong place."""
    text = page.read_text(encoding="utf-8")
    asking = page.with_name("asking.html")
    picture = "<img src=https://outside.example/x.png></body>"
    asking.write_text(text.replace("</body>", picture), encoding="utf-8")
    refused = visit(asking)
    assert len(refused.console) == 1
    assert "Content Security Policy" in refused.console[0]
    assert refused.asked == []
    asking.write_text(re.sub("<meta http-equiv[^>]*>", "", text).replace("</body>", picture), encoding="utf-8")
    assert set(visit(asking).asked) == {"https://outside.example/x.png"}


def test_before_and_after_are_side_by_side(seen: dict[str, Any]) -> None:
    """The two sides showed the same rollout."""
    start = seen["start"]
    assert start["heads"] == ["before", "after"]
    assert len(start["items"]) == 6
    assert start["count"] == "6 of 6 snippets"
    assert start["chosen"] == [start["items"][0]]
    assert HOSTILE in [t.strip().removeprefix("# ") for t in start["thoughts"]]
    assert seen["alone"]["heads"] == ["before"]
    assert len(seen["alone"]["thoughts"]) < len(start["thoughts"])
    assert seen["measured"]["heads"] == ["base", "ra3"]


def test_colours_follow_the_figures(seen: dict[str, Any]) -> None:
    """All lines had one colour, whatever their gain; lines without a thought had one as well."""
    blue, orange = [], []
    for text, colour in seen["start"]["tints"]:
        red, _, last = (int(v) for v in re.findall(r"\d+", colour)[:3])
        alpha = float(re.findall(r"[\d.]+", colour)[3]) if colour.startswith("rgba") else 1.0
        (blue if last > red else orange).append((float(text.replace("−", "-")), alpha))
    assert blue
    assert orange
    assert all(gain >= 0 for gain, _ in blue)
    assert all(gain <= 0 for gain, _ in orange)
    strongest = [alpha for _, alpha in sorted(blue)]
    assert strongest == sorted(strongest)
    assert strongest[0] < strongest[-1]
    assert set(seen["start"]["plain"]) == {"rgba(0, 0, 0, 0)"}
    assert "gain of its thought, nats per token" in seen["start"]["legend"][0]
    assert "advantage" in seen["start"]["legend"][1]
    assert "log-probability, nats per token" in seen["logprob"]["legend"][0]
    assert not seen["logprob"]["plain"]
    assert len(seen["change"]["tints"]) == len(seen["logprob"]["tints"])


def test_keys_and_clicks_choose_a_snippet(seen: dict[str, Any]) -> None:
    """The arrows moved the page and not the choice; at the first snippet they went to the last."""
    items = seen["start"]["items"]
    assert seen["down"]["chosen"] == [items[1]]
    assert seen["clicked"]["chosen"] == [items[2]]
    assert seen["up"]["chosen"] == [items[0]]
    assert "s=1" in seen["down"]["hash"]


def test_search_and_filter(seen: dict[str, Any]) -> None:
    """Search looked at the code alone; what was found was not marked."""
    assert seen["hostile"]["items"] == seen["start"]["items"][:1]
    assert set(seen["hostile"]["marks"]) == {"</script>"}
    assert seen["nothing"]["items"] == []
    assert seen["nothing"]["count"] == "0 of 6 snippets"
    assert seen["nothing"]["rows"] == 0
    assert seen["cleared"]["items"] == seen["start"]["items"]
    assert 0 < seen["only"]["rows"] < seen["start"]["rows"]
    assert seen["only"]["thoughts"] == seen["start"]["thoughts"]
    assert seen["only"]["gaps"]


def test_address_holds_what_is_shown(page: Path) -> None:
    """A link to a snippet opened the first one."""
    found = visit(page, "#rationales?g=1&s=2&l=1&r=-1&c=think&q=return&t=1")
    assert found.console == []
    assert re.search(r'aria-selected="true"[^>]*><b>textwrap\.py: __init__ #2</b>', found.dom)
    heads = re.findall(r'<div class="rv-row rv-head">.*?</div></div>', found.dom)
    assert [re.findall("<b>(.*?)</b>", head) for head in heads] == [["ra3"]]
    assert "probability of a thought before it" in found.dom
