"""Rationales for a whole corpus: one draw z ~ q for each snippet, or one of several kept by importance weight (BoLT).

Every snippet comes out with the same code tokens, since arms that are compared train on the same code: where thoughts
change the program, other thoughts are drawn, and after some tries the snippet stays without any.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ra3_megatron.algo.elbo import multi_sample_bound
from ra3_megatron.algo.estimators import resampling_weights
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Trajectory, keeps_program
from ra3_megatron.rollout.engine import Extend, RolloutEngine
from ra3_megatron.rollout.hindsight import from_hindsight, hindsight_views
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, SeededUniforms, Uniforms, rollout

TRIES = 4
"""Draws of a snippet whose thoughts change the program, the first included, before it stays without thoughts."""

_CHOICE = 1
"""Sets the random number that chooses a sample apart from those that draw the samples."""

Propose = Callable[[RolloutEngine, Sequence[Trajectory], int, Uniforms, RolloutSettings, ThinkTokens], list[Rollout]]
"""Draws a group of rollouts of every trajectory; what it returns are rollouts of the trajectories themselves."""


@dataclass(frozen=True)
class DrawSettings:
    """How rationales are drawn."""

    rollout: RolloutSettings
    """How thoughts are sampled."""
    seed: int
    """Of the round, see `round_seed`."""
    samples: int = 1
    """Rollouts of a snippet."""
    resample: bool = False
    """Keep one of the samples by its importance weight p(x, z) / q(z | x), p the model in the engine (BoLT)."""

    def __post_init__(self) -> None:
        if self.samples < 1 or (self.samples > 1 and not self.resample):
            raise UserError(
                f"{self.samples} samples per snippet, {'' if self.resample else 'not '}resampled; one of several is "
                "chosen by resampling only; set samples to 1, or resample"
            )


@dataclass(frozen=True)
class Drawn:
    """What became of one snippet."""

    kept: Rollout | None
    """The rollout that was kept; none where every draw changed the program."""
    broken: int
    """Rollouts left out because their thoughts change the program."""
    tries: int
    """Times that a group was drawn."""
    effective_samples: float = float("nan")
    """1 / sum of squared importance weights, from 1 to the number of samples; NaN without resampling."""
    bound: float = float("nan")
    """log 1/K sum p(x, z_k) / q(z_k | x), nats: a bound on log p(x); NaN without resampling."""


def propose_with_hindsight(
    engine: RolloutEngine,
    experts: Sequence[Trajectory],
    group_size: int,
    uniforms: Uniforms,
    settings: RolloutSettings,
    think_tokens: ThinkTokens,
) -> list[Rollout]:
    """Like `rollout`, with the whole text in q's view; the rollouts are of the texts without it.

    Their lines have no log-probabilities, see `from_hindsight`. Raises UserError for a text that does not fit twice.
    """
    views = hindsight_views(experts, think_tokens, engine.max_tokens, settings.max_latent_tokens)
    drawn = rollout(engine, views, group_size, uniforms, settings, think_tokens)
    return [from_hindsight(r, experts[r.number]) for r in drawn]


def round_seed(seed: int, round: int) -> int:
    """Seed of the rationales of a round, the same for every arm; 48 bits."""
    return int.from_bytes(hashlib.sha256(f"rationales {seed} {round}".encode()).digest()[:6], "big")


@dataclass(frozen=True)
class _Later:
    """Random numbers of the members from `first` on."""

    uniforms: Uniforms
    first: int

    def __call__(self, number: int, member: int, shape: tuple[int, int]) -> np.ndarray:
        """See `Uniforms`."""
        return self.uniforms(number, self.first + member, shape)


def draw_rationales(
    engine: RolloutEngine,
    experts: Sequence[Trajectory],
    ids: Sequence[int],
    settings: DrawSettings,
    think_tokens: ThinkTokens,
    propose: Propose = rollout,
) -> list[Drawn]:
    """One `Drawn` per trajectory, in order; `ids` are the trajectories' numbers in the data set.

    The draws depend on (seed, id) alone; log-probabilities, up to rounding, too. Members of a group are numbered on
    from try to try, so that a second draw has its own random numbers.
    """
    found: dict[int, Drawn] = {}
    broken = dict.fromkeys(range(len(experts)), 0)
    for attempt in range(TRIES):
        pending = [i for i in range(len(experts)) if i not in found]
        if not pending:
            break
        own = [ids[i] for i in pending]
        uniforms = _Later(SeededUniforms(settings.seed, own), attempt * settings.samples)
        shown = [experts[i] for i in pending]
        rollouts = propose(engine, shown, settings.samples, uniforms, settings.rollout, think_tokens)
        groups = [rollouts[k : k + settings.samples] for k in range(0, len(rollouts), settings.samples)]
        good = [[_whole(experts[i], r, think_tokens) for r in group] for i, group in zip(pending, groups, strict=True)]
        for i, fine in zip(pending, good, strict=True):
            broken[i] += fine.count(False)
        settled = [k for k, fine in enumerate(good) if any(fine)]
        if settings.resample:
            chosen = _resample(
                engine, [groups[k] for k in settled], [good[k] for k in settled], [own[k] for k in settled], settings
            )
        else:
            chosen = [(groups[k][0], float("nan"), float("nan")) for k in settled]
        for k, (kept, effective, bound) in zip(settled, chosen, strict=True):
            found[pending[k]] = Drawn(kept, broken[pending[k]], attempt + 1, effective, bound)
    drawn = [found.get(i) or Drawn(None, broken[i], TRIES) for i in range(len(experts))]
    return _with_lines(engine, drawn)


def _with_lines(engine: RolloutEngine, drawn: Sequence[Drawn]) -> list[Drawn]:
    """Fill in the lines' log-probabilities where the rollouts that were kept have none."""
    kept = {i: d.kept for i, d in enumerate(drawn) if d.kept is not None and np.isnan(d.kept.line_log_probs).any()}
    scores = text_log_probs(engine, [r.trajectory.ids for r in kept.values()])
    filled = {
        i: replace(r, line_log_probs=line_sums(r.trajectory, s)) for (i, r), s in zip(kept.items(), scores, strict=True)
    }
    return [replace(d, kept=filled.get(i, d.kept)) for i, d in enumerate(drawn)]


