"""Held-out code under the base model and the last checkpoint of every arm, with and without thoughts.

All models see the same snippets of the validation part and the same random numbers; see
`ra3_megatron.evaluation.held_out` for what is measured. One model is in memory at a time, and what was measured of one
is kept: a killed stage goes on with the next.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.files import atomic_write_text
from ra3_megatron.config.ra3 import SPEED_ONLY
from ra3_megatron.data.prepare import PreparedCorpus
from ra3_megatron.evaluation.held_out import (
    FORMS,
    SnippetScore,
    cost,
    difference,
    known,
    score_snippets,
    thinking_figures,
)
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.collectives import gather_objects
from ra3_megatron.parallel.groups import seed_everything
from ra3_megatron.rollout.engine import RolloutEngine
from ra3_megatron.rollout.factory import build_rollout_engine
from ra3_megatron.rollout.interleaved import Rollout, RolloutSettings, SeededUniforms
from ra3_megatron.rollout.rationales import rationale_record, write_rationales
from ra3_megatron.rollout.scoring import LineScorer
from ra3_megatron.stages.context import Context
from ra3_megatron.stages.run_folder import StageFolder, new_attempt

MEASURED_FILE = "measured.json"
BASE = "base"
"""The base model's name among the arms'."""

WHAT = (
    "Cross-entropy on the code tokens of the same held-out snippets for every arm, nats per token; comment tokens are "
    "never counted. Bare: the text without thoughts. Own thoughts: the model thinks between the lines, from the text "
    "so far alone; the mean over samples is an upper bound of what the code costs the model that thinks, and the "
    "multi-sample form a closer one."
)
METHOD = (
    f"{WHAT} 95 % intervals: studentised bootstrap over documents. p-values: paired sign flips "
    "over documents, two-sided, not corrected for the number of comparisons. Both are over documents for one training "
    "run each: ra3 compare repeats the training with other seeds."
)

_VERSION = 1
"""Raised when the same model would be measured otherwise, so that finished measurements are made again."""

_SELECTION = 20250925
"""Seed of the choice of snippets: the same in every run on a corpus, whatever `run.seed`."""


@dataclass(frozen=True)
class ArmOutcome:
    """What became of an arm."""

    weights: Path
    """Its last checkpoint."""
    flops: float
    """Floating-point operations of all its stages."""
    raw_tokens: int
    """Code tokens it was trained on, those of every pass counted, thoughts left out."""
    seconds: float
    """Time of all its stages."""
    thinks: bool
    """Whether it was trained on thoughts."""


@dataclass(frozen=True)
class MeasureInputs:
    """What is measured, and on what."""

    corpus: PreparedCorpus
    """Snippets without thoughts; the validation part is used."""
    arms: Mapping[str, ArmOutcome]
    """By arm, in the order of the report."""
    base: Path | None
    """Checkpoint that all arms began with; none = random weights, which are not measured."""


def run_measure(context: Context, stage: StageFolder, inputs: MeasureInputs) -> dict[str, Any]:
    """Measure the base model and every arm, those already measured left out; returns the stage's result.

    Writes `measured.json` and `data/rationales-<arm>.jsonl`. Result: `measured` (its place), `snippets`, `bare` and
    `thinking` (nats per token by arm), `seconds`. Raises UserError without held-out snippets.
    """
    if stage.done:
        return context.on_main(f"result of {stage.path.name}", stage.result)
    start = time.monotonic()
    context.on_main("log folder", lambda: new_attempt(stage) and None)
    job = _Job(context, stage, inputs)
    models = {BASE: inputs.base} if inputs.base is not None else {}
    models |= {arm: outcome.weights for arm, outcome in inputs.arms.items()}
    for name, weights in models.items():
        job.measure(name, weights)

    def finish() -> dict[str, Any]:
        scores = {name: job.finished(name, weights) or [] for name, weights in models.items()}
        measured = compare_arms(scores, inputs.arms, context.config.variational.figure_discount)
        atomic_write_text(stage.path / MEASURED_FILE, json.dumps(measured, indent=1, allow_nan=False))
        context.say(measured_table(measured))
        figures = {**({BASE: measured["base"]} if measured["base"] else {}), **measured["arms"]}
        result = {form: {n: f[form]["nats_per_token"] for n, f in figures.items()} for form in ("bare", "thinking")}
        seconds = time.monotonic() - start
        stage.finish({**result, "measured": MEASURED_FILE, "snippets": measured["snippets"], "seconds": seconds})
        return stage.result()

    return context.on_main("end of the measurement", finish)


class _Job:
    """One replica's share of the snippets, and the model that is in memory."""

    def __init__(self, context: Context, stage: StageFolder, inputs: MeasureInputs) -> None:
        self.context, self.stage, self.corpus = context, stage, inputs.corpus
        c, store = context.config, inputs.corpus.validation
        if not len(store):
            raise UserError(
                f"nothing to measure on: the validation part of {inputs.corpus.folder} is empty; raise "
                "data.validation_fraction, or give the corpus more documents"
            )
        self.ids = choose_snippets(len(store), c.measure.snippets)
        if len(self.ids) < c.measure.snippets:
            context.say(
                f"measure.snippets = {c.measure.snippets}; the validation part has {len(self.ids)}: all are used"
            )
        # Long ones are dealt out first, so that the replicas have about as much to do.
        dealt = sorted(self.ids, key=lambda i: -int(store.lengths[i]))
        self.mine = sorted(dealt[context.parallel.data_rank :: context.parallel.sizes.data])
        self.max_tokens = c.train.seq_length - (inputs.corpus.tokenizer.eos_id is not None)
        self.settings = RolloutSettings(c.latent.temperature, c.latent.max_latent_tokens, c.latent.chunk_tokens)
        digest = hashlib.sha256(f"measure {c.run.seed}".encode()).digest()
        self.seed = int.from_bytes(digest[:6], "big")

    @cached_property
    def chunks(self) -> list[Any]:
        """The model, filled with one checkpoint after the other."""
        seed_everything(self.context.config.run.seed, self.context.parallel)
        return build_model(self.context.architecture, self.context.config.model, self.context.parallel)

    @cached_property
    def engine(self) -> RolloutEngine:
        """Samples from `chunks`; told of every new checkpoint."""
        c = self.context
        return build_rollout_engine(c.config, self.chunks, c.architecture, c.parallel, self.max_tokens)

    def measure(self, name: str, weights: Path) -> None:
        """Score the snippets under one checkpoint, unless that was done."""
        context, parallel = self.context, self.context.parallel
        if context.on_main(f"measurement of {name}", lambda: self.finished(name, weights) is not None):
            return
        context.say(f"measuring {name} on {len(self.ids)} held-out snippets ...")
        parallel.mark(f"measuring {name}")
        load_weights(weights, self.chunks, context.architecture, parallel)
        c = context.config
        self.engine.weights_version += 1
        scores, drawn = score_snippets(
            LineScorer(self.chunks, context.architecture, parallel, c, self.corpus.think_tokens),
            self.engine,
            [self.corpus.validation[i] for i in self.mine],
            self.mine,
            c.measure.samples,
            SeededUniforms(self.seed, self.mine),
            self.settings,
            self.corpus.think_tokens,
        )
        share = ([asdict(s) for s in scores], [self._record(r) for r in drawn])
        shares = gather_objects(parallel.group("dp"), share, f"scores of {name}", c.parallel.setup_timeout_s)

        def write() -> None:
            records = sorted((r for _, own in shares for r in own), key=lambda r: (r["snippet"], r["member"]))
            found = sorted((s for own, _ in shares for s in own), key=lambda s: s["snippet"])
            write_rationales(self.stage.path / "data" / f"rationales-{name}.jsonl", records)
            content = {"key": self._key(weights), "scores": found}
            atomic_write_text(self._file(name), json.dumps(content, allow_nan=False))

        context.on_main(f"scores of {name}", write)

    def _record(self, drawn: Rollout) -> dict[str, Any]:
        """A rollout for people; without a reward, since no price is known here."""
        tokenizer, latent = self.corpus.tokenizer, self.corpus.think_tokens.format
        number = self.mine[drawn.number]
        return rationale_record(drawn, drawn.line_log_probs, None, tokenizer, latent, number, None)

    def finished(self, name: str, weights: Path) -> list[SnippetScore] | None:
        """Scores of a model that was measured before in the same way; None when it was not."""
        path = self._file(name)
        if not path.is_file():
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["key"] != self._key(weights):
            return None
        return [SnippetScore.from_json(s) for s in content["scores"]]

    def _file(self, name: str) -> Path:
        return self.stage.path / "data" / f"scores-{name}.json"

    def _key(self, weights: Path) -> str:
        """Names everything the scores depend on, beyond rounding."""
        c, parameters = self.context.config, read_done(weights)["parameters_sha256"]
        latent = {k: v for k, v in vars(c.latent).items() if k not in SPEED_ONLY}
        body = [_VERSION, parameters, self.corpus.validation.fingerprint, self.ids, c.measure.samples, self.seed]
        body += [latent, self.max_tokens, c.model.precision]
        return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def choose_snippets(count: int, wanted: int) -> list[int]:
    """Numbers of `wanted` of `count` snippets (all when there are fewer), rising; the same choice at every call."""
    return sorted(np.random.default_rng(_SELECTION).permutation(count)[:wanted].tolist())


