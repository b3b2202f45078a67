"""What one rank does in the test of decisions with a split vocabulary. Needs torch alone, so that it starts fast."""

import os

import torch
import torch.distributed as dist

from ra3_megatron.algo.decision import TokenSets, decide, mask_columns
from ra3_megatron.algo.logprobs import VocabShard, token_log_probs

VOCAB, WIDTH, TEMPERATURE = 5, 3, 0.7
SETS, WHICH = [[1, 3], [4]], [0, 1, 1, 0]
BANNED, LABELS = [0, 3], [1, 2, 4, 4]


def full_logits(world: int) -> torch.Tensor:
    """[4, WIDTH * world]: with three ranks the second holds a column of padding and the third nothing else."""
    return torch.randn(4, WIDTH * world, generator=torch.Generator().manual_seed(0)) * 3


def weights() -> torch.Tensor:
    """[4] weights of log p_think in the loss; their squares are those of log p_act."""
    return torch.linspace(-1, 1, 4)


def work() -> dict[str, list]:
    """Decisions, their gradient in the local columns, and scores with masked columns."""
    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    local = full_logits(world)[:, WIDTH * rank : WIDTH * (rank + 1)].clone().requires_grad_()
    shard = VocabShard(WIDTH * rank, VOCAB, dist.group.WORLD)
    decision = decide(local, TokenSets.make(SETS), torch.tensor(WHICH), shard, TEMPERATURE)
    (decision.log_think * weights() + decision.log_act * weights().square()).sum().backward()
    masked = mask_columns(local.detach(), torch.tensor(BANNED), shard)
    scores = token_log_probs(masked, torch.tensor(LABELS), shard)
    dist.destroy_process_group()
    results = {"think": decision.log_think, "act": decision.log_act, "grad": local.grad, "scores": scores}
    return {name: x.detach().tolist() for name, x in results.items()}
