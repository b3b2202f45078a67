"""`ra3 compare` on a tiny model: seeds, a sweep of prices, another seed later and on two processes."""

import json
import re
from pathlib import Path

import pytest

from tests.e2e.forked import ForkServer
from tests.e2e.test_ra3_run import ra3_config


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with ForkServer(tmp_path_factory.mktemp("server")) as running:
        yield running


def finished(run: Path) -> dict[str, int]:
    """Time of every DONE of the runs of a comparison."""
    return {str(p.parent.relative_to(run)): p.stat().st_mtime_ns for p in run.glob("*/*/DONE")}


def test_seeds_and_prices(server, tmp_path):
    path = ra3_config(
        tmp_path,
        base={"tokens": 4000},
        train={"tokens": 2000, "eval_interval": 0},
        variational={"steps": 2, "snippets_per_step": 2},
        optimizer={"warmup_steps": 0},
        export={"enabled": False},
    )
    run = tmp_path / "run"
    wanted = ["compare", str(path), "--arms", "ntp,self_comment", "--prices", "0.3,0.1"]
    (ended,) = server.cli([*wanted, "--seeds", "1,2"], timeout=120)
    assert ended.code == 0, ended.err[-4000:]
    before = finished(run)
    assert {name.split("/")[0] for name in before} == {"seed-1", "seed-2", "price-0.1", "price-0.3"}
    assert {name.split("/")[1] for name in before if name.startswith("price-0.3")} == {
        "00-prepare", "01-prepare-base", "02-base", "03-ra3-variational-1",
    }  # fmt: skip
    content = json.loads((run / "compare.json").read_text())
    assert [(entry["price"], entry["steps"]) for entry in content["think_penalty"]] == [(0.1, 2), (0.3, 2)]
    assert all(entry["reward"] < 0 <= entry["think_rate"] for entry in content["think_penalty"])
    rows = {(row["arm"], row["seed"]): row for row in content["rows"]}
    assert set(rows) == {(arm, seed) for arm in ("base", "ntp", "self_comment") for seed in (1, 2)}
    assert rows["base", 1]["bare"] != rows["base", 2]["bare"], "the seed was not used"
    measured = json.loads(next((run / "seed-2").glob("*-measure/measured.json")).read_text())
    assert rows["ntp", 2]["bare"] == measured["arms"]["ntp"]["bare"]["nats_per_token"]
    assert rows["self_comment", 1]["flops"] > rows["ntp", 1]["flops"] > 0
    assert re.search(r"self_comment - ntp, bare: +[+-]\d\.\d{4} \[", ended.out)
    assert (run / "compare.html").stat().st_size > 1000

    # A third seed, by two processes; what is there stays.
    ended, other = server.cli([*wanted, "--seeds", "1,2,3"], world=2, timeout=120)
    assert (ended.code, other.code) == (0, 0), ended.err[-4000:] + other.err[-4000:]
    after = finished(run)
    assert before == {name: after[name] for name in before}
    assert {name.split("/")[0] for name in set(after) - set(before)} == {"seed-3"}
    content = json.loads((run / "compare.json").read_text())
    assert content["seeds"] == [1, 2, 3]
    assert {row["seed"]: row["bare"] for row in content["rows"] if row["arm"] == "ntp"}[2] == rows["ntp", 2]["bare"]
    assert (ended.out + other.out).count("nats per held-out code token") == 1, "one process speaks"


def test_refused_on_the_command_line(server, tmp_path):
    path = ra3_config(tmp_path, train={"tokens": None, "steps": 4})
    (ended,) = server.cli(["compare", str(path), "--arms", "ntp,ra3", "--seeds", "1"])
    assert ended.code == 2
    assert "equal raw tokens; set train.steps=null" in ended.err
    assert not (tmp_path / "run").exists()
