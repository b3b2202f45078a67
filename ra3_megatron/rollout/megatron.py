"""The rollout engine on the training model itself: Megatron-Core chunks, a KV cache, tensor and pipeline parallelism.

The model that trains is the model that samples, so log-probabilities agree up to rounding and no weights are copied.
Every process of a model replica holds the same list of rows and makes the same calls; the last pipeline stage answers
and tells the others. A row's last token stays out of the cache until its successor is wanted: what follows it is then
predicted in the same pass that scores the next forced tokens, and a rollback costs one token.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.estimate import cache_length
from ra3_megatron.config.experts import refuse_shared_sampling
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.decode import GAPS, DecodeBatch, DecodeRunner
from ra3_megatron.rollout.engine import Answer, EngineCounters, Extend
from ra3_megatron.rollout.forward import Forward
from ra3_megatron.rollout.graphs import GraphStore, use_graphs
from ra3_megatron.rollout.layout import SPARSE, Run
from ra3_megatron.rollout.passes import ANSWERS, LOGIT_ROWS, Pass, run_pass
from ra3_megatron.rollout.sampling import LocalSet
from ra3_megatron.training.schedule import vocabulary_shard

log = logging.getLogger(__name__)

NOTHING = np.zeros(0)


@dataclass
class _Row:
    slot: int
    ids: list[int]
    cached: int = 0


class MegatronEngine:
    """See `RolloutEngine`. `chunks` are the model's chunks, wrapped or not; after each call they are as before, but
    in evaluation mode.

    Memory: `max_batch` x (`max_tokens` + 1) keys and values per layer, see `cache_bytes`. A `step` with more than
    `tokens_per_forward` new tokens is cut into several forward passes. One in which every row goes on by a token and
    asks the same is a decode pass (`DecodeRunner`); `cuda_graphs` says whether these are captured: None = where it is
    possible, True (a UserError where it is not), False.
    After the weights change, set `weights_version`; it is refused while rows are open.
    """

    def __init__(
        self,
        chunks: Sequence[torch.nn.Module],
        architecture: Architecture,
        parallel: Parallel,
        max_batch: int,
        max_tokens: int,
        tokens_per_forward: int = 8192,
        weights_version: int = 0,
        cuda_graphs: bool | None = None,
    ) -> None:
        if parallel.sizes.context > 1:
            raise UserError(
                f"rollouts with context parallelism {parallel.sizes.context}; the engine's cache is not split along "
                "the sequence; set parallel.context to 1 for this stage"
            )
        refuse_shared_sampling(parallel.sizes, "a rollout engine")
        if max_tokens > architecture.max_positions:
            raise UserError(
                f"rollouts of {max_tokens} tokens; the model has {architecture.max_positions} positions; "
                "lower the number of tokens"
            )
        if min(max_batch, max_tokens, tokens_per_forward) < 1:
            raise UserError(
                f"an engine of {max_batch} rows of {max_tokens} tokens, {tokens_per_forward} per forward pass; "
                "found a number below 1; raise it"
            )
        self.max_batch = max_batch
        self.max_tokens = max_tokens
        self.counters = EngineCounters()
        self._tokens_per_forward = tokens_per_forward
        self._version = weights_version
        self._forward = Forward(chunks, parallel, max_batch, cache_length(max_tokens))
        self._parallel = parallel
        self._rows: dict[int, _Row] = {}
        self._free = list(range(max_batch - 1, -1, -1))
        self._next_row = 0
        self._columns = unwrap(chunks[-1]).vocab_size // parallel.sizes.tensor
        self._vocab = vocabulary_shard(chunks, architecture, parallel)
        self._sets: list[LocalSet] = []
        self._set_numbers: dict[bytes, int] = {}
        captured, how = use_graphs(cuda_graphs, parallel, self._forward.config, chunks)
        graphs = GraphStore(self._forward, cuda_graphs is True) if captured else None
        self._decoder = DecodeRunner(self._forward, self._sets, self._vocab, graphs, rounded=captured)
        self.description = (
            f"rollouts: {max_batch} rows of {max_tokens} tokens, {self.cache_bytes / 2**30:.2f} GiB of keys and values "
            f"per process; decode passes {how}"
        )
        """One line for the log."""
        log.info("%s", self.description)

    # ---------------------------------------------------------------- rows

    @property
    def weights_version(self) -> int:
        """Version of the weights that answer."""
        return self._version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        if self._rows:
            raise RuntimeError(
                f"{len(self._rows)} rows are open: what is cached is of the old weights; close them first"
            )
        self._version = version
        self._forward.weights_changed()

    @property
    def cache_bytes(self) -> int:
        """Memory of this process's keys and values."""
        return sum(c.bytes for c in self._forward.caches)

    def open(self, ids: Sequence[int]) -> int:
        """See `RolloutEngine.open`; nothing is computed yet."""
        assert len(ids), "a row needs a first token: it predicts the second"
        if not self._free:
            raise UserError(f"a row more than the {self.max_batch} there is room for; close one, or raise max_batch")
        self._check_length(len(ids))
        self._next_row += 1
        self._free.sort(reverse=True)
        self._rows[self._next_row] = _Row(self._free.pop(), list(map(int, ids)))
        return self._next_row

    def fork(self, row: int, length: int) -> int:
        """See `RolloutEngine.fork`; keys and values are copied."""
        source = self._rows[row]
        assert 1 <= length <= len(source.ids), f"a fork after {length} of {len(source.ids)} tokens"
        number = self.open(source.ids[:length])
        target = self._rows[number]
        target.cached = min(source.cached, length - 1)
        for cache in self._forward.caches:
            cache.copy(source.slot, target.slot, target.cached)
        return number

    def close(self, row: int) -> None:
        """See `RolloutEngine.close`."""
        self._free.append(self._rows.pop(row).slot)

    def length(self, row: int) -> int:
        """See `RolloutEngine.length`."""
        return len(self._rows[row].ids)

    def rollback(self, row: int, length: int) -> None:
        """See `RolloutEngine.rollback`."""
        found = self._rows[row]
        assert 1 <= length <= len(found.ids), f"rollback to {length} of {len(found.ids)} tokens"
        del found.ids[length:]
        kept = min(found.cached, length - 1)
        self.counters.rolled_back += found.cached - kept
        found.cached = kept

    def token_set(self, ids: Sequence[int] | np.ndarray) -> int:
        """See `RolloutEngine.token_set`."""
        unique = np.unique(np.asarray(ids, dtype=np.int64))
        if len(unique) and not 0 <= unique[0] <= unique[-1] < self._vocab.vocab_size:
            raise UserError(
                f"a set of ids from {unique[0]} to {unique[-1]}; the model's vocabulary has {self._vocab.vocab_size}; "
                "use the model's own tokenizer"
            )
        key = unique.tobytes()
        if key not in self._set_numbers:
            self._set_numbers[key] = len(self._sets)
            self._sets.append(LocalSet.of(unique, self._vocab, self._columns, self._parallel.device))
        return self._set_numbers[key]

    def _move_together(self, sparse: float) -> None:
        """Move rows down into free slots where they take more than `sparse` slots each."""
        if max((r.slot for r in self._rows.values()), default=-1) < sparse * len(self._rows):
            return
        rows = sorted(self._rows.values(), key=lambda r: r.slot)
        for row, target in zip(reversed(rows), sorted(self._free), strict=False):
            if target > row.slot:
                break
            for cache in self._forward.caches:
                cache.copy(row.slot, target, row.cached)
            self._free.remove(target)
            self._free.append(row.slot)
            row.slot = target

    def _check_length(self, length: int) -> None:
        if length > self.max_tokens:
            raise UserError(f"a row of {length} tokens; the engine was made for {self.max_tokens}; raise max_tokens")

    # ---------------------------------------------------------------- steps

    def step(self, extends: Sequence[Extend], temperature: float = 1.0) -> list[Answer]:
        """See `RolloutEngine.step`."""
        if temperature <= 0:
            raise UserError(f"temperature {temperature}; it divides the logits; use a number above 0")
        assert len({e.row for e in extends}) == len(extends), "a row can be extended once per step"
        self._parallel.mark("rollout")
        batch = self._decode_batch(extends)
        if isinstance(batch, DecodeBatch):
            return self._decode(extends, batch, temperature)
        self.counters.ordinary[batch] = self.counters.ordinary.get(batch, 0) + 1
        self._move_together(SPARSE)
        scores = np.full(sum(len(e.ids) for e in extends), np.nan)
        answers = np.full((3, sum(len(e.queries) for e in extends)), np.nan)
        for plan in self._plan(extends):
            self.counters.forward_passes += 1
            self.counters.tokens += len(plan.ids)
            values = run_pass(self._forward, plan, self._sets, self._vocab, temperature)
            n, m = len(plan.scored), len(plan.asked)
            scores[plan.scored_to] = values[:n]
            answers[:, plan.asked_to] = values[n:].reshape(ANSWERS, m)[:3]
        return self._finish(extends, scores, answers)

    def _decode_batch(self, extends: Sequence[Extend]) -> DecodeBatch | str:
        """The decode pass that is asked for, or why it is none; rows are moved together for it."""
        if not extends:
            return "nothing asked"
        rows, uniforms, kinds = [], [], set()
        for extend in extends:
            row = self._rows[extend.row]
            if len(extend.queries) != 1 or extend.ids or row.cached != len(row.ids) - 1:
                return "tokens are read or forced"
            query = extend.queries[0]
            assert query.offset == 0, "a query outside of the new tokens"
            rows.append(row)
            uniforms.append(np.nan if query.uniform is None else query.uniform)
            kinds.add((query.token_set, query.top_p))
        if len(kinds) > 1:
            return "different questions"
        if len(rows) > min(self._tokens_per_forward, LOGIT_ROWS):
            return "more rows than a pass takes"
        self._move_together(1.0)
        slots = np.array([r.slot for r in rows])
        if slots.max() >= GAPS * len(rows):
            return "few of the open rows"
        for row, extend in zip(rows, extends, strict=True):
            self._check_length(len(row.ids) + extend.append)
        ((number, top_p),) = kinds
        return DecodeBatch(
            slots,
            np.array([r.ids[-1] for r in rows]),
            np.array([len(r.ids) - 1 for r in rows]),
            np.array(uniforms, dtype=np.float64),
            number,
            top_p,
        )

    def _decode(self, extends: Sequence[Extend], batch: DecodeBatch, temperature: float) -> list[Answer]:
        counters, graphs = self.counters, self._decoder.graphs
        counters.forward_passes += 1
        counters.decode_passes += 1
        counters.tokens += len(extends)
        masses, drawn, log_probs = self._decoder.run(batch, temperature)
        counters.graph_passes = graphs.replays if graphs else 0
        ids = drawn.astype(np.int64)
        answers = []
        for i, (extend, token) in enumerate(zip(extends, ids.tolist(), strict=True)):
            if extend.append:
                assert token >= 0, "nothing to append: no uniform, or a set of probability 0"
                row = self._rows[extend.row]
                row.cached = len(row.ids)
                row.ids.append(token)
            answers.append(Answer(NOTHING, masses[i : i + 1], ids[i : i + 1], log_probs[i : i + 1]))
        return answers

    def _plan(self, extends: Sequence[Extend]) -> list[Pass]:
        """Cut the new tokens of all rows into forward passes; answers go to their place by number."""
        passes = [Pass()]
        score_at = ask_at = 0
        for extend in extends:
            self._check_length(len(self._rows[extend.row].ids) + len(extend.ids) + extend.append)
            tail = [q for q in extend.queries[-1:] if q.offset == len(extend.ids)]
            assert tail or not extend.append, "the draw to append must be the last query's, of the token after the ids"
        for extend in extends:
            row = self._rows[extend.row]
            known = len(row.ids)
            row.ids.extend(map(int, extend.ids))
            # The token before place p of the row predicts it.
            ends = [known + q.offset for q in extend.queries]
            assert all(known <= e <= len(row.ids) for e in ends), "a query outside of the new tokens"
            stop = max([len(row.ids) - 1 if extend.ids else 0, *ends], default=0)
            while row.cached < stop:
                plan = passes[-1]
                room = self._tokens_per_forward - len(plan.ids)
                if room == 0:
                    passes.append(Pass())
                    continue
                start, end = row.cached, min(stop, row.cached + room)
                base = len(plan.ids) - start - 1  # token p of the row is asked at base + p of the pass
                plan.runs.append(Run(row.slot, start, end - start))
                plan.ids += row.ids[start:end]
                first, last = max(known, start + 1), min(len(row.ids) - 1, end)
                plan.scored += range(base + first, base + last + 1)
                plan.labels += row.ids[first : last + 1]
                plan.scored_to += range(score_at + first - known, score_at + last + 1 - known)
                for i, (query, place) in enumerate(zip(extend.queries, ends, strict=True)):
                    if start < place <= end:
                        plan.asked.append(base + place)
                        plan.sets.append(query.token_set)
                        plan.uniforms.append(np.nan if query.uniform is None else query.uniform)
                        plan.top_p.append(query.top_p)
                        plan.asked_to.append(ask_at + i)
                row.cached = end
            score_at += len(extend.ids)
            ask_at += len(extend.queries)
        return [p for p in passes if p.ids]

    def _finish(self, extends: Sequence[Extend], scores: np.ndarray, answers: np.ndarray) -> list[Answer]:
        out, score_at, ask_at = [], 0, 0
        for extend in extends:
            row, s, q = self._rows[extend.row], len(extend.ids), len(extend.queries)
            masses, drawn, drawn_log_probs = answers[:, ask_at : ask_at + q]
            answer = Answer(scores[score_at : score_at + s], masses, drawn.astype(np.int64), drawn_log_probs)
            if extend.append:
                assert answer.drawn[-1] >= 0, "nothing to append: no uniform, or a set of probability 0"
                row.ids.append(int(answer.drawn[-1]))
            row.cached = min(row.cached, len(row.ids) - 1)
            out.append(answer)
            score_at, ask_at = score_at + s, ask_at + q
        return out
