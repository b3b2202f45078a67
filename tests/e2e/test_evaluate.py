"""`ra3 evaluate`: a model on benchmarks of a few problems, killed and continued, on two processes, compared."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.forked import ForkServer

HUMANEVAL = [
    {
        "task_id": f"HumanEval/{n}",
        "prompt": f'def f{n}(x):\n    """Adds {n}."""\n',
        "entry_point": f"f{n}",
        "canonical_solution": f"    return x + {n}\n",
        "test": f"def check(candidate):\n    assert candidate(1) == {n + 1}\n",
    }
    for n in range(6)
]
CODEFORCES = [
    {
        "id": f"{n}/A", "title": "t", "description": "Print it.", "time_limit": 1.0, "memory_limit": 256.0,
        "rating": 800 + 400 * n, "official_tests_complete": True, "examples": [{"input": "1\n", "output": "1\n"}],
        "official_tests": [{"input": "2\n", "output": "2\n"}],
    }
    for n in range(3)
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for name, rows in (("HumanEval.jsonl", HUMANEVAL), ("codeforces.jsonl", CODEFORCES)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def arguments(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    chosen = ["--benchmarks", "humaneval,codeforces", "--samples", "3", "--max-tokens", "12"]
    settings = ["evaluation.start_token=auto", "parallel.threads=1", "judge.workers=1", "latent.max_batch=4"]
    return ["evaluate", str(base / "run"), *chosen, "--data-dir", str(data), "--out", str(out), *more, *settings]


def results(out: Path) -> dict[str, Any]:
    """What was measured, without what a clock has a say in; log-probs to what other batches round differently."""
    content = json.loads((out / "results.json").read_text())
    for model in content["models"].values():
        model.pop("checkpoint")
        for figures in model["benchmarks"].values():
            figures.pop("judge_cpu_s")
            figures["mean_log_prob"] = round(figures["mean_log_prob"], 5)
    return content


def samples(out: Path) -> dict[str, str]:
    return {p.name: p.read_text() for p in (out / "run").glob("samples_*")}


@pytest.fixture(scope="module")
def whole(base: Path, data: Path, server: ForkServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    (ended,) = server.cli(arguments(base, data, out))
    assert ended.code == 0, ended.err[-3000:]
    assert "pass@1" in ended.out
    return out


def test_every_answer_is_judged_and_counted(whole: Path) -> None:
    """Answers without a verdict, problems left out, a page without failures."""
    found = results(whole)
    figures = found["models"]["run"]["benchmarks"]
    assert {b: (f["problems"], f["answers"], f["lost"]) for b, f in figures.items()} == {
        "humaneval": (6, 18, 0),
        "codeforces": (3, 9, 0),
    }
    assert list(figures["codeforces"]["ratings"]) == ["800-1199", "1200-1599", "1600-1999"]
    lines = [json.loads(line) for line in samples(whole)["samples_humaneval.jsonl"].splitlines()]
    assert len(lines) == 18
    assert all(line["solution"] == HUMANEVAL[n // 3]["prompt"] + line["completion"] for n, line in enumerate(lines))
    assert len({line["completion"] for line in lines}) > 1, "samples of one problem are all the same"
    page = (whole / "evaluation.html").read_text()
    assert "Failed answers" in page
    assert "may hold these problems" in page


@pytest.mark.parametrize("moment", ["answers.*.jsonl", "verdicts.*.jsonl"])
def test_a_killed_evaluation_goes_on_and_ends_the_same(
    moment: str, whole: Path, base: Path, data: Path, server: ForkServer, tmp_path: Path
) -> None:
    """Answers drawn with other random numbers after a kill, or doubled, or lost."""
    out = tmp_path / "out"
    (ended,) = server.cli(arguments(base, data, out), kill_when=(out / "data" / "records", moment))
    assert ended.code in (0, -9), ended.err[-3000:]
    kept = [p.read_bytes() for p in (out / "data" / "records").glob("answers.*.jsonl")]
    (ended,) = server.cli(arguments(base, data, out))
    assert ended.code == 0, ended.err[-3000:]
    assert results(out) == results(whole)
    assert samples(out) == samples(whole)
    (after,) = (out / "data" / "records").glob("answers.*.jsonl")
    whole_lines = b"".join(kept).rpartition(b"\n")[0]
    assert after.read_bytes().startswith(whole_lines), "answers that were there were made again"


def test_other_settings_reuse_what_still_holds(
    whole: Path, base: Path, data: Path, server: ForkServer, tmp_path: Path
) -> None:
    """A finished evaluation kept its results although the settings had changed; or drew every answer anew."""
    out = tmp_path / "out"
    for more in (["--limit", "2"], []):
        (ended,) = server.cli(arguments(base, data, out, *more))
        assert ended.code == 0, ended.err[-3000:]
    assert "evaluating run: 15 of 27 answers are to be made" in ended.out
    assert samples(out) == samples(whole)
    (again,) = server.cli(arguments(base, data, out))
    assert "answers are to be made" not in again.out


@pytest.mark.parametrize("layout", [(), ("parallel.tensor=2",)])
def test_two_processes_give_what_one_gives(
    layout: tuple[str, ...], whole: Path, base: Path, data: Path, server: ForkServer, tmp_path: Path
) -> None:
    """Replicas that share the problems, or the model: answers doubled, missing, or others."""
    ended = server.cli([*arguments(base, data, tmp_path / "out"), *layout], world=2)
    assert [e.code for e in ended] == [0, 0], ended[0].err[-3000:] + ended[1].err[-3000:]
    assert samples(tmp_path / "out") == samples(whole)
    files = list((tmp_path / "out" / "data" / "records").glob("answers.*.jsonl"))
    assert len(files) == (1 if layout else 2)


def test_finished_results_are_compared_with(
    whole: Path, base: Path, data: Path, server: ForkServer, tmp_path: Path
) -> None:
    """A model against its own results: no difference, and it says so."""
    (ended,) = server.cli(arguments(base, data, tmp_path / "out", "--against", str(whole)))
    assert ended.code == 0, ended.err[-3000:]
    (entry,) = results(tmp_path / "out")["paired"].values()
    assert entry["humaneval"]["difference"] == 0
    assert entry["humaneval"]["p_value"] == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--benchmarks", "human_eval"], "did you mean 'humaneval'"),
        (["--benchmarks", "mbpp"], "no data for mbpp"),
        (["--mode", "parity"], "no reference evaluator"),
        (["--temperature", "0"], "greedy answers are all the same"),
        (["--against", "nowhere"], "--against nowhere does not exist"),
        (["parallel.tensor=2"], "start a multiple of 2"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    changes: list[str], message: str, base: Path, data: Path, server: ForkServer, tmp_path: Path
) -> None:
    """The cure in one line, before a model is loaded."""
    (ended,) = server.cli(arguments(base, data, tmp_path / "out", *changes))
    assert ended.code == 2, ended.err[-3000:]
    assert message in ended.err
    assert "Traceback" not in ended.err


def test_tasks_check(server: ForkServer, tmp_path: Path) -> None:
    """A task whose own solution fails its tests is found before it is trained on."""
    good = {"id": "good", "prompt": "p", "entry_point": "f", "tests": ["assert f(1) == 2"]}
    rows = [{**good, "solution": "def f(x):\n    return x + 1\n"}, {**good, "id": "bad", "solution": "def f(x): ...\n"}]
    path = tmp_path / "tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (ended,) = server.cli(["tasks", "check", str(path)])
    assert ended.code == 1, ended.err[-3000:]
    assert "1 references pass their own tests, 1 do not" in ended.out
    assert "bad: wrong at test 1 of 1" in ended.out