# -------------------------------------------------------------------------------------------------- figures


def compare_arms(
    scores: Mapping[str, list[SnippetScore]], arms: Mapping[str, ArmOutcome], discount: float
) -> dict[str, Any]:
    """The content of `measured.json` from the scores of the arms and, if measured, of `base`.

    `paired` has the difference of each arm to `ntp`, and of `ntp` to the base model; to the base model for all where
    there is no arm `ntp`. `thinking_against_bare` is the arm with thoughts less the other without.
    """
    figures = {name: _figures(own, discount) for name, own in scores.items()}
    paired: dict[str, Any] = {}
    for arm in arms:
        other = "ntp" if "ntp" in arms and arm != "ntp" else BASE
        if other not in scores:
            continue
        entry = {form: _difference(scores, arm, other, form, form) for form in FORMS}
        entry["thinking_against_bare"] = _difference(scores, arm, other, "thinking", "bare")
        paired[arm] = entry
    return {
        "arms": {arm: {**figures[arm], **_outcome(outcome)} for arm, outcome in arms.items()},
        "base": figures.get(BASE),
        "paired": paired,
        "snippets": len(next(iter(scores.values()))),
        "documents": len({s.document or s.snippet for s in next(iter(scores.values()))}),
        "what": WHAT,
        "method": METHOD,
    }


