"""Progress as a person or a log file sees it."""

import io

import pytest
from rich.console import Console

from ra3_megatron.report import progress
from ra3_megatron.report.progress import Progress, format_duration, format_rate


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (90061, "1d 1:01:01"), (-3, "0:00:00")],
)
def test_format_duration(seconds: float, text: str) -> None:
    """59.6 seconds were shown as 0:00:60."""
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("rate", "text"), [(0, "0"), (873.4, "873"), (1234, "1.23k"), (12345, "12.3k"), (123456, "123k"), (1.24e6, "1.24M")]
)
def test_format_rate(rate: float, text: str) -> None:
    """Large rates were printed in powers of ten."""
    assert format_rate(rate) == text


def test_log_file_gets_one_plain_line_per_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Escape codes and wrapped lines in a job's log file, and a remaining time that counted the steps before a resume
    as if they had been done in no time."""
    clock = iter([100.0, 110.0, 120.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = io.StringIO()
    console = Console(file=out, soft_wrap=True, highlight=False, width=40)
    with Progress(100, "02-midtrain", enabled=True, start_step=50, console=console) as shown:
        shown.update(60, loss=2.5, tokens_per_second=12345.0)
        shown.message("checkpoint [60] written")
        shown.update(70, validation_loss=2.25)
    assert out.getvalue().splitlines() == [
        "02-midtrain  step 60/100  loss 2.5000  12.3k tokens/s  0:00:40 left",
        "checkpoint [60] written",
        "02-midtrain  step 70/100  validation loss 2.2500  0:00:30 left",
    ]


def test_terminal_gets_a_bar_and_the_messages() -> None:
    """The bar swallowed messages printed while it was up."""
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with Progress(10, "02-midtrain", enabled=True, console=console) as shown:
        shown.update(5, loss=1.5)
        shown.message("checkpoint written")
    assert "5/10" in out.getvalue()
    assert "checkpoint written" in out.getvalue()


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Every rank printed its own progress."""
    with Progress(10, "02-midtrain", enabled=False) as shown:
        shown.update(5, loss=1.5)
        shown.message("hello")
    assert capsys.readouterr().out == ""
