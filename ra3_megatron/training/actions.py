"""What a loss component can know of every token: the label's log-probability, or that of the policy's action there.

An action of RA3's policy is one of three (section 3 of the algorithm's notes, `algo/decision.py`), after temperature:
a decision to go on, log(1 - p_think); the token that decides for a thought, its log-probability over the whole
vocabulary; a later token of a thought, its log-probability over the ids allowed there.
"""

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.decision import TokenSets, decide, mask_columns
from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.config.errors import UserError
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.data.latent import ThinkTokens

THINK_SET, THOUGHT = "think_set", "thought"
"""Names in `TrainBatch.extras`. `think_set`: 1 + number of the set where the label decides, 0 elsewhere. `thought`: 1
where the label is a sampled token of a thought, the deciding one included, 0 elsewhere."""

ACTION = "policy_gradient"
"""Name in `TrainBatch.weights` of the rows that are actions."""

ROWS = 1024
"""Rows whose probabilities exist at once; bounds memory, 0.6 GB in fp32 at a vocabulary of 152 k."""


@dataclass(frozen=True)
class ActionTable:
    """Which tokens decide for a thought, which may not stand in it, and the temperature that actions are drawn at."""

    sets: TokenSets
    """Row n: ids that decide for a thought in think set n; on the device."""
    forbidden: Tensor
    """int64 [n]: ids that are never drawn inside a thought, those past the tokenizer's own included; on the device."""
    temperature: float
    """Divides the logits; > 0."""

    @classmethod
    def of(
        cls, think_tokens: ThinkTokens, vocab_size: int, temperature: float, device: torch.device | str = "cpu"
    ) -> "ActionTable":
        """The table of all sets that `think_tokens` has by now, for a model of `vocab_size` ids (padding left out).

        Raises UserError when there is no set: nothing could be decided.
        """
        if not len(think_tokens):
            raise UserError("actions of a corpus without any place for a thought; use code with at least two lines")
        beyond = np.arange(think_tokens.tokenizer.vocab_size, vocab_size)
        forbidden = torch.from_numpy(np.concatenate((think_tokens.forbidden_ids, beyond)).astype(np.int64))
        sets = [think_tokens[number].ids for number in range(len(think_tokens))]
        return cls(TokenSets.make(sets, device), forbidden.to(device), temperature)


@dataclass(frozen=True)
class ActionRows:
    """Where a micro-batch has decisions and later tokens of thoughts; found on the host, before the forward pass."""

    decisions: Tensor
    """int64 [decisions]: rows whose label decides."""
    sets: Tensor
    """int64 [decisions]: number of the think set."""
    thinks: Tensor
    """bool [decisions]: whether the label is the first token of a thought."""
    later: Tensor
    """int64 [later]: rows whose label is a sampled token of a thought and not its first."""

    @classmethod
    def find(cls, batch: TrainBatch, table: ActionTable) -> "ActionRows":
        """Rows of `batch`, which must have the extras `think_set` and `thought`.

        Raises KeyError when it lacks one, ValueError when an action is neither a decision nor a sampled token or a set
        is not in the table.
        """
        missing = [name for name in (THINK_SET, THOUGHT) if name not in batch.extras]
        if missing:
            raise KeyError(f"actions need batch.extras {missing}; the batch has {sorted(batch.extras)}")
        numbers = batch.extras[THINK_SET].long() - 1
        sampled = batch.extras[THOUGHT] != 0
        if ACTION in batch.weights and bool(((batch.weights[ACTION] != 0) & (numbers < 0) & ~sampled).any()):
            raise ValueError(f"a row with weight under '{ACTION}' is neither a decision nor a sampled token")
        decisions = (numbers >= 0).nonzero().squeeze(1)
        sets = numbers[decisions]
        if len(sets) and int(sets.max()) >= len(table.sets.ids):
            raise ValueError(
                f"think set {int(sets.max())} of a batch; the action table has {len(table.sets.ids)}; make the table "
                "after all trajectories, with the same think tokens"
            )
        return cls(decisions, sets, sampled[decisions], (sampled & (numbers < 0)).nonzero().squeeze(1))

    def to(self, device: torch.device) -> "ActionRows":
        """The same rows on `device`."""
        return ActionRows(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})


@dataclass(frozen=True)
class TokenScores:
    """What the model says about every label of a micro-batch; NaN where nothing was computed. All [tokens] fp32."""

    log_probs: Tensor
    """Log-probability of the label, nats, at the temperature of the component that reads it:
    `LossComponent.temperature`, or else the engine's `label_temperature`."""
    action_log_probs: Tensor
    """Log-probability of the action after temperature, nats; at rows of decisions and sampled tokens."""
    log_think: Tensor
    """log p_think after temperature; at rows of decisions."""
    log_act: Tensor
    """log(1 - p_think), likewise."""

    def counted(self, counts: Tensor) -> "TokenScores":
        """The same with 0 where `counts` [tokens] is false: a NaN there must not reach a gradient as 0 x NaN."""
        return TokenScores(
            **{
                f.name: torch.where(counts, getattr(self, f.name), torch.zeros((), device=counts.device))
                for f in fields(self)
            }
        )