def _figures(scores: list[SnippetScore], discount: float) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for form in FORMS:
        found = cost(scores, form)
        figures[form] = {"nats_per_token": found.value, "low": known(found.low), "high": known(found.high)}
        figures[form]["tokens"] = sum(s.tokens for s in scores)
    return {**figures, **thinking_figures(scores, discount), "samples": len(scores[0].samples)}


def _outcome(outcome: ArmOutcome) -> dict[str, Any]:
    return {k: v for k, v in asdict(outcome).items() if k != "weights"}


def _difference(
    scores: Mapping[str, list[SnippetScore]], arm: str, other: str, form: str, other_form: str
) -> dict[str, Any]:
    found = difference(scores[arm], scores[other], form, other_form)
    values = {"difference": found.value, "low": found.low, "high": found.high, "p_value": found.p_value}
    return {"against": other, **{name: known(value) for name, value in values.items()}}


def measured_table(measured: Mapping[str, Any]) -> str:
    """The table that the stage prints."""
    return "\n".join(_table_lines(measured))


def _table_lines(measured: Mapping[str, Any]) -> Iterator[str]:
    rows = [(BASE, measured["base"])] if measured["base"] else []
    rows += measured["arms"].items()
    yield ""
    yield f"held-out code, {measured['snippets']} snippets: nats per code token, 95 % intervals over documents"
    yield f"  {'arm':<14}{'bare':<26}{'with own thoughts':<26}{'think rate':>10}"
    for name, f in rows:
        cells = "".join(f"{_cell(f[form]):<26}" for form in ("bare", "thinking"))
        yield f"  {name:<14}{cells}{_number(f['think_rate'], '.1%'):>10}"
    for arm, entry in measured["paired"].items():
        for form, name in (("bare", "bare"), ("thinking", "thoughts"), ("thinking_against_bare", "thoughts - bare")):
            d = entry[form]
            ends = f"[{_number(d['low'], '+.4f')}, {_number(d['high'], '+.4f')}]"
            pair = f"{arm} - {d['against']}, {name}:"
            yield f"  {pair:<40} {d['difference']:+.4f} {ends}, p {_number(d['p_value'], '.4f')}"


def _cell(figure: Mapping[str, Any]) -> str:
    ends = f"[{_number(figure['low'], '.4f')}, {_number(figure['high'], '.4f')}]"
    return f"{figure['nats_per_token']:.4f} {ends}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
