"""What every stage of a run gets: configuration, this process's place, the run's folder."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import RunConfig
from ra3_megatron.config.validate import Layout
from ra3_megatron.parallel.collectives import broadcast_object, raise_everywhere
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.stages.interrupt import Interrupt
from ra3_megatron.stages.run_folder import RunFolder, StageFolder, new_attempt


@dataclass(frozen=True)
class Context:
    """A run in progress, on one process."""

    config: RunConfig
    """Resolved configuration."""
    architecture: Architecture
    """Shape of the model."""
    layout: Layout
    """Arithmetic of batches and processes."""
    parallel: Parallel
    """Groups and device."""
    folder: RunFolder
    """The run's folder, shared by all nodes."""

    @cached_property
    def interrupt(self) -> Interrupt:
        """Where the stages' loops ask whether to save and leave, and say that they live."""
        return Interrupt(self.parallel, self.folder.path, self.config.parallel.timeout_s)

    def on(self, parallel: Parallel) -> "Context":
        """The same on another world of this process."""
        return replace(self, parallel=parallel)

    def say(self, text: str) -> None:
        """Print a line, on one process."""
        if self.parallel.is_main:
            print(text, flush=True)

    def on_main(self, name: str, action: Callable[[], Any]) -> Any:
        """Run `action` on one process; its value, or its error, reaches all. Waits `parallel.setup_timeout_s`."""
        seconds = self.config.parallel.setup_timeout_s
        self.parallel.mark(name)
        with raise_everywhere(self.parallel.world, name, seconds):
            value = action() if self.parallel.is_main else None
        return broadcast_object(self.parallel.world, value, name, seconds=seconds)

    def run_once(
        self, stage: StageFolder, name: str, action: Callable[[StageFolder], dict[str, Any]]
    ) -> dict[str, Any]:
        """A stage that one process does for all: skipped when DONE, else run, marked DONE. Returns its result."""

        def run() -> dict[str, Any]:
            if not stage.done:
                new_attempt(stage)
                stage.finish(action(stage))
            return stage.result()

        return self.on_main(name, run)
