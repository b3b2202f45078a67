"""Forward passes with any mix of runs of tokens, and the answers to what is asked of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.rollout.forward import Forward, Outcome
from ra3_megatron.rollout.layout import LayoutPlan, Run, Upload
from ra3_megatron.rollout.sampling import CANDIDATES, MORE, LocalSet, Part, kinds_of, look

LOGIT_ROWS = 1024
"""Tokens whose logits exist at once; bounds memory, 0.6 GB in fp32 at a vocabulary of 152 k."""

ANSWERS = 4
"""Numbers per question, see `look`."""


@dataclass
class Pass:
    """One forward pass: runs of rows, and what is asked of the logits at which of its tokens."""

    runs: list[Run] = field(default_factory=list)
    """New tokens of rows."""
    ids: list[int] = field(default_factory=list)
    """All new tokens, run after run."""
    scored: list[int] = field(default_factory=list)
    """Tokens of the pass whose successor's log-probability is wanted,"""
    labels: list[int] = field(default_factory=list)
    """that successor,"""
    scored_to: list[int] = field(default_factory=list)
    """and the number of the answer among the step's."""
    asked: list[int] = field(default_factory=list)
    """Tokens of the pass of which a question about the successor is asked,"""
    sets: list[int] = field(default_factory=list)
    """about which set of ids,"""
    uniforms: list[float] = field(default_factory=list)
    """with which random number (NaN = no draw),"""
    top_p: list[float] = field(default_factory=list)
    """from which part of it,"""
    asked_to: list[int] = field(default_factory=list)
    """and the number of the answer among the step's."""


def run_pass(
    forward: Forward, plan: Pass, sets: Sequence[LocalSet], vocab: VocabShard, temperature: float
) -> np.ndarray:
    """All processes: run the pass; log-probs of the scored, then `ANSWERS` rows of numbers for the asked."""
    device = forward.parallel.device
    upload = Upload()
    padding = -len(plan.ids) % forward.multiple
    upload.add("ids", [*plan.ids, *[0] * padding])
    layout = LayoutPlan(plan.runs, padding, forward.length - 1, upload, forward.packs)
    questions = _Questions(plan, len(plan.ids) + padding, upload)
    sent = upload.send(device)
    answer = partial(questions.answer, sent, sets, vocab, temperature)
    outcome = forward.run(
        sent["ids"].unsqueeze(0), layout.finish(sent, forward.config.params_dtype, forward.length), answer,
        len(plan.scored) + ANSWERS * len(plan.asked),
    )  # fmt: skip
    return settled(forward, outcome, answer, len(plan.asked))


def settled(forward: Forward, outcome: Outcome, answer: Callable[..., Tensor], asked: int) -> np.ndarray:
    """Numbers of a pass on the host, the last `asked` of them saying whether a draw has been made; if not, `answer` is
    asked once more with more `candidates`. One copy from the device as a rule."""
    values, candidates = outcome.values.cpu().numpy(), CANDIDATES
    while asked and not values[-asked:].all():
        candidates *= MORE
        values = forward.ask_again(outcome, partial(answer, candidates=candidates)).cpu().numpy()
    return values


@dataclass(frozen=True)
class _Slice:
    """Tokens whose logits exist at the same time; names of what was sent about them, none = all in order."""

    wanted: str | None
    kinds: list[tuple[str | None, int, float]]
    asked_rows: str | None
    asked_to: str
    scored_rows: str | None
    scored_to: str | None


class _Questions:
    """What is asked of the logits of a pass of `tokens` tokens, its numbers put into `upload`."""

    def __init__(self, plan: Pass, tokens: int, upload: Upload) -> None:
        self._upload = upload
        scored, asked = np.array(plan.scored, dtype=np.int64), np.array(plan.asked, dtype=np.int64)
        self._scored, self._asked = len(scored), len(asked)
        upload.add("labels", plan.labels)
        upload.add("uniforms", np.array(plan.uniforms, dtype=np.float64))
        wanted = np.unique(np.concatenate((scored, asked)))
        self._slices = []
        for start in range(0, len(wanted), LOGIT_ROWS):
            part, name = wanted[start : start + LOGIT_ROWS], f"slice {start}"
            of_asked = np.flatnonzero((asked >= part[0]) & (asked <= part[-1]))
            of_scored = np.flatnonzero((scored >= part[0]) & (scored <= part[-1]))
            kinds = kinds_of([plan.sets[i] for i in of_asked], [plan.top_p[i] for i in of_asked])
            self._slices.append(
                _Slice(
                    self._add(f"{name} wanted", part, tokens),
                    [
                        (self._add(f"{name} kind {n}", rows, len(of_asked)), s, p)
                        for n, (rows, s, p) in enumerate(kinds)
                    ],
                    self._add(f"{name} asked", np.searchsorted(part, asked[of_asked]), len(part)),
                    self._keep(f"{name} asked to", of_asked),
                    self._add(f"{name} scored", np.searchsorted(part, scored[of_scored]), len(part)),
                    self._keep(f"{name} scored to", of_scored) if len(of_scored) else None,
                )
            )

    def _keep(self, name: str, index: np.ndarray) -> str:
        self._upload.add(name, index)
        return name

    def _add(self, name: str, index: np.ndarray, count: int) -> str | None:
        """Send an index into `count` things, unless it is all of them in order."""
        whole = len(index) == count and bool((index == np.arange(count)).all())
        return None if whole else self._keep(name, index)

    def answer(
        self,
        sent: dict[str, Tensor],
        sets: Sequence[LocalSet],
        vocab: VocabShard,
        temperature: float,
        hidden: Tensor,
        output: Callable[[Tensor], Tensor],
        candidates: int = CANDIDATES,
    ) -> Tensor:
        """From the last stage's hidden states to numbers; logits exist for a slice of the wanted tokens at a time."""

        def rows(x: Tensor, name: str | None) -> Tensor:
            return x if name is None else x[sent[name]]

        scores = hidden.new_empty(self._scored, dtype=torch.float64)
        answers = hidden.new_empty(ANSWERS, self._asked, dtype=torch.float64)
        for part in self._slices:
            logits = output(rows(hidden, part.wanted).unsqueeze(1))[:, 0]
            if part.kinds:
                to = sent[part.asked_to]
                kinds = [Part(None if name is None else sent[name], sets[s], p) for name, s, p in part.kinds]
                answers[:, to] = look(
                    rows(logits, part.asked_rows), kinds, sent["uniforms"][to], vocab, temperature, candidates
                )
            if part.scored_to is not None:
                to = sent[part.scored_to]
                # The logits' last use, so their memory is free where they are not copied.
                chosen = rows(logits, part.scored_rows)
                scores[to] = token_log_probs(chosen, sent["labels"][to], vocab, consume=True).double()
        return torch.cat((scores, answers.view(-1)))
