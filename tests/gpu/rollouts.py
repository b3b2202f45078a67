"""What the tests of rollouts on a GPU share: models of every precision, engines, sampling, the trainer's log-probs."""

import numpy as np
import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.batch import collate
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, seed_everything
from ra3_megatron.rollout.decode import DecodeRunner
from ra3_megatron.rollout.engine import Extend, Query
from ra3_megatron.rollout.megatron import MegatronEngine
from ra3_megatron.rollout.scoring import score_labels

ARCH = Architecture("qwen2", 4, 256, 8, 2, 64, 512, 1000, True, True, max_positions=1024)

PRECISIONS = {
    "bf16, torch": ModelConfig(precision="bf16", layers="local", vocab_multiple=8, init_std=0.1),
    "bf16, TE": ModelConfig(precision="bf16", layers="te", vocab_multiple=8, init_std=0.1),
} | {
    f"fp8 {recipe}": ModelConfig(precision="fp8", fp8_recipe=recipe, vocab_multiple=8, init_std=0.1)
    for recipe in ("delayed", "tensorwise", "blockwise")
}


def build(model: ModelConfig, parallel: Parallel) -> list[torch.nn.Module]:
    """A model with decided opinions."""
    seed_everything(0, parallel)
    return build_model(ARCH, model, parallel)


def engine_of(chunks, parallel: Parallel, rows: int = 12, tokens: int = 400, graphs: bool = True) -> MegatronEngine:
    """With CUDA graphs, or with their sizes and no graphs."""
    engine = MegatronEngine(chunks, ARCH, parallel, rows, tokens, cuda_graphs=graphs)
    if not graphs:
        engine._decoder = DecodeRunner(engine._forward, engine._sets, engine._vocab, None, rounded=True)
    return engine


def sample(
    engine: MegatronEngine, count: int, tokens: int, seed: int = 0, top_p: float = 1.0
) -> tuple[list[list[int]], np.ndarray]:
    """Texts of `count` rows with prompts of many lengths and `tokens` drawn tokens, and their log-probs."""
    chance, every = np.random.default_rng(seed), engine.token_set(np.arange(ARCH.vocab_size))
    texts = [chance.integers(ARCH.vocab_size, size=n).tolist() for n in chance.integers(1, 150, size=count)]
    rows, found = [engine.open(t) for t in texts], np.zeros((count, tokens))
    for step in range(tokens):
        queries = [Query(0, every, float(u), top_p) for u in chance.random(count)]
        answers = engine.step([Extend(r, (), (q,), append=True) for r, q in zip(rows, queries, strict=True)])
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            text.append(int(answer.drawn[0]))
            found[i, step] = answer.drawn_log_probs[0]
    for row in rows:
        engine.close(row)
    return texts, found


def trainers(chunks, parallel: Parallel, texts: list[list[int]], tokens: int) -> np.ndarray:
    """Log-probs of the last `tokens` of every text by the training engine's forward pass over packed windows."""
    config = config_from_dict({"train": {"steps": 1, "seq_length": 512}})
    found = np.zeros((len(texts), tokens))
    for i, text in enumerate(texts):
        ids = np.array(text, dtype=np.int32)
        sequence = TrainSequence(ids, {"all": np.ones(len(ids), np.float32)}, {})
        batch = collate([[sequence]], config.train.seq_length, 0, 1, ("all",), ())
        (scores,) = score_labels(chunks, ARCH, parallel, [batch], 1.0)
        found[i] = scores[len(ids) - 1 - tokens : len(ids) - 1].cpu().numpy()
    return found