def _whole(expert: Trajectory, drawn: Rollout, think_tokens: ThinkTokens) -> bool:
    """Whether the snippet with its thoughts still is the expert's program; without thoughts it is."""
    if not drawn.thought.any():
        return True
    return keeps_program(expert, drawn.trajectory, think_tokens.tokenizer, think_tokens.format)


def _resample(
    engine: RolloutEngine,
    groups: Sequence[Sequence[Rollout]],
    good: Sequence[Sequence[bool]],
    ids: Sequence[int],
    settings: DrawSettings,
) -> list[tuple[Rollout, float, float]]:
    """Of each group one rollout, the effective samples and the bound; a rollout that is not good has weight 0."""
    if not groups:
        return []
    scored = [r for group, fine in zip(groups, good, strict=True) for r, ok in zip(group, fine, strict=True) if ok]
    every = text_log_probs(engine, [r.trajectory.ids for r in scored])
    totals = iter([float(p[r.trajectory.kinds() != Kind.PROMPT].sum()) for r, p in zip(scored, every, strict=True)])
    joint = torch.tensor([[next(totals) if ok else -torch.inf for ok in fine] for fine in good], dtype=torch.float64)
    proposal = torch.tensor([[log_proposal(r) for r in group] for group in groups], dtype=torch.float64)
    numbers = choose(joint, proposal, ids, settings.seed)
    effective = resampling_weights(joint, proposal).effective_samples.tolist()
    bounds = multi_sample_bound(joint, proposal).tolist()
    return [(group[k], e, b) for group, k, e, b in zip(groups, numbers, effective, bounds, strict=True)]


def choose(log_joint: torch.Tensor, log_proposal: torch.Tensor, ids: Sequence[int], seed: int) -> list[int]:
    """Number of the sample that each snippet keeps, drawn with its weight p(x, z_k) / q(z_k | x).

    `log_joint`, `log_proposal` [snippets, samples], nats. The random number depends on (seed, id) alone.
    """
    uniforms = [np.random.default_rng([seed, number, 0, _CHOICE]).random() for number in ids]
    weights = resampling_weights(log_joint, log_proposal)
    return weights.draw(torch.tensor(uniforms, dtype=torch.float64)).tolist()


def log_proposal(drawn: Rollout) -> float:
    """log q(z | x), nats: what the draws of this rollout had for probabilities, decisions to go on included."""
    return float((drawn.log_probs - drawn.log_allowed).sum())


def text_log_probs(engine: RolloutEngine, texts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Log-probability of every token of each text given those before, float64 `[tokens]`, nats, temperature 1.

    The first token has none and counts 0.
    """
    found: list[np.ndarray] = []
    for start in range(0, len(texts), engine.max_batch):
        part = [text.tolist() for text in texts[start : start + engine.max_batch]]
        rows = [engine.open(text[:1]) for text in part]
        answers = engine.step([Extend(row, text[1:]) for row, text in zip(rows, part, strict=True)])
        for row in rows:
            engine.close(row)
        found += [np.concatenate(([0.0], answer.log_probs)) for answer in answers]
    return found


def line_sums(trajectory: Trajectory, log_probs: np.ndarray) -> np.ndarray:
    """Log-probability of every code line, float64 `[lines]`, nats, from those of the tokens `[tokens]`."""
    sums = np.zeros(trajectory.num_lines)
    for segment in trajectory.segments:
        if segment.kind == Kind.CODE:
            sums[segment.line] = log_probs[segment.start : segment.end].sum()
    return sums
