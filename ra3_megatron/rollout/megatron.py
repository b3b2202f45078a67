"""The rollout engine on the training model itself: Megatron-Core chunks, a KV cache, tensor and pipeline parallelism.

The model that trains is the model that samples, so log-probabilities agree up to rounding and no weights are copied.
Every process of a model replica holds the same list of rows and makes the same calls; the last pipeline stage answers
and tells the others. A row's last token stays out of the cache until its successor is wanted: what follows it is then
predicted in the same pass that scores the next forced tokens, and a rollback costs one token.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ra3_megatron.algo.logprobs import token_log_probs
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.model.factory import unwrap
from ra3_megatron.parallel.collectives import explain_timeouts
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.cache import SPARSE, ChunkCache, Layout, Run
from ra3_megatron.rollout.engine import Answer, EngineCounters, Extend
from ra3_megatron.rollout.sampling import LocalSet, answer_queries
from ra3_megatron.training.schedule import vocabulary_shard, whole_hidden

LOGIT_ROWS = 1024
"""Tokens whose logits exist at once; bounds memory, 0.6 GB in fp32 at a vocabulary of 152 k."""

FP8_TOKENS = 16
"""FP8 matrix products want a multiple of this many tokens."""


@dataclass
class _Row:
    slot: int
    ids: list[int]
    cached: int = 0


@dataclass
class _Pass:
    """One forward pass: runs of rows, and what is asked of the logits at which of its tokens."""

    runs: list[Run] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    scored: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    scored_to: list[int] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    sets: list[int] = field(default_factory=list)
    uniforms: list[float] = field(default_factory=list)
    top_p: list[float] = field(default_factory=list)
    asked_to: list[int] = field(default_factory=list)


class MegatronEngine:
    """See `RolloutEngine`. `chunks` are the model's chunks, wrapped or not; after each call they are as before, but
    in evaluation mode.

    Memory: `max_batch` x (`max_tokens` + 1) keys and values per layer, see `cache_bytes`. A `step` with more than
    `tokens_per_forward` new tokens is cut into several forward passes.
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
    ) -> None:
        if parallel.sizes.context > 1:
            raise UserError(
                f"rollouts with context parallelism {parallel.sizes.context}; the engine's cache is not split along "
                "the sequence; set parallel.context to 1 for this stage"
            )
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
        self._chunks = list(chunks)
        self._parallel = parallel
        self._config: Any = unwrap(chunks[0]).config
        self._caches = [ChunkCache(c, max_batch, max_tokens + 1, parallel.device) for c in chunks]
        self._rows: dict[int, _Row] = {}
        self._free = list(range(max_batch - 1, -1, -1))
        self._next_row = 0
        sizes = parallel.sizes
        self._columns = unwrap(chunks[-1]).vocab_size // sizes.tensor
        self._vocab = vocabulary_shard(chunks, architecture, parallel)
        self._sets: list[LocalSet] = []
        self._set_numbers: dict[bytes, int] = {}
        self._replica = parallel.group("mp")
        assert self._replica.rank == parallel.pipeline_rank * sizes.tensor + parallel.tensor_rank, "order of the group"
        self._answerer = self._replica.ranks[(sizes.pipeline - 1) * sizes.tensor]

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

    @property
    def cache_bytes(self) -> int:
        """Memory of this process's keys and values."""
        return sum(c.bytes for c in self._caches)

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
        for cache in self._caches:
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

    def _move_together(self) -> None:
        """Move rows down into free slots where they lie too far apart for one slice of the cache."""
        rows = sorted(self._rows.values(), key=lambda r: r.slot)
        if not rows or rows[-1].slot < SPARSE * len(rows):
            return
        for row, target in zip(reversed(rows), sorted(self._free), strict=False):
            if target > row.slot:
                break
            for cache in self._caches:
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
        self._move_together()
        scores = np.full(sum(len(e.ids) for e in extends), np.nan)
        answers = np.full((3, sum(len(e.queries) for e in extends)), np.nan)
        for plan in self._plan(extends):
            values = self._run(plan, temperature)
            n, m = len(plan.scored), len(plan.asked)
            scores[plan.scored_to] = values[:n]
            answers[:, plan.asked_to] = values[n:].reshape(3, m)
        return self._finish(extends, scores, answers)

    def _plan(self, extends: Sequence[Extend]) -> list[_Pass]:
        """Cut the new tokens of all rows into forward passes; answers go to their place by number."""
        passes = [_Pass()]
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
                    passes.append(_Pass())
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

    # ---------------------------------------------------------------- one forward pass

    def _run(self, plan: _Pass, temperature: float) -> np.ndarray:
        """All processes: run the pass; returns log-probs of the scored, then three rows for the asked."""
        device, sizes = self._parallel.device, self._parallel.sizes
        multiple = (sizes.tensor if sizes.sequence else 1) * (FP8_TOKENS if self._config.fp8 else 1)
        padding = -len(plan.ids) % multiple
        layout = Layout(plan.runs, padding, self.max_tokens, device, self._config.params_dtype)
        ids = torch.tensor(plan.ids + [0] * padding, device=device).unsqueeze(0)
        self.counters.forward_passes += 1
        self.counters.tokens += len(plan.ids)
        shared = self._replica.size > 1
        with ExitStack() as stack:
            stack.enter_context(explain_timeouts(self._replica, "rollout") if shared else nullcontext())
            for cache in self._caches:
                stack.enter_context(cache.plugged_in(layout))
            values = self._stages(plan, ids, layout, temperature)
            if shared:
                dist.broadcast(values, src=self._answerer, group=self._parallel.pg_collection.mp)
        return values.cpu().numpy()

    def _stages(self, plan: _Pass, ids: Tensor, layout: Layout, temperature: float) -> Tensor:
        """Pipeline stages in turn; the answers on the last, room for them on the others."""
        sizes, rank = self._parallel.sizes, self._parallel.pipeline_rank
        group = self._parallel.pg_collection.pp
        ranks = dist.get_process_group_ranks(group)
        total = sizes.pipeline * (sizes.virtual_pipeline or 1)
        values = torch.empty(len(plan.scored) + 3 * len(plan.asked), dtype=torch.float64, device=ids.device)
        local = ids.size(1) // (sizes.tensor if sizes.sequence else 1)

        def process(**given: Any) -> Tensor:
            return self._answers(plan, given, temperature)

        for stage in range(total):
            if stage % sizes.pipeline != rank:
                continue
            chunk = self._chunks[stage // sizes.pipeline]
            if stage:
                hidden = torch.empty(
                    local, 1, self._config.hidden_size, dtype=self._config.pipeline_dtype, device=ids.device
                )
                dist.recv(hidden, src=ranks[(stage - 1) % sizes.pipeline], group=group)
                unwrap(chunk).set_input_tensor(hidden)
            positions = layout.positions.unsqueeze(0)
            output = chunk(input_ids=ids, position_ids=positions, attention_mask=None, output_processor=process)
            if stage == total - 1:
                values = output
            else:
                dist.send(output.contiguous(), dst=ranks[(stage + 1) % sizes.pipeline], group=group)
        return values

    def _answers(self, plan: _Pass, given: dict[str, Any], temperature: float) -> Tensor:
        """From the last stage's hidden states to numbers; logits exist for a slice of the wanted tokens at a time."""
        hidden, output = whole_hidden(given)
        return self._reduce(plan, hidden[:, 0], output, temperature)

    def _reduce(self, plan: _Pass, hidden: Tensor, output: Callable[[Tensor], Tensor], temperature: float) -> Tensor:
        device = hidden.device
        scored, asked = np.array(plan.scored, dtype=np.int64), np.array(plan.asked, dtype=np.int64)
        labels, numbers = torch.tensor(plan.labels, device=device), torch.tensor(plan.sets)
        uniforms = torch.tensor(plan.uniforms, dtype=torch.float64, device=device)
        top_p = torch.tensor(plan.top_p, dtype=torch.float64)
        wanted = np.unique(np.concatenate((scored, asked)))
        scores = torch.empty(len(scored), dtype=torch.float64, device=device)
        answers = torch.empty(3, len(asked), dtype=torch.float64, device=device)
        for start in range(0, len(wanted), LOGIT_ROWS):
            part = wanted[start : start + LOGIT_ROWS]
            logits = output(_rows(hidden, part).unsqueeze(1))[:, 0]
            mine = np.flatnonzero((asked >= part[0]) & (asked <= part[-1]))
            if len(mine):
                to = torch.from_numpy(mine)
                there = to.to(device)
                asked_logits = _rows(logits, np.searchsorted(part, asked[mine]))
                drawn = answer_queries(
                    asked_logits, self._sets, numbers[to], uniforms[there], self._vocab, temperature, top_p[to]
                )
                answers[:, there] = torch.stack((drawn.log_masses, drawn.ids.double(), drawn.log_probs))
            mine = np.flatnonzero((scored >= part[0]) & (scored <= part[-1]))
            if len(mine):
                there = torch.from_numpy(mine).to(device)
                # The logits' last use, so their memory is free where they are not copied.
                scored_logits = _rows(logits, np.searchsorted(part, scored[mine]))
                scores[there] = token_log_probs(scored_logits, labels[there], self._vocab, consume=True).double()
        return torch.cat((scores, answers.view(-1)))


def _rows(x: Tensor, index: np.ndarray) -> Tensor:
    """Rows `index` of `x`; no copy where these are all of them in order."""
    if len(index) == len(x) and (index == np.arange(len(x))).all():
        return x
    return x[torch.from_numpy(index).to(x.device)]
