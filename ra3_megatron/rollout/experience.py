"""From rollouts and line scores to what the update needs: costs, rewards, returns, advantages, line by line."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.decision import Decision
from ra3_megatron.algo.elbo import PriorConfig, latent_cost
from ra3_megatron.algo.returns import ReturnConfig, RewardKind, leave_one_out_advantages, line_rewards, returns
from ra3_megatron.config.ra3 import VariationalConfig
from ra3_megatron.data.latent import ThinkTokens
from ra3_megatron.data.trajectory import Kind, Trajectory, keeps_program
from ra3_megatron.rollout.interleaved import Rollout


@dataclass(frozen=True)
class RewardSettings:
    """What lines earn, and what latents are credited with."""

    reward: RewardKind
    """l_t per token, per line, or per token less what the line has without its own thought."""
    prior: PriorConfig
    """What a thought costs."""
    credit: ReturnConfig
    """From the rewards of lines to the return of a latent."""

    @classmethod
    def of(cls, config: VariationalConfig, whole_block: bool) -> Self:
        """From the configuration; `whole_block` credits every latent with the whole snippet (BRiTE)."""
        credit = ReturnConfig(config.horizon, config.discount)
        if whole_block:
            credit = ReturnConfig(horizon=None, discount=1.0, whole_block=True)
        prior = PriorConfig(config.kl, config.price, config.stay, config.log_latents)
        return cls(config.reward, prior, credit)


@dataclass(frozen=True)
class Member:
    """One rollout of a step's group, on its way to the update."""

    slot: int
    """Number of its snippet among those of the step: members of one slot are a group."""
    expert: Trajectory = field(repr=False)
    """The snippet without thoughts."""
    drawn: Rollout = field(repr=False)
    """As the policy drew it: what is trained on."""
    rollout: Rollout = field(repr=False)
    """The same after the text so far alone, which is scored and shown; `drawn` itself unless that had hindsight."""


@dataclass(frozen=True)
class ScoredRollout:
    """A rollout with the likelihood of the expert's lines under the model that rewards it."""

    slot: int
    """Number of its snippet among those of the step: rollouts of one slot are a group."""
    rollout: Rollout
    line_log_probs: np.ndarray = field(repr=False)
    """float64 [lines]: log p(line | s_t, z_t), summed over the line's tokens, nats: given the latent, so without the
    probability that its first token gives to beginning no thought."""
    without_thought: np.ndarray = field(repr=False)
    """float64 [lines]: the same of a line with a thought, had it none; NaN elsewhere."""
    bare_log_probs: np.ndarray = field(repr=False)
    """float64 [lines]: the same of the text without any thought."""
    log_joint: float
    """log p(x, z) of the whole infused text, prompt left out, nats; NaN where it is not known."""
    drawn: Rollout | None = field(default=None, repr=False)
    """What is trained on, where that is another form of the rollout; none = the rollout itself."""


@dataclass(frozen=True)
class LineTable:
    """Rollouts as tensors [rollouts, lines], float64 on the host, padded on the right; nats are sums over a line."""

    slots: Tensor
    """int64 [rollouts]."""
    lengths: Tensor
    """int64 [rollouts]: number of lines."""
    tokens: Tensor
    """Tokens of each line, 1 in the padding."""
    log_probs: Tensor
    without_thought: Tensor
    """NaN at lines without a thought."""
    bare: Tensor
    """Of the text without any thought."""
    decides: Tensor
    """bool: a thought was offered here."""
    thinks: Tensor
    """bool: there is one."""
    p_think: Tensor
    """1/2 where none was offered."""
    latent: Tensor
    """log q(z_t): of the decision to go on, or of the whole thought."""
    thought_tokens: Tensor
    """Length of the thought, opening and end included."""
    log_joint: Tensor
    """[rollouts]"""

    @property
    def decision(self) -> Decision:
        """Of every line; meaningless where `decides` is false."""
        # Off 0 and 1, where an entropy would be 0 x infinity.
        p = self.p_think.clamp(1e-12, 1 - 1e-12)
        return Decision(p.log(), torch.log1p(-p))

    def cost(self, prior: PriorConfig) -> Tensor:
        """What the latent of each line costs, 0 where there was no decision."""
        return torch.where(self.decides, latent_cost(prior, self.decision, self.thinks, self.latent), 0.0)