@dataclass(frozen=True)
class _Part:
    """Some rows of one kind: `decides` or later tokens; `at` [rows] of the logits that were taken, `labels` [rows]."""

    at: slice
    labels: Tensor
    sets: Tensor | None


class _ScoreRows(torch.autograd.Function):
    """Scores of a few rows of the logits; the only memory kept is those rows, in the logits' own type."""

    @staticmethod
    def forward(
        ctx, logits: Tensor, rows: ActionRows, labels: Tensor, table: ActionTable, shard: VocabShard
    ) -> tuple[Tensor, Tensor, Tensor]:
        places = torch.cat((rows.decisions, rows.later))
        chosen = logits.index_select(0, places)
        ctx.save_for_backward(chosen, places)
        ctx.parts, ctx.table, ctx.shard, ctx.shape = _parts(rows, labels[places]), table, shard, logits.shape
        found = [_score(chosen[part.at], part, table, shard) for part in ctx.parts]
        think, act, label = ([f[i] for f in found] for i in range(3))
        none = torch.zeros(0, device=logits.device)
        return torch.cat((none, *think)), torch.cat((none, *act)), torch.cat((none, *label))

    @staticmethod
    def backward(ctx, *grads: Tensor):
        chosen, places = ctx.saved_tensors
        out = chosen.new_zeros(ctx.shape)
        for part in ctx.parts:
            # Computed once more, a part at a time, so that no [rows, vocabulary] in fp32 waits for its backward pass.
            with torch.enable_grad():
                x = chosen[part.at].detach().requires_grad_()
                scores = _score(x, part, ctx.table, ctx.shard)
            wanted = [(s, g[part.at]) for s, g in zip(scores, grads, strict=True) if s.numel()]
            (grad,) = torch.autograd.grad([s for s, _ in wanted], x, [g for _, g in wanted])
            out.index_copy_(0, places[part.at], grad)
        return out, None, None, None, None


def _parts(rows: ActionRows, labels: Tensor) -> list[_Part]:
    count, total = len(rows.decisions), len(labels)
    spans = [slice(i, min(i + ROWS, count)) for i in range(0, count, ROWS)]
    parts = [_Part(s, labels[s], rows.sets[s]) for s in spans]
    return parts + [_Part(slice(i, i + ROWS), labels[i : i + ROWS], None) for i in range(count, total, ROWS)]


def _score(x: Tensor, part: _Part, table: ActionTable, shard: VocabShard) -> tuple[Tensor, Tensor, Tensor]:
    """(log p_think, log(1 - p_think), log-probability of the label); the first two are empty for later tokens."""
    if part.sets is not None:
        decision = decide(x, table.sets, part.sets, shard, table.temperature)
        return decision.log_think, decision.log_act, token_log_probs(x, part.labels, shard, table.temperature)
    allowed = mask_columns(x, table.forbidden, shard)
    none = torch.zeros(0, device=x.device)
    return none, none, token_log_probs(allowed, part.labels, shard, table.temperature, consume=True)


@dataclass(frozen=True)
class ActionScores:
    """Scores at the rows of `ActionRows`, nats after temperature."""

    log_think: Tensor
    """[decisions]"""
    log_act: Tensor
    """[decisions]"""
    log_probs: Tensor
    """[decisions + later]: log-probability of the action at each."""


def score_actions(
    logits: Tensor, rows: ActionRows, labels: Tensor, table: ActionTable, shard: VocabShard
) -> ActionScores:
    """Log-probabilities of the actions of a micro-batch, differentiable in the logits; their rows are copied.

    `logits` [tokens, columns of this process], `labels` [tokens]; `rows`, `table` on their device. Every process of the
    shard's group gets the same.
    """
    think, act, label = _ScoreRows.apply(logits, rows, labels, table, shard)
    count = len(rows.decisions)
    return ActionScores(think, act, torch.cat((torch.where(rows.thinks, label[:count], act), label[count:])))


def scattered(rows: ActionRows, scores: ActionScores, blank: Tensor) -> dict[str, Tensor]:
    """The scores as [tokens] by their names in `TokenScores`, `blank` [tokens] elsewhere."""
    places = torch.cat((rows.decisions, rows.later))
    return {
        "action_log_probs": blank.index_copy(0, places, scores.log_probs),
        "log_think": blank.index_copy(0, rows.decisions, scores.log_think),
        "log_act": blank.index_copy(0, rows.decisions, scores.log_act),
    }
