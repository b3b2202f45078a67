"""Probability of the latent z_t: the decision for or against a thought, and the thought itself.

At a decision point some tokens of the vocabulary, V_think, begin a thought and all others do not. With p_think the
probability of V_think, log q(act) = log(1 - p_think), and log q(thought) is the sum over its tokens up to and including
the one that closes it. Everything is after the temperature that the tokens were sampled at.

q is a proper distribution over z_t when the sampler keeps three rules, and the scores here follow them:
the first token is drawn from the whole vocabulary; later tokens are drawn among the allowed ones (`mask_columns` before
drawing and before scoring); tokens that are forced (the completion of an opener, the end of a thought that reached its
maximum length, a closing tag) have log-probability zero and are left out of the sum.

A think set may hold an opener: a token that is only the first part of the opening. Two readings are offered. With the
opener in the set and the rest of the opening forced, one forward pass decides (`ThinkSet.forced_after` of the data
package is made for this). With the opener outside of the set, the token after it decides as well: the caller runs the
model once more on context + opener, also where no thought is drawn, and joins both with `two_step_decision`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard, _all_reduce, token_log_probs


@dataclass(frozen=True)
class TokenSets:
    """Several sets of token ids, one row each: `ids` [sets, widest], int64, filled up with -1."""

    ids: Tensor

    @staticmethod
    def make(sets: Sequence[Any], device: torch.device | str = "cpu") -> "TokenSets":
        """Pad the sets, each a list or an array of ids, to one tensor.

        Raises ValueError for an empty set, a negative id or an id given twice.
        """
        rows = [torch.as_tensor(ids, dtype=torch.int64) for ids in sets]
        for number, ids in enumerate(rows):
            if ids.numel() == 0 or int(ids.min()) < 0 or ids.unique().numel() != ids.numel():
                raise ValueError(
                    f"token set {number} is empty, or has negative or repeated ids; give distinct ids >= 0"
                )
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        return TokenSets(padded.to(device))


@dataclass(frozen=True)
class Decision:
    """Log-probability of both outcomes at each decision point, nats."""

    log_think: Tensor
    """[decisions] log p_think, the probability that a thought begins."""
    log_act: Tensor
    """[decisions] log(1 - p_think) = log q(act)."""

    @property
    def p_think(self) -> Tensor:
        """[decisions] probability of a thought."""
        return self.log_think.exp()

    def entropy(self) -> Tensor:
        """[decisions] entropy of think or act, nats, between 0 and log 2."""
        return -(self.p_think * self.log_think + self.log_act.exp() * self.log_act)

    def draw(self, uniform: Tensor) -> Tensor:
        """[decisions] bool: think where `uniform` [decisions] in [0, 1) lies below p_think."""
        return uniform.to(self.log_think) < self.p_think

    def then(self, second: "Decision") -> "Decision":
        """Think only if this decision and the `second` one, taken after it, are both for a thought."""
        return Decision(
            self.log_think + second.log_think, torch.logaddexp(self.log_act, self.log_think + second.log_act)
        )


class _SplitMass(torch.autograd.Function):
    """Log of the summed exponentials of the columns inside and outside of a set, [decisions] each."""

    @staticmethod
    def forward(ctx, logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float) -> tuple[Tensor, Tensor]:
        width = logits.size(-1)
        local = ids - shard.start
        mine = (ids >= 0) & (local >= 0) & (local < shard.valid_columns(width))
        # One column more takes the ids of other processes, so that no count has to be read back from the device.
        inside = torch.zeros(ids.size(0), width + 1, dtype=torch.bool, device=logits.device)
        inside.scatter_(-1, local.masked_fill(~mine, width), True)
        inside = inside[:, :width]
        local = local.clamp(0, width - 1).expand(logits.size(0), -1)
        mine = mine.expand(logits.size(0), -1)

        x = logits.to(torch.float32, copy=True).div_(temperature)
        chosen = x.gather(-1, local).masked_fill(~mine, -torch.inf)
        x = x.masked_fill_(inside, -torch.inf)
        x[:, shard.valid_columns(width) :] = -torch.inf
        # Each side has its own maximum: the smaller one keeps its digits however far it lies below the other.
        maxima = torch.stack((chosen.amax(-1), x.amax(-1)))
        _all_reduce(maxima, torch.distributed.ReduceOp.MAX, shard.group)
        chosen = chosen.sub_(maxima[0].unsqueeze(-1)).exp_()
        x = x.sub_(maxima[1].unsqueeze(-1)).exp_()
        sums = torch.stack((chosen.sum(-1), x.sum(-1)))
        _all_reduce(sums, torch.distributed.ReduceOp.SUM, shard.group)
        ctx.save_for_backward(chosen, x, sums, local)
        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        masses = maxima + sums.log()
        return masses[0], masses[1]

    @staticmethod
    def backward(ctx, grad_inside: Tensor, grad_outside: Tensor):
        chosen, x, sums, local = ctx.saved_tensors
        scale = torch.stack((grad_inside, grad_outside)) / (sums * ctx.temperature)
        out = x * scale[1].unsqueeze(-1)
        out.scatter_add_(-1, local, chosen * scale[0].unsqueeze(-1))
        return out.to(ctx.dtype), None, None, None


def decide(logits: Tensor, sets: TokenSets, which: Tensor, shard: VocabShard, temperature: float = 1.0) -> Decision:
    """Probability of a thought at each decision point, differentiable in the logits.

    `logits` [decisions, columns of this process] in any float type; `which` [decisions] int64 rows of `sets`, whose ids
    may be spread over the shards but must leave some token of the vocabulary out. The mass of the other tokens is
    summed by itself, so log(1 - p_think) has all its digits where p_think is almost 1. One exchange of two numbers per
    decision, twice. Returns fp32, the same on every process of the group.
    """
    inside, outside = _SplitMass.apply(logits, sets.ids[which], shard, temperature)
    return Decision(F.logsigmoid(inside - outside), F.logsigmoid(outside - inside))


def two_step_decision(
    logits: Tensor,
    sets: TokenSets,
    which: Tensor,
    opener: Tensor,
    second: Decision,
    shard: VocabShard,
    temperature: float = 1.0,
) -> Decision:
    """Decision where one token leaves it open: p_think = p(V_think) + p(opener) p(completion | opener).

    `logits`, `which` as in `decide`, `sets` without the openers; `opener` [decisions] int64 ids; `second` the decision
    for the completion, from the logits after context + opener (`decide` with the sets {completion}, joined with `then`
    when the completion has several tokens). Rows without an opener do not belong here.
    """
    think = decide(logits, sets, which, shard, temperature).log_think
    both = torch.cat((sets.ids[which], opener.unsqueeze(-1)), -1)
    inside, outside = _SplitMass.apply(logits, both, shard, temperature)
    opened = token_log_probs(logits, opener, shard, temperature)
    return Decision(
        torch.logaddexp(think, opened + second.log_think),
        torch.logaddexp(F.logsigmoid(outside - inside), opened + second.log_act),
    )


def mask_columns(logits: Tensor, ids: Tensor, shard: VocabShard) -> Tensor:
    """The logits with the columns of the tokens `ids` [n] int64 at minus infinity: these tokens cannot be drawn.

    `logits` [tokens, columns of this process]. What is drawn from and scored with the result is renormalised over
    the tokens that are left.
    """
    width = logits.size(-1)
    local = ids - shard.start
    banned = torch.zeros(width + 1, dtype=torch.bool, device=logits.device)
    banned[local.masked_fill((local < 0) | (local >= width), width)] = True
    return logits.masked_fill(banned[:width], -torch.inf)


def latent_log_probs(decision: Decision, thinks: Tensor, token_log_probs: Tensor, owner: Tensor) -> Tensor:
    """log q(z_t) of every decision point, nats: log q(act), or the sum over the tokens of the thought.

    `thinks` [decisions] bool; `token_log_probs` [tokens] of the sampled thought tokens, the first and the closing one
    included; `owner` [tokens] int64, the decision each token belongs to. Returns [decisions]. Raises ValueError when a
    thought has no token or a decision to act has one.
    """
    has_tokens = torch.zeros_like(thinks).index_fill_(0, owner, True)
    if not torch.equal(has_tokens, thinks):
        raise ValueError("thought tokens and decisions disagree; every thought needs its tokens and no other line any")
    start = torch.where(thinks, torch.zeros_like(decision.log_act), decision.log_act)
    return start.index_add(0, owner, token_log_probs.to(start.dtype))