@dataclass(frozen=True)
class Experience:
    """A batch of rollouts and what each line of each is worth; everything [rollouts, lines] but the counts."""

    scored: tuple[ScoredRollout, ...]
    table: LineTable
    cost: Tensor
    """KL_t, or the price."""
    rewards: Tensor
    """r_t."""
    bare_rewards: Tensor
    """What the line would earn in the text without any thought, under the same scorer; nothing is paid."""
    returns: Tensor
    """R_t."""
    advantages: Tensor
    """A_t: R_t less the mean of the group's others."""
    broken: int = 0
    """Rollouts left out since their thoughts change the program."""
    alone: int = 0
    """Rollouts left out since no other of their group was left to compare with."""

    def advantages_of(self, index: int) -> np.ndarray:
        """float64 [lines] of one rollout."""
        return self.advantages[index, : int(self.table.lengths[index])].numpy()

    def mean_reward(self, index: int) -> float:
        """Mean reward of the lines of one rollout."""
        return float(self.rewards[index].sum() / self.table.lengths[index])


def whole_programs(members: Sequence[Member], think_tokens: ThinkTokens) -> tuple[list[Member], int, int]:
    """Leave out members whose thoughts change the program, and who is then alone in the slot.

    Returns (those left, number broken, number alone).
    """
    whole = [
        m
        for m in members
        if not m.rollout.thought.any()
        or keeps_program(m.expert, m.rollout.trajectory, think_tokens.tokenizer, think_tokens.format)
    ]
    counts = np.bincount([m.slot for m in whole], minlength=1)
    kept = [m for m in whole if counts[m.slot] > 1]
    return kept, len(members) - len(whole), len(whole) - len(kept)


def line_table(scored: Sequence[ScoredRollout]) -> LineTable:
    """Lay rollouts of different length side by side."""
    lines = max((s.rollout.trajectory.num_lines for s in scored), default=1)
    n = len(scored)
    names = ("log_probs", "without_thought", "bare", "p_think", "latent", "tokens", "thought_tokens")
    fill = {"tokens": 1.0, "without_thought": np.nan, "p_think": 0.5}
    values = {name: np.full((n, lines), fill.get(name, 0.0)) for name in names}
    flags = {name: np.zeros((n, lines), dtype=bool) for name in ("decides", "thinks")}
    for i, s in enumerate(scored):
        r, trajectory = s.rollout, s.rollout.trajectory
        m = trajectory.num_lines
        values["log_probs"][i, :m], values["bare"][i, :m] = s.line_log_probs, s.bare_log_probs
        values["without_thought"][i, :m] = s.without_thought
        for segment in trajectory.segments:
            if segment.kind != Kind.PROMPT:
                name = "tokens" if segment.kind == Kind.CODE else "thought_tokens"
                values[name][i, segment.line] = segment.end - segment.start
        where = np.array([d.line for d in trajectory.decisions], dtype=np.int64)
        flags["decides"][i, where], flags["thinks"][i, where] = True, r.thought
        values["p_think"][i, where] = r.p_think
        owner = trajectory.lines()[r.positions]
        values["latent"][i, :m] = np.bincount(owner, weights=r.log_probs - r.log_allowed, minlength=m)
    return LineTable(
        slots=torch.tensor([s.slot for s in scored], dtype=torch.int64),
        lengths=torch.tensor([s.rollout.trajectory.num_lines for s in scored], dtype=torch.int64),
        log_joint=torch.tensor([s.log_joint for s in scored], dtype=torch.float64),
        **{name: torch.from_numpy(v) for name, v in (values | flags).items()},
    )


def make_experience(
    scored: Sequence[ScoredRollout], settings: RewardSettings, broken: int = 0, alone: int = 0
) -> Experience:
    """Rewards, returns and advantages of scored rollouts; every slot has two rollouts or more (else ValueError)."""
    table = line_table(scored)
    cost = table.cost(settings.prior)
    gains = settings.reward == "gain"
    # A line without a thought gains nothing, so there the two likelihoods are one.
    without = torch.where(table.thinks, table.without_thought, table.log_probs) if gains else None
    rewards = line_rewards(table.log_probs, table.tokens, cost, table.lengths, settings.reward, without)
    bare = line_rewards(
        table.bare, table.tokens, torch.zeros_like(cost), table.lengths, settings.reward, table.bare if gains else None
    )
    credited = returns(rewards, table.lengths, settings.credit)
    groups = torch.unique(table.slots, return_inverse=True)[1]
    advantages = leave_one_out_advantages(credited, groups, table.lengths)
    return Experience(tuple(scored), table, cost, rewards, bare, credited, advantages, broken, alone)
