"""The held-out tasks of RLVR: the same random numbers before, during and after the training."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.parallel.collectives import all_reduce_sum, gather_objects
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.groups import AnswerGroup
from ra3_megatron.stages.rlvr_answers import AnswerSource, Asked, answer_text
from ra3_megatron.stages.rlvr_tasks import TrainTask

SAMPLES = "samples"
"""Folder in `data/` of answers for people, one file per moment."""


@dataclass(frozen=True)
class Validation:
    """Held-out tasks and how they are measured."""

    tasks: Sequence[TrainTask]
    members: int
    """Answers to each."""
    seed: int
    source: AnswerSource
    parallel: Parallel

    def measure(self, step: int) -> tuple[dict[str, float], dict[str, int]]:
        """Pass rate with the weights in training, which have taken `step` steps, by names of the metrics' schema, and
        the work it took over all replicas. All processes."""
        p = self.parallel
        mine = np.array_split(np.arange(len(self.tasks)), p.sizes.data)[p.data_rank].tolist()
        self.source.synchronise()
        # Positions of a measurement are its own: the same task at two steps is two entries of the record.
        drawn = self.source.draw(step, [Asked(i, self.tasks[i]) for i in mine], self.members, self.seed)
        passed, counted = np.zeros(len(self.tasks)), np.zeros(len(self.tasks))
        tokens = 0
        for number, answers, verdicts in zip(mine, drawn.answers, drawn.verdicts, strict=True):
            group = AnswerGroup.of(0, number, number, answers, verdicts)
            passed[number], counted[number] = sum(v.ok for v in group.verdicts), len(group.verdicts)
            tokens += sum(len(a.ids) for a in answers)
        work = np.array([drawn.cost.tokens, drawn.cost.forward_passes, tokens], dtype=np.float64)
        vector = torch.from_numpy(np.concatenate((passed, counted, work)))
        every = all_reduce_sum(p.group("dp"), vector, "figures of the held-out tasks").numpy()
        n = len(self.tasks)
        passed, counted, work = every[:n], every[n : 2 * n], every[2 * n :]
        rates = passed[counted > 0] / counted[counted > 0]
        answers_all = float(counted.sum())
        figures = {
            "validation_pass_rate": float(rates.mean()) if len(rates) else math.nan,
            "validation_pass_error": float(rates.std(ddof=1) / math.sqrt(len(rates))) if len(rates) > 1 else math.nan,
            "validation_answer_tokens": float(work[2]) / answers_all if answers_all else math.nan,
        }
        return figures, {"rollout_tokens": round(work[0]), "forward_passes": round(work[1])}


def sample_record(
    group: AnswerGroup, task: TrainTask, rewards: Sequence[float], tokenizer: Tokenizer
) -> dict[str, Any]:
    """A group for people: prompt, answers, rewards, verdicts."""
    return {
        "task": task.task.id,
        "prompt": tokenizer.decode(task.ids.tolist()),
        "answers": [
            {
                "text": answer_text(tokenizer, answer),
                "reward": reward,
                "outcome": verdict.outcome,
                "passed": verdict.passed,
                "total": verdict.total,
                "message": verdict.message,
                "tokens": len(answer.ids),
                "finish": answer.finish,
            }
            for answer, verdict, reward in zip(group.answers, group.verdicts, rewards, strict=True)
        ],
    }


def write_samples(parallel: Parallel, folder: Any, step: int, records: Sequence[dict[str, Any]], most: int) -> None:
    """The first `most` groups over all replicas into `<folder>/step_<step>.json`; all processes."""
    found = gather_objects(parallel.group("dp"), list(records), "samples for people")
    if parallel.is_main:
        every = [record for part in found for record in part][:most]
        atomic_write_text(folder / f"step_{step:08d}.json", json.dumps({"step": step, "groups": every}))
