"""The policy of RLVR: what training and drawing share; the model in training and a frozen reference beside it."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.precision import FP8_MULTIPLES
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.data.packing import TrainSequence
from ra3_megatron.data.sampler import WindowSampler
from ra3_megatron.data.tokenizers import Tokenizer
from ra3_megatron.model.factory import LayerChoice, build_model, choose_layers
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.parallel.phases import phase
from ra3_megatron.rollout.completion import CompletionSettings
from ra3_megatron.rollout.groups import ANSWERS, UNIT, answer_batches, with_log_probs
from ra3_megatron.rollout.scoring import score_labels
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.policy import frozen
from ra3_megatron.stages.rlvr_tasks import RlvrTasks
from ra3_megatron.training.actions import ACTION
from ra3_megatron.training.components import (
    LossComponent,
    policy_gradient_component,
    reference_kl_component,
)
from ra3_megatron.training.engine import StepResult, TrainEngine

_SPEED_ONLY = ("checkpoint_interval", "steps", "eval_interval", "start", "start_arm", "tasks")
"""Settings of `rlvr` that change no answer to a task at given weights, or are known by what they lead to."""


def training_config(config: RunConfig) -> RunConfig:
    """The configuration with RLVR's learning rate: a warm-up, then constant."""
    r = config.rlvr
    settings = replace(
        config.optimizer,
        lr=r.lr,
        min_lr=0.0,
        schedule="constant",
        warmup_steps=r.warmup_steps,
        weight_decay=r.weight_decay,
    )
    return replace(config, optimizer=settings)


def seed_of(seed: int, purpose: str) -> int:
    """Seed of the random numbers for one purpose of a run, 48 bits."""
    return int.from_bytes(hashlib.sha256(f"rlvr {seed} {purpose}".encode()).digest()[:6], "big")


def loss_components(config: RunConfig) -> list[LossComponent]:
    """The policy gradient and, with a coefficient, the divergence from the reference, divided alike."""
    r = config.rlvr
    loss = PolicyLossConfig(
        correction="truncate" if r.correction == "truncate" else "clip",
        clip_low=r.clip_low,
        clip_high=r.clip_high,
        dual_clip=r.dual_clip,
        max_importance_weight=r.max_importance_weight,
    )
    found = [policy_gradient_component(loss, reads="labels")]
    if r.kl_coefficient:
        found.append(reference_kl_component(r.kl_coefficient, r.kl_estimator))
    return [replace(c, normaliser=ANSWERS) for c in found] if r.aggregation == "constant" else found


def shares_prompts(config: RunConfig, layers: LayerChoice) -> bool:
    """Whether a group's answers share their prompt in the update. Raises UserError where that was asked for and cannot
    be.
    """
    wanted = config.rlvr.share_prompts
    if wanted and layers.use_te:
        raise UserError(
            "rlvr.share_prompts is true and the layers are Transformer Engine's, whose attention cannot branch; set it "
            "to false, or model.layers=local"
        )
    return wanted is not False and not layers.use_te


@dataclass(frozen=True)
class Updated:
    """What the updates of one step did."""

    results: tuple[StepResult, ...]
    """Of every minibatch."""
    score_tokens: int
    """Tokens run forward for log-probs of other policies, padding included, on this replica."""
    train_tokens: int
    """Tokens trained on, padding included, on this replica."""
    tokens: int
    """Of prompts and answers, without padding; a prompt counts once for every answer."""
    loss_tokens: int
    """Tokens with a weight, on this replica."""
    score_seconds: float
    """Time the forward passes for log-probs of other policies took."""


