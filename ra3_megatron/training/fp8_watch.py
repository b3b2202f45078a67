"""Watches over FP8 in training: that it really runs, its health, and its loss against BF16's on the same weights."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard, token_log_probs
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.fp8_health import Fp8Health, state_kept
from ra3_megatron.model.precision import in_bf16, require_fp8
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.training.schedule import forward_only


class Fp8Diverged(RuntimeError):
    """The loss in FP8 is further from the loss in BF16, on the same weights and batch, than was allowed."""


class Fp8Watch:
    """Does nothing unless `model.precision` is fp8. All methods are collective over all processes."""

    def __init__(self, model: ModelConfig, chunks: Sequence[Any], parallel: Parallel, vocab: VocabShard) -> None:
        self._model, self._chunks, self._parallel, self._vocab = model, chunks, parallel, vocab
        self._config = unwrap(chunks[0]).config
        self._proved = model.precision != "fp8"

    def _due(self, step: int, interval: int) -> bool:
        return self._model.precision == "fp8" and interval > 0 and (step - 1) % interval == 0

    def _scaled(self, step: int) -> bool:
        """Whether the recipe has its scales: the delayed one has none before the first passes."""
        return step > 1 or self._model.fp8_recipe != "delayed"

    # ---------------------------------------------------------------- health

    @contextmanager
    def watching(self, step: int) -> Iterator[dict[str, float]]:
        """Around the passes of training step `step`; fills the metrics it gives with FP8's health when they are due.

        After the first passes raises Fp8NotInUse unless the layers that should ran in FP8.
        """
        figures: dict[str, float] = {}
        if self._due(step, self._model.fp8_health_interval):
            health = Fp8Health(self._chunks, self._model, self._config.num_layers, self._parallel.device)
            with health.watching():
                yield figures
            figures |= health.figures(self._parallel.world.device_group)
        else:
            yield figures
        if not self._proved:
            line = require_fp8(self._chunks, self._model)
            self._proved = True
            if self._parallel.is_main:
                print(f"step {step}: {line}", flush=True)

    # ---------------------------------------------------------------- FP8 against BF16

    def probe(self, step: int, batches: Sequence[TrainBatch]) -> dict[str, float]:
        """Loss of the first micro-batch in FP8 and in BF16, when it is due; state and random numbers stay as they are.

        The loss is the mean -log-probability, nats at temperature 1, of the labels that count in any component. Raises
        Fp8Diverged beyond `model.fp8_probe_limit`.
        """
        if not self._due(step, self._model.fp8_probe_interval) or not self._scaled(step):
            return {}
        sizes = self._parallel.sizes
        chosen = list(batches[: sizes.pipeline if sizes.virtual_pipeline else 1])
        counts = torch.stack([_counted(b) for b in chosen]).to(self._parallel.device)
        with state_kept(self._chunks, self._parallel.device):
            fp8 = self._log_probs(chosen, f"FP8 probe of step {step}")
            with in_bf16(self._config):
                bf16 = self._log_probs(chosen, f"BF16 probe of step {step}")
        zero = torch.zeros((), dtype=torch.float64, device=self._parallel.device)
        found = torch.stack(
            [
                -fp8.where(counts, zero).sum(),
                -bf16.where(counts, zero).sum(),
                (fp8 - bf16).abs().where(counts, zero).sum(),
                counts.sum().double(),
            ]
        )
        if sizes.data > 1:
            dist.all_reduce(found, group=self._parallel.pg_collection.dp)
        fp8_loss, bf16_loss, gap, tokens = found.tolist()
        if not tokens:
            return {}
        return self._judge(step, fp8_loss / tokens, bf16_loss / tokens, gap / tokens)

    def _judge(self, step: int, fp8: float, bf16: float, gap: float) -> dict[str, float]:
        difference, limit = abs(fp8 - bf16) / max(abs(bf16), 1e-6), self._model.fp8_probe_limit
        if not difference <= limit and math.isfinite(limit):
            raise Fp8Diverged(
                f"step {step}: loss {fp8:.5f} in FP8 ({self._model.fp8_recipe}) and {bf16:.5f} in BF16 on the same "
                f"weights and batch differ by {difference:.2%}, more than model.fp8_probe_limit {limit:.2%}; go on "
                "from an earlier checkpoint with another recipe, more layers in BF16 or model.precision=bf16"
            )
        return {
            "fp8_probe_loss": fp8,
            "fp8_probe_bf16_loss": bf16,
            "fp8_probe_difference": difference,
            "fp8_probe_gap": gap,
        }

    def _log_probs(self, batches: Sequence[TrainBatch], what: str) -> Tensor:
        """Log-probability of every label, nats, float64 [batches, tokens], the same on all ranks of the replica."""
        score = partial(_label_log_probs, self._vocab)
        return forward_only(self._parallel, self._chunks, batches, 1, score, what)[:, 0]


def _label_log_probs(vocab: VocabShard, batch: TrainBatch, logits: Tensor) -> Tensor:
    return token_log_probs(logits, batch.labels, vocab, consume=True).unsqueeze(0)


def _counted(batch: TrainBatch) -> Tensor:
    """Whether a token's label counts in any component, bool [tokens]."""
    counted = torch.zeros(batch.labels.shape, dtype=torch.bool, device=batch.labels.device)
    for weights in batch.weights.values():
        counted |= weights != 0
    return counted
