"""The policy of an E-step: what training and drawing share; the model in training and the scorer beside it."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ra3_megatron.algo.losses import PolicyLossConfig
from ra3_megatron.checkpoint.capture import synchronise_parameters
from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.ra3 import SPEED_ONLY
from ra3_megatron.config.run import RunConfig
from ra3_megatron.data.prepare import PreparedCorpus
from ra3_megatron.data.sampler import WindowSampler
from ra3_megatron.model.factory import build_model, choose_layers
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.rollout.experience import Member, RewardSettings, ScoredRollout
from ra3_megatron.rollout.interleaved import SeededUniforms
from ra3_megatron.rollout.judging import score_members
from ra3_megatron.rollout.scoring import LineScorer
from ra3_megatron.rollout.source import Sampling
from ra3_megatron.stages.context import Context
from ra3_megatron.training.actions import ActionTable
from ra3_megatron.training.components import decision_kl_component, policy_gradient_component
from ra3_megatron.training.engine import TrainEngine


def training_config(config: RunConfig) -> RunConfig:
    """The configuration with the E-step's learning rate: a warm-up, then constant."""
    v = config.variational
    settings = replace(config.optimizer, lr=v.lr, min_lr=0.0, schedule="constant", warmup_steps=v.warmup_steps)
    return replace(config, optimizer=settings)


def seed_of(seed: int, purpose: str) -> int:
    """Seed of the random numbers for one purpose of a run, 48 bits."""
    return int.from_bytes(hashlib.sha256(f"variational {seed} {purpose}".encode()).digest()[:6], "big")


class Basis:
    """What training and drawing have in common, on this process. `weights` None: random weights."""

    def __init__(self, context: Context, corpus: PreparedCorpus, weights: Path | None, whole_block: bool) -> None:
        self.context, self.corpus, self.parallel, self.weights = context, corpus, context.parallel, weights
        self.config = training_config(context.config)
        v = self.config.variational
        self.think_tokens = corpus.think_tokens
        self.rewards = RewardSettings.of(v, whole_block)
        self.least_gain = v.price if v.kl == "constant" and v.reward != "sum" else 0.0
        self.sampling = Sampling.of(self.config.latent, self.think_tokens)
        self.max_tokens = self.config.train.seq_length - (corpus.tokenizer.eos_id is not None)

    def blank(self) -> list:
        """The model with random weights, the same at every call."""
        seed_everything(self.config.run.seed, self.parallel)
        return build_model(self.context.architecture, self.config.model, self.parallel)

    def model(self) -> list:
        """The model with the round's starting weights."""
        chunks = self.blank()
        if self.weights is not None:
            load_weights(self.weights, chunks, self.context.architecture, self.parallel)
        return chunks

    @property
    def own_slots(self) -> slice:
        """This replica's share of a step's snippets."""
        own = self.config.variational.snippets_per_step // self.parallel.sizes.data
        return slice(self.parallel.data_rank * own, (self.parallel.data_rank + 1) * own)

    def sampler(self, em_round: int) -> WindowSampler:
        """Order of the training part's snippets in a round."""
        train, count = self.corpus.train, self.config.variational.snippets_per_step
        seed = seed_of(self.config.run.seed, f"order {em_round}")
        return WindowSampler(len(train), count, seed, train.fingerprint)

    def uniforms(self, purpose: str, places: Sequence[int]) -> SeededUniforms:
        """Random numbers of rollouts by what they are for and the number of the place."""
        return SeededUniforms(seed_of(self.config.run.seed, purpose), places)

    def settings(self, em_round: int) -> str:
        """Names what rollouts depend on besides their place: data, starting weights, sampling, training."""
        latent = {k: v for k, v in vars(self.config.latent).items() if k not in SPEED_ONLY}
        start = "random" if self.weights is None else read_done(self.weights)["parameters_sha256"]
        train = self.config.train.seq_length
        body = [em_round, self.corpus.fingerprint, start, self.config.run.seed, train, latent]
        body += [vars(self.config.variational), vars(self.config.optimizer), self.rewards.credit.whole_block]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Policy:
    """What an E-step trains and scores with, on this process. The frozen scorer is a second copy of the model."""

    def __init__(self, basis: Basis) -> None:
        self.basis, self.parallel, self.config = basis, basis.parallel, basis.config
        v = self.config.variational
        self._reads_past_thoughts = v.reward == "gain"
        self._frozen = v.scorer == "frozen"
        self.engine = self._trained()
        chunks = frozen(basis.model()) if self._frozen else self.engine.chunks
        self.scorer = LineScorer(chunks, basis.context.architecture, self.parallel, self.config, basis.think_tokens)

    def _trained(self) -> TrainEngine:
        v, latent, context = self.config.variational, self.config.latent, self.basis.context
        architecture, device = context.architecture, self.parallel.device
        context.say(f"model: {choose_layers(self.config.model).reason}, {self.config.model.precision}, {device}")
        loss = PolicyLossConfig(
            correction=v.correction,
            clip_low=v.clip_low,
            clip_high=v.clip_high,
            max_importance_weight=v.max_importance_weight,
        )
        components = [policy_gradient_component(loss)]
        if v.kl == "bernoulli":
            components.append(decision_kl_component(v.stay))
        table = ActionTable.of(self.basis.think_tokens, architecture.vocab_size, latent.temperature, device)
        return TrainEngine(self.config, architecture, self.parallel, self.basis.model(), components, v.steps, table)

    def score(self, members: Sequence[Member]) -> list[ScoredRollout]:
        """Likelihood of the lines of this replica's rollouts under the model that rewards."""
        if not self._frozen:
            synchronise_parameters(self.engine.chunks)
        return score_members(self.scorer, members, self._frozen, self._reads_past_thoughts)


def frozen(chunks: list) -> list:
    """The chunks, not to be trained."""
    for chunk in chunks:
        chunk.requires_grad_(False)
    return chunks
