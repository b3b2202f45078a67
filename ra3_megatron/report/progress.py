"""How far a run is: a live bar on a terminal, one line per update anywhere else."""

import time
from collections import deque

from rich import progress as bar
from rich.console import Console

WINDOW = 20
"""Updates that the remaining time is estimated from."""


def format_duration(seconds: float) -> str:
    """`h:mm:ss`, with days in front from 24 hours on; `seconds` is rounded."""
    whole = round(max(0.0, seconds))
    days, rest = divmod(whole, 86400)
    text = f"{rest // 3600}:{rest // 60 % 60:02d}:{rest % 60:02d}"
    return f"{days}d {text}" if days else text


def format_rate(per_second: float) -> str:
    """Four figures at most with k or M: `873`, `12.3k`, `1.24M`."""
    if per_second < 1e3:
        return f"{per_second:.0f}"
    value, unit = (per_second / 1e3, "k") if per_second < 1e6 else (per_second / 1e6, "M")
    return f"{value:.0f}{unit}" if value >= 100 else f"{value:.3g}{unit}"


class Progress:
    """Progress of a loop over steps.

    `update` is called at the reporting interval. Only the process with `enabled` prints anything.
    """

    def __init__(
        self,
        total_steps: int,
        description: str,
        enabled: bool,
        start_step: int = 0,
        console: Console | None = None,
        unit: str = "step",
    ) -> None:
        """`start_step` is the step resumed from: the remaining time is estimated from the steps after it.

        `unit`: what a step is called in a log line.
        """
        self._total = total_steps
        self._description = description
        self._enabled = enabled
        self._unit = unit
        # No wrapping and no colour codes in a log file: each update stays one line that grep finds.
        self._console = console or Console(soft_wrap=True, highlight=False)
        self._marks: deque[tuple[float, int]] = deque([(time.monotonic(), start_step)], maxlen=WINDOW)
        self._live: bar.Progress | None = None
        if enabled and self._console.is_terminal:
            self._live = bar.Progress(
                bar.TextColumn("[bold]{task.description}"),
                bar.BarColumn(),
                bar.MofNCompleteColumn(),
                bar.TaskProgressColumn(),
                bar.TextColumn("{task.fields[figures]}"),
                console=self._console,
            )
            self._task = self._live.add_task(description, total=total_steps, completed=start_step, figures="")
            self._live.start()

    def update(
        self,
        step: int,
        loss: float | None = None,
        tokens_per_second: float | None = None,
        validation_loss: float | None = None,
        snippets_per_second: float | None = None,
        reward: float | None = None,
        think_rate: float | None = None,
        pass_rate: float | None = None,
        seconds: float | None = None,
        idle: tuple[float | None, float | None] = (None, None),
    ) -> None:
        """Show that `step` steps are done. Losses in nats per token, speeds over all processes; ETA is worked out.

        `reward`, `think_rate` (a fraction) and `seconds` (of the step) are those of an E-step, `pass_rate` (a fraction)
        is of RLVR. `idle`: seconds that training and generating replicas waited for one another, where they are apart.
        """
        if not self._enabled:
            return
        self._marks.append((time.monotonic(), step))
        figures = []
        if loss is not None:
            figures.append(f"loss {loss:.4f}")
        if validation_loss is not None:
            figures.append(f"validation loss {validation_loss:.4f}")
        if reward is not None:
            figures.append(f"reward {reward:.4f}")
        if pass_rate is not None:
            figures.append(f"pass rate {pass_rate:.1%}")
        if think_rate is not None:
            figures.append(f"thinks {100 * think_rate:.1f} %")
        if seconds is not None:
            figures.append(f"{seconds:.1f} s")
        for who, waited in zip(("training", "generation"), idle, strict=True):
            if waited is not None:
                figures.append(f"{who} idle {waited:.1f} s")
        if tokens_per_second is not None:
            figures.append(f"{format_rate(tokens_per_second)} tokens/s")
        if snippets_per_second is not None:
            figures.append(f"{snippets_per_second:.3g} snippets/s")
        remaining = self.seconds_left()
        if remaining is not None:
            figures.append(f"{format_duration(remaining)} left")
        if self._live is not None:
            self._live.update(self._task, completed=step, figures="  ".join(figures))
        else:
            self.message(f"{self._description}  {self._unit} {step}/{self._total}  {'  '.join(figures)}".rstrip())

    def seconds_left(self) -> float | None:
        """Seconds to the last step at the speed of the last updates; None before there is a speed."""
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        if last_step <= first_step:
            return None
        return (self._total - last_step) * (last_time - first_time) / (last_step - first_step)

    def message(self, text: str) -> None:
        """Print a line; on a terminal it goes above the bar."""
        if self._enabled:
            self._console.print(text, markup=False)

    def close(self) -> None:
        """Leave the bar as it is and give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