class RlvrBasis:
    """What training and drawing have in common, on this process. `weights` None: random weights."""

    def __init__(self, context: Context, tasks: RlvrTasks, tokenizer: Tokenizer, weights: Path | None) -> None:
        self.context, self.tasks, self.tokenizer, self.parallel = context, tasks, tokenizer, context.parallel
        self.config = training_config(context.config)
        self.weights = weights
        r = self.config.rlvr
        # No row is longer than this, and the key-value cache is as long as the longest.
        self.longest_row = tasks.longest_prompt + r.max_tokens
        self.sampling = CompletionSettings(r.max_tokens, r.temperature, stop=r.stop, stop_ids=tasks.stop_ids)

    def blank(self) -> list:
        """The model with random weights, the same at every call."""
        seed_everything(self.config.run.seed, self.parallel)
        return build_model(self.context.architecture, self.config.model, self.parallel)

    def model(self) -> list:
        """The model with the starting weights."""
        chunks = self.blank()
        if self.weights is not None:
            load_weights(self.weights, chunks, self.context.architecture, self.parallel)
        return chunks

    @property
    def own_slots(self) -> range:
        """This replica's share of a step's tasks."""
        own = self.config.rlvr.prompts_per_step // self.parallel.sizes.data
        return range(self.parallel.data_rank * own, (self.parallel.data_rank + 1) * own)

    def sampler(self) -> WindowSampler:
        """Order of the tasks."""
        count, seed = self.config.rlvr.prompts_per_step, seed_of(self.config.run.seed, "order")
        return WindowSampler(len(self.tasks.train), count, seed, self.tasks.fingerprint)

    @property
    def settings(self) -> str:
        """Names what answers depend on besides their place: tasks, starting weights, sampling, training."""
        rlvr = {k: v for k, v in asdict(self.config.rlvr).items() if k not in _SPEED_ONLY}
        start = "random" if self.weights is None else read_done(self.weights)["parameters_sha256"]
        train = {k: getattr(self.config.train, k) for k in ("seq_length",)}
        body = [self.tasks.fingerprint, start, self.config.run.seed, train, rlvr, asdict(self.config.optimizer)]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class RlvrPolicy:
    """What RLVR trains, on this process."""

    def __init__(self, basis: RlvrBasis) -> None:
        self.basis, self.context, self.parallel, self.config = basis, basis.context, basis.parallel, basis.config
        r, architecture = self.config.rlvr, basis.context.architecture
        layers = choose_layers(self.config.model)
        basis.context.say(f"model: {layers.reason}, {self.config.model.precision}, {self.parallel.device}")
        self.share = shares_prompts(self.config, layers)
        components = loss_components(self.config)
        self.engine = TrainEngine(
            self.config,
            architecture,
            self.parallel,
            basis.model(),
            components,
            r.steps * r.minibatches,
            label_temperature=r.temperature,
        )
        self._others: dict[str, Sequence[torch.nn.Module]] = {}
        if r.correction == "decoupled":
            self._others["proximal_log_probs"] = self.engine.chunks
        if r.kl_coefficient:
            self._others["reference_log_probs"] = frozen(basis.model())

    # ---------------------------------------------------------------- updates

    def update(self, parts: Sequence[Sequence[TrainSequence]], first: int) -> Updated:
        """One optimizer update per part (this replica's sequences of a minibatch); `first` is the number of the first.

        Log-probs of the proximal policy are those of the weights before the first of these updates.
        """
        r, train = self.config.rlvr, self.config.train
        multiple = self.context.layout.sequence_multiple
        with phase("data"):
            model = self.config.model
            unit = FP8_MULTIPLES[model.fp8_recipe] if model.precision == "fp8" else UNIT
            minibatches = [answer_batches(part, r, train, self.parallel, multiple, unit) for part in parts]
        scored, start = 0, time.monotonic()
        for name, chunks in self._others.items():
            with phase("score"):
                synchronise_parameters(chunks)
                minibatches = [with_log_probs(m, name, self._score(chunks, m)) for m in minibatches]
            scored += _padded(minibatches)
        seconds = time.monotonic() - start
        results = [self.engine.train_step(m, first + i) for i, m in enumerate(minibatches)]
        sequences = [s for part in parts for s in part]
        return Updated(
            tuple(results),
            score_tokens=scored,
            train_tokens=_padded(minibatches),
            tokens=sum(s.unshared_tokens for s in sequences),
            loss_tokens=sum(int((s.weights[ACTION] != 0).sum()) for s in sequences),
            score_seconds=seconds,
        )

    def _score(self, chunks: Sequence[torch.nn.Module], batches: Sequence[TrainBatch]) -> list[torch.Tensor]:
        architecture, temperature = self.context.architecture, self.config.rlvr.temperature
        return score_labels(chunks, architecture, self.parallel, batches, temperature)


def _padded(minibatches: Sequence[Sequence[TrainBatch]]) -> int:
    return sum(b.input_ids.numel() for m in minibatches for b in m)
