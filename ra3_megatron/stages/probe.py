"""The probe of an E-step: the same snippets with the same random numbers before and after it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ra3_megatron.parallel.collectives import all_reduce_sum, gather_objects
from ra3_megatron.rollout.experience import Experience, make_experience
from ra3_megatron.rollout.figures import ClusteredMean, clustered_mean
from ra3_megatron.rollout.rationales import rationale_record, write_rationales
from ra3_megatron.stages.policy import Policy
from ra3_megatron.stages.variational_draws import Drawing, Work


@dataclass(frozen=True)
class ProbeOutcome:
    """What a probe found."""

    facts: dict[str, Any]
    """Plain values for the checkpoint: `totals` and `counts` of rewards by snippet."""
    metrics: dict[str, float]
    """By their names in the metrics' schema."""
    work: dict[str, int]
    """What was computed, over all replicas."""
    text: str
    """For the console."""


class Probe:
    """Held-out snippets (of the training part where there are none), rolled out by the policy, written for people."""

    def __init__(self, policy: Policy, work: Work, drawing: Drawing, folder: Path) -> None:
        self.policy, self.drawing, self.folder, self.ids = policy, drawing, folder, work.probe_ids

    def measure(self, when: str, step: int, before: Mapping[str, Any] | None) -> ProbeOutcome | None:
        """Roll out and score with the weights after `step` steps, write `data/rationales-<when>.jsonl`.

        `before`: the facts of the first probe, with which the rise is taken in pairs. None without snippets.
        """
        if not self.ids:
            return None
        policy, parallel = self.policy, self.policy.parallel
        scored_before = policy.scorer.counters.tokens
        probed = self.drawing.probe(step)
        experience = make_experience(policy.score(probed.members), policy.basis.rewards)
        work = [probed.tokens, probed.forward_passes, policy.scorer.counters.tokens - scored_before]
        totals, counts = np.zeros(len(self.ids)), np.zeros(len(self.ids))
        table = experience.table
        for i, scored in enumerate(experience.scored):
            totals[scored.slot] += float(experience.rewards[i].sum())
            counts[scored.slot] += float(table.lengths[i])
        vector = torch.from_numpy(np.concatenate((totals, counts, np.array(work, dtype=np.float64))))
        every = all_reduce_sum(parallel.group("dp"), vector, "figures of the probe").tolist()
        n = len(self.ids)
        facts = {"totals": every[:n], "counts": every[n : 2 * n]}
        self._write(when, experience)
        names = ("rollout_tokens", "forward_passes", "scored_tokens")
        return self._outcome(facts, before, {k: round(v) for k, v in zip(names, every[2 * n :], strict=True)})

    def _write(self, when: str, experience: Experience) -> None:
        think_tokens = self.policy.basis.think_tokens
        records = [
            rationale_record(
                s.rollout,
                s.line_log_probs,
                experience.advantages_of(i),
                think_tokens.tokenizer,
                think_tokens.format,
                self.ids[s.slot],
                experience.mean_reward(i),
            )
            for i, s in enumerate(experience.scored)
        ]
        parallel = self.policy.parallel
        found = gather_objects(parallel.group("dp"), records, "rationales of the probe")
        if parallel.is_main:
            everything = [record for part in found for record in part]
            write_rationales(self.folder / "data" / f"rationales-{when}.jsonl", everything)

    def _outcome(self, facts: dict[str, Any], before: Mapping[str, Any] | None, work: dict[str, int]) -> ProbeOutcome:
        reward = _mean(facts["totals"], facts["counts"])
        metrics = {"probe_reward": reward.mean}
        text = f"probe of {len(self.ids)} snippets: reward {reward.mean:.4f}"
        if before is not None:
            rise = _rise(before, facts)
            metrics |= {"probe_rise": rise.mean, "probe_rise_error": rise.standard_error}
            text += f", rise {rise.mean:+.4f} ± {rise.standard_error:.4f}"
        return ProbeOutcome(facts, metrics, work, text)

    def result(self, before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, float | None]:
        """The stage's result about the probe, None where nothing is known."""
        names = ("probe_reward_before", "probe_reward_after", "probe_rise", "probe_rise_error")
        if before is None or after is None:
            return dict.fromkeys(names)
        rise = _rise(before, after)
        means = (_mean(f["totals"], f["counts"]).mean for f in (before, after))
        values = (*means, rise.mean, rise.standard_error)
        return {name: v if math.isfinite(v) else None for name, v in zip(names, values, strict=True)}


def _mean(totals: list[float], counts: list[float]) -> ClusteredMean:
    values, numbers = (torch.tensor(x, dtype=torch.float64) for x in (totals, counts))
    return clustered_mean(values, numbers, torch.arange(len(totals)))


def _rise(before: Mapping[str, Any], after: Mapping[str, Any]) -> ClusteredMean:
    """Of the mean reward of a line, snippet by snippet: both have the same lines and random numbers."""
    return _mean([a - b for a, b in zip(after["totals"], before["totals"], strict=True)], after["counts"])
