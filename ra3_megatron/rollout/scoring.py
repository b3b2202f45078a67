"""Log-probabilities by teacher forcing, in packed windows through Megatron's schedule: of expert lines, of labels.

What a frozen scorer, the policy in training or a model under measurement says about texts that are there already, with
or without thoughts; nothing is sampled. Lines are scored at temperature 1, labels at any.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.decision import TokenSets, decide
from ra3_megatron.algo.logprobs import token_log_probs
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.experts import refuse_shared_sampling
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.packing import TrainSequence, padded
from ra3_megatron.data.trajectory import Kind, Trajectory
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.engine import EngineCounters
from ra3_megatron.training.actions import ROWS, THINK_SET
from ra3_megatron.training.schedule import forward_only, pack_micro_batches, vocabulary_shard


def _deciding(trajectory: Trajectory) -> dict[int, tuple[int, int]]:
    """Line -> (position of its own token that says that no thought begins, think set); after its thought, if any."""
    sets = {d.line: (len(d.forced), d.think_set) for d in trajectory.decisions}
    code = [s for s in trajectory.segments if s.kind == Kind.CODE and s.line in sets]
    return {s.line: (s.start + sets[s.line][0], sets[s.line][1]) for s in code}


def _sequence(ids: np.ndarray, deciding: Mapping[int, tuple[int, int]]) -> TrainSequence:
    marks = np.zeros(len(ids), np.float32)
    for position, think_set in deciding.values():
        if position < len(ids):
            marks[position] = 1 + think_set
    return TrainSequence(ids, {}, {THINK_SET: marks})


@dataclass(frozen=True)
class LineScores:
    """Log-probabilities of one text, nats; the first token of a text without start token or prompt counts 0."""

    lines: np.ndarray = field(repr=False)
    """float64 [lines]: sum over the tokens of every code line; NaN where it was not asked for."""
    thoughts: np.ndarray = field(repr=False)
    """float64 [lines]: sum over the tokens, forced ones included, of the thought before it; 0 without one, NaN where
    the line was not asked for. The language model's own, over the whole vocabulary, not the deciding policy's."""
    log_act: np.ndarray = field(repr=False)
    """float64 [lines]: the part of `lines` that says that no (further) thought begins there; 0 where none could."""

    @property
    def given_latent(self) -> np.ndarray:
        """float64 [lines]: log p(line | s_t, z_t). The first token of a line also says that no thought begins, which is
        z_t and not code: left in, every thought would earn what its line saves there, however little it says."""
        return self.lines - self.log_act

    @property
    def total(self) -> float:
        """log p(text, thoughts) of the language model, the prompt given."""
        return float(self.lines.sum() + self.thoughts.sum())


class LineScorer:
    """Scores texts with the model in `chunks`, wrapped or not; after each call they are in evaluation mode.

    All processes of a model replica make the same calls and get the same; replicas call on their own, with lists of
    their own, since nothing is exchanged between them. With `overlap_param_gather`, call
    `checkpoint.capture.synchronise_parameters` after an update and before this. `config` gives the window
    (`train.seq_length`) and how many go through the model at once (`train.micro_batch_size`). `counters` count the
    work, padding included. `think_tokens` are those of the trajectories.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        architecture: Architecture,
        parallel: Parallel,
        config: RunConfig,
        think_tokens: ThinkTokens,
    ) -> None:
        refuse_shared_sampling(parallel.sizes, "a scorer of rollouts")
        self.counters = EngineCounters()
        self._think_tokens = think_tokens
        self._made: TokenSets | None = None
        self._chunks, self._parallel, self._train = list(chunks), parallel, config.train
        config_of_model: Any = unwrap(chunks[0]).config
        # All windows have one length: pipeline stages need not tell each other shapes.
        config_of_model.variable_seq_lengths = False
        self._vocab = vocabulary_shard(chunks, architecture, parallel)

    # ---------------------------------------------------------------- lines

    def score(self, trajectories: Sequence[Trajectory], lines: Sequence[np.ndarray] | None = None) -> list[LineScores]:
        """Every line and thought of the `trajectories`, which may have thoughts or not, in order.

        `lines` bool [lines] of each: score these alone; the text after the last of them is not run. A thought counts as
        possible at every line of `decisions`. Raises UserError for a text longer than a window.
        """
        wanted = [np.ones(t.num_lines, bool) for t in trajectories] if lines is None else lines
        ends = [
            max([s.end for s in t.segments if s.kind == Kind.CODE and w[s.line]], default=0)
            for t, w in zip(trajectories, wanted, strict=True)
        ]
        deciding = [_deciding(t) for t in trajectories]
        texts = [t.ids[:end] for t, end in zip(trajectories, ends, strict=True)]
        scores, declined = self._scored(texts, deciding)
        out = []
        for trajectory, chosen, values, acts, where in zip(
            trajectories, wanted, scores, declined, deciding, strict=True
        ):
            log_act = np.where(chosen, 0.0, np.nan)
            for line, (position, _) in where.items():
                if chosen[line]:
                    log_act[line] = acts[position]
            by_kind = {kind: np.where(chosen, 0.0, np.nan) for kind in (Kind.CODE, Kind.THOUGHT)}
            for s in trajectory.segments:
                if s.kind != Kind.PROMPT and chosen[s.line]:
                    by_kind[s.kind][s.line] = values[s.start : s.end].sum()
            out.append(LineScores(by_kind[Kind.CODE], by_kind[Kind.THOUGHT], log_act))
        return out

    def without_thought(
        self, trajectories: Sequence[Trajectory], lines: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """float64 [lines] of each: log p(line | act) of a line with a thought, after the same text but without that
        thought and given that none begins; NaN elsewhere.

        The earlier thoughts stay. Every such line is run with all its text before: for a policy's own rollouts
        `Rollout.without_thought` has the same for free. `lines` as in `score`.
        """
        texts, places, deciding = [], [], []
        for number, trajectory in enumerate(trajectories):
            code = {s.line: s for s in trajectory.segments if s.kind == Kind.CODE}
            sets = {d.line: (len(d.forced), d.think_set) for d in trajectory.decisions}
            for s in trajectory.segments:
                if s.kind == Kind.THOUGHT and (lines is None or lines[number][s.line]):
                    own = code[s.line]
                    texts.append(np.concatenate((trajectory.ids[: s.start], trajectory.ids[own.start : own.end])))
                    places.append((number, s.line, s.start))
                    forced, think_set = sets[s.line]
                    deciding.append({s.line: (s.start + forced, think_set)})
        out = [np.full(t.num_lines, np.nan) for t in trajectories]
        scores, declined = self._scored(texts, deciding)
        for (number, line, start), values, acts, where in zip(places, scores, declined, deciding, strict=True):
            out[number][line] = values[start:].sum() - acts[where[line][0]]
        return out

    # ---------------------------------------------------------------- tokens

    def token_log_probs(self, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Log-probability of every token of `texts` (ids, int32 [tokens] each), nats: float64 [tokens] of each.

        The first token of a text has none and counts 0. Raises UserError for a text longer than a window.
        """
        return self._scored(texts, [{} for _ in texts])[0]

    def _scored(
        self, texts: Sequence[np.ndarray], deciding: Sequence[Mapping[int, tuple[int, int]]]
    ) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """As `token_log_probs`, and float64 [tokens] log(1 - p_think) at the positions `deciding` (line to position and
        think set) of each text, 0 elsewhere."""
        lengths = np.array([len(t) for t in texts], dtype=np.int64)
        out, acts = ([np.zeros(n) for n in lengths] for _ in range(2))
        if not lengths.any():
            return out, acts
        sequences = [_sequence(t, where) for t, where in zip(texts, deciding, strict=True)]
        batches, packing = pack_micro_batches(sequences, self._train, self._parallel, extras=(THINK_SET,))
        rows, declined = self._run(batches)
        for window in range(len(packing)):
            at = window * self._train.seq_length
            for number in packing.window(window):
                n = int(lengths[number])
                out[number][1:] = rows[at : at + n - 1]  # row i predicts token i + 1
                acts[number][1:] = declined[at : at + n - 1]
                at += int(padded(np.array(n), packing.pad_multiple))
        return out, acts

    def _run(self, batches: Sequence[TrainBatch]) -> np.ndarray:
        """All processes of the replica: log-probability of every label of the micro-batches, and log(1 - p_think) where
        it decides, float64 [2, positions]."""
        found = forward_only(self._parallel, self._chunks, batches, 2, self._keep, "scoring")
        self.counters.forward_passes += len(batches)
        self.counters.tokens += len(found) * found.size(2)
        return found.transpose(0, 1).reshape(2, -1).cpu().numpy()

    def _sets(self, device: torch.device) -> TokenSets:
        """All think sets there are by now."""
        if self._made is None or len(self._made.ids) != len(self._think_tokens):
            self._made = TokenSets.make([self._think_tokens[i].ids for i in range(len(self._think_tokens))], device)
        return self._made

    def _keep(self, batch: TrainBatch, logits: Tensor) -> Tensor:
        """The labels' log-probabilities, and those that they begin no thought."""
        declined = torch.zeros(len(logits), device=logits.device)
        rows = batch.extras[THINK_SET].nonzero().squeeze(1)
        if len(rows):
            sets = self._sets(logits.device)
            for part in rows.split(ROWS):
                which = batch.extras[THINK_SET][part].long() - 1
                declined[part] = decide(logits[part], sets, which, self._vocab).log_act
        return torch.stack((token_log_probs(logits, batch.labels, self._vocab, consume=True).float(), declined))


def score_labels(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    parallel: Parallel,
    batches: Sequence[TrainBatch],
    temperature: float = 1.0,
) -> list[Tensor]:
    """Log-probability of every label of this replica's micro-batches after `temperature`, nats.

    What a training engine on the same `chunks` would read, without gradients: log-probs of the policy before an update
    or of a reference. `batches` as for `TrainEngine.train_step`; with `overlap_param_gather`, call
    `checkpoint.capture.synchronise_parameters` after an update and before this. Returns fp32 [tokens] per batch on the
    batch's device, the same on every process of the replica; labels without weight have some number too.
    """
    if temperature <= 0:
        raise UserError(f"temperature {temperature}; it divides the logits; use a number above 0")
    config_of_model: Any = unwrap(chunks[0]).config
    config_of_model.variable_seq_lengths = False
    vocab = vocabulary_shard(chunks, architecture, parallel)

    def score(batch: TrainBatch, logits: Tensor) -> Tensor:
        return token_log_probs(logits, batch.labels, vocab, temperature, consume=True).unsqueeze(0)

    found = forward_only(parallel, chunks, batches, 1, score, "scoring of labels")
    return [row[0].to(batch.labels.device, torch.float32) for row, batch in zip(found, batches, strict=True)]
