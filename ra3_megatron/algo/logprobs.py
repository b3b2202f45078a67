"""Log-probabilities and entropy of tokens whose vocabulary is split over a process group.

The full vocabulary is never gathered: each process reduces its own columns and exchanges one number per token.
Columns past the real vocabulary (Megatron pads the embedding) never enter the normaliser.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.algo.logprobs_triton import HAVE_TRITON, row_statistics, write_gradient


@dataclass(frozen=True)
class VocabShard:
    """Which columns of the vocabulary this process holds.

    `start`: index of the first column; `vocab_size`: columns of the real, unpadded vocabulary; `group`: the
    tensor-parallel process group, or None when the whole vocabulary is here.
    """

    start: int
    vocab_size: int
    group: dist.ProcessGroup | None = None

    def valid_columns(self, width: int) -> int:
        """How many of this process's `width` columns belong to the real vocabulary."""
        return max(0, min(width, self.vocab_size - self.start))


def _all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and group.size() > 1:
        dist.all_reduce(x, op, group=group)
    return x


def _shifted(logits: Tensor, shard: VocabShard, temperature: float, consume: bool = False) -> Tensor:
    """fp32 logits over the temperature minus their maximum over the whole vocabulary; padding columns are -inf.

    With `consume` the result may take the place of the logits.
    """
    x = logits.float()
    in_place = consume or x.data_ptr() != logits.data_ptr()
    if temperature != 1.0:
        x, in_place = (x.div_(temperature) if in_place else x / temperature), True
    valid = shard.valid_columns(x.size(-1))
    if valid:
        maximum = x[..., :valid].amax(-1)
    else:
        maximum = torch.full(x.shape[:-1], -torch.inf, dtype=x.dtype, device=x.device)
    _all_reduce(maximum, dist.ReduceOp.MAX, shard.group)
    x = x.sub_(maximum.unsqueeze(-1)) if in_place else x - maximum.unsqueeze(-1)
    if valid < x.size(-1):
        x[..., valid:] = -torch.inf
    return x


class _VocabParallelLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float, consume: bool) -> Tensor:
        x = _shifted(logits, shard, temperature, consume)
        local = labels - shard.start
        mine = (local >= 0) & (local < x.size(-1))
        local = local.clamp(0, x.size(-1) - 1)
        chosen = x.gather(-1, local.unsqueeze(-1)).squeeze(-1).masked_fill(~mine, 0.0)
        weights = x.exp_()
        normaliser = weights.sum(-1)
        if shard.group is not None and shard.group.size() > 1:
            both = torch.stack((chosen, normaliser))
            dist.all_reduce(both, dist.ReduceOp.SUM, group=shard.group)
            chosen, normaliser = both.unbind(0)
        ctx.save_for_backward(weights, normaliser, local, mine)
        ctx.spent = False
        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        return chosen - normaliser.log()

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.spent:
            raise RuntimeError("token_log_probs has no second backward pass: the first one used its memory up")
        ctx.spent = True
        weights, normaliser, local, mine = ctx.saved_tensors
        grad = grad / ctx.temperature
        # In place: [tokens, vocabulary] is the largest tensor of a step, and a second one costs more than the sums.
        out = weights.mul_((-grad / normaliser).unsqueeze(-1))
        out.scatter_add_(-1, local.unsqueeze(-1), (grad * mine).unsqueeze(-1))
        return out.to(ctx.dtype), None, None, None, None


class _FusedLogProbs(torch.autograd.Function):
    """The same on a GPU, in two kernels (`algo/logprobs_triton.py`)."""

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float, consume: bool) -> Tensor:
        valid = shard.valid_columns(logits.size(-1))
        maximum, total, chosen = row_statistics(logits, labels, shard.start, valid, temperature)
        if shard.group is not None and shard.group.size() > 1:
            highest = maximum.clone()
            dist.all_reduce(highest, dist.ReduceOp.MAX, group=shard.group)
            both = torch.stack((chosen, total * (maximum - highest).exp()))
            dist.all_reduce(both, dist.ReduceOp.SUM, group=shard.group)
            (chosen, total), maximum = both.unbind(0), highest
        normaliser = maximum + total.log()
        # Whoever consumes the logits writes its gradient over them, before this one's is computed.
        kept = logits if consume or not ctx.needs_input_grad[0] else logits.clone()
        ctx.save_for_backward(kept, labels, normaliser)
        ctx.shard, ctx.valid, ctx.temperature, ctx.spent = shard, valid, temperature, False
        return chosen - normaliser

    @staticmethod
    def backward(ctx, grad: Tensor):
        if ctx.spent:
            raise RuntimeError("token_log_probs has no second backward pass: the first one used its memory up")
        ctx.spent = True
        logits, labels, normaliser = ctx.saved_tensors
        out = logits.detach()
        write_gradient(logits, out, labels, normaliser, grad.contiguous(), ctx.shard.start, ctx.valid, ctx.temperature)
        return out, None, None, None, None


def _fused(logits: Tensor) -> bool:
    """Whether the kernels take these logits."""
    return HAVE_TRITON and logits.is_cuda and logits.dim() == 2 and logits.stride(1) == 1


class _VocabParallelEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits: Tensor, shard: VocabShard, temperature: float) -> Tensor:
        x = _shifted(logits, shard, temperature)
        weights = x.exp()
        # 0 * -inf is NaN; a column of probability zero adds nothing to the entropy.
        x.masked_fill_(weights == 0, 0.0)
        both = torch.stack((weights.sum(-1), (weights * x).sum(-1)))
        _all_reduce(both, dist.ReduceOp.SUM, shard.group)
        normaliser, weighted = both.unbind(0)
        entropy = normaliser.log() - weighted / normaliser
        ctx.save_for_backward(weights, x, normaliser, entropy)
        ctx.temperature = temperature
        ctx.dtype = logits.dtype
        return entropy

    @staticmethod
    def backward(ctx, grad: Tensor):
        weights, x, normaliser, entropy = ctx.saved_tensors
        # dH/dx_j = -p_j (log p_j + H)
        log_p = x - normaliser.log().unsqueeze(-1)
        out = -(weights / normaliser.unsqueeze(-1)) * (log_p + entropy.unsqueeze(-1))
        return (out * (grad / ctx.temperature).unsqueeze(-1)).to(ctx.dtype), None, None


def token_log_probs(
    logits: Tensor, labels: Tensor, shard: VocabShard, temperature: float = 1.0, *, consume: bool = False
) -> Tensor:
    """Log-probability of each label after dividing the logits by `temperature`, differentiable once.

    On a GPU two kernels read the logits in their own type, and nothing of their size is kept or made beside them.

    `logits` [tokens, columns of this process] in any float type, `labels` [tokens] global ids < `shard.vocab_size`.
    With `consume` the memory of the logits is reused: the caller must not read them again.
    Returns [tokens] fp32, nats, the same on every process of the group.
    """
    function = _FusedLogProbs if _fused(logits) else _VocabParallelLogProbs
    return function.apply(logits, labels, shard, temperature, consume)


def token_entropy(logits: Tensor, shard: VocabShard, temperature: float = 1.0) -> Tensor:
    """Entropy of each token's distribution after dividing the logits by `temperature`, differentiable.

    `logits` [tokens, columns of this process]. Returns [tokens] fp32, nats, the same on every process of the group.
    """
    return _VocabParallelEntropy.apply(logits, shard, temperature)
