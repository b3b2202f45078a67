"""The rollout engine on vLLM: a copy of the weights in the same process, handed over without a file.

Every answer is computed here from vLLM's log-probabilities, by the code that answers for the Megatron engine: the same
uniform gives the same id, and masses of think sets are sums over the whole vocabulary. What that costs, with vLLM's
V1 engine (0.15 and later):

- log-probabilities of forced ids are prompt log-probabilities, for which vLLM does not read its prefix cache: each
  `step` feeds the whole row again, so `counters.tokens` grows with the square of a row's number of chunks;
- a query is a request for one token with the log-probabilities of the whole vocabulary (`logprobs=-1`), since its
  top-k leaves out nearly all of a think set; its prefix is cached by then. They cross from the GPU to the host.

So this engine pays where vLLM's kernels are much faster than one pass of the training model, and needs longer
`latent.chunk_tokens` than the other. What vLLM writes into the cache while it samples by itself is not used: its own
draws come from its own random numbers and would depend on the batch.
"""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ra3_megatron.algo.logprobs import VocabShard
from ra3_megatron.checkpoint.hf_mapping import live_hf_tensors
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.model.factory import unwrap
from ra3_megatron.model.optional import require_vllm
from ra3_megatron.parallel.groups import Parallel
from ra3_megatron.rollout.engine import Answer, EngineCounters, Extend
from ra3_megatron.rollout.sampling import Drawn, LocalSet, answer_queries

QUERIES = 64
"""Queries whose log-probabilities of the whole vocabulary are on the host at once; 40 MB at 152 k ids."""


class ScoringModel(Protocol):
    """A language model without state that is asked about whole texts; log-probabilities at temperature 1."""

    def prompt_log_probs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Log-probability of every id of each text after the first, float64 `[ids - 1]`, nats."""

    def next_log_probs(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Log-probabilities of what follows each text, fp32 `[texts, vocabulary]` on the CPU, nats."""

    def update(self) -> None:
        """Take over the weights as they are now."""


class PromptEngine:
    """See `RolloutEngine`; on a `ScoringModel`, so rows are lists of ids and nothing else.

    `counters.forward_passes` counts requests for a batch of texts, `counters.tokens` the ids of scored rows; what the
    model's own prefix cache saves or repeats is not seen from here. Setting `weights_version` hands over the weights.
    """

    def __init__(
        self, model: ScoringModel, vocab_size: int, max_batch: int, max_tokens: int, weights_version: int
    ) -> None:
        self.max_batch, self.max_tokens = max_batch, max_tokens
        self.description = f"rollouts: {max_batch} rows of {max_tokens} tokens in vLLM"
        self.counters = EngineCounters()
        self._model, self._vocab, self._version = model, VocabShard(0, vocab_size), weights_version
        self._rows: dict[int, list[int]] = {}
        self._next_row = 0
        self._sets: list[LocalSet] = []
        self._set_numbers: dict[bytes, int] = {}

    @property
    def weights_version(self) -> int:
        """Version of the weights that answer."""
        return self._version

    @weights_version.setter
    def weights_version(self, version: int) -> None:
        if self._rows:
            raise RuntimeError(f"{len(self._rows)} rows are open, begun with the old weights; close them first")
        self._model.update()
        self._version = version

    def open(self, ids: Sequence[int]) -> int:
        """See `RolloutEngine.open`."""
        assert len(ids), "a row needs a first token: it predicts the second"
        if len(self._rows) == self.max_batch:
            raise UserError(f"a row more than the {self.max_batch} there is room for; close one, or raise max_batch")
        self._check_length(len(ids))
        self._next_row += 1
        self._rows[self._next_row] = list(map(int, ids))
        return self._next_row

    def fork(self, row: int, length: int) -> int:
        """See `RolloutEngine.fork`; what can be shared is found by the model's own prefix cache."""
        assert 1 <= length <= len(self._rows[row]), f"a fork after {length} of {len(self._rows[row])} tokens"
        return self.open(self._rows[row][:length])

    def close(self, row: int) -> None:
        """See `RolloutEngine.close`."""
        del self._rows[row]

    def length(self, row: int) -> int:
        """See `RolloutEngine.length`."""
        return len(self._rows[row])

    def rollback(self, row: int, length: int) -> None:
        """See `RolloutEngine.rollback`."""
        ids = self._rows[row]
        assert 1 <= length <= len(ids), f"rollback to {length} of {len(ids)} tokens"
        self.counters.rolled_back += len(ids) - length
        del ids[length:]

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
            self._sets.append(LocalSet.of(unique, self._vocab, self._vocab.vocab_size, torch.device("cpu")))
        return self._set_numbers[key]

    def _check_length(self, length: int) -> None:
        if length > self.max_tokens:
            raise UserError(f"a row of {length} tokens; the engine was made for {self.max_tokens}; raise max_tokens")

    def step(self, extends: Sequence[Extend], temperature: float = 1.0) -> list[Answer]:
        """See `RolloutEngine.step`."""
        if temperature <= 0:
            raise UserError(f"a sampling temperature of {temperature}; it must be above 0; set 1 to sample as trained")
        assert len({e.row for e in extends}) == len(extends), "a row twice in one step"
        for extend in extends:
            self._check_length(len(self._rows[extend.row]) + len(extend.ids) + extend.append)
            last = extend.queries[-1].offset if extend.queries else None
            assert not extend.append or last == len(extend.ids), "the draw to append must be of the token after the ids"
            assert all(0 <= q.offset <= len(extend.ids) for q in extend.queries), "a query outside of the new tokens"
        known = [len(self._rows[e.row]) for e in extends]
        for extend in extends:
            self._rows[extend.row] += map(int, extend.ids)
        scores = self._scores(extends, known)
        drawn = self._drawn(extends, known, temperature)
        answers, at = [], 0
        for extend, score in zip(extends, scores, strict=True):
            own = slice(at, at + len(extend.queries))
            at += len(extend.queries)
            answer = Answer(score, *(x[own].numpy() for x in (drawn.log_masses, drawn.ids, drawn.log_probs)))
            if extend.append:
                assert answer.drawn[-1] >= 0, "nothing to append: no uniform, or a set of probability 0"
                self._rows[extend.row].append(int(answer.drawn[-1]))
            answers.append(answer)
        return answers

    def _scores(self, extends: Sequence[Extend], known: Sequence[int]) -> list[np.ndarray]:
        """Log-probabilities of the forced ids; rows without any are not asked about."""
        asked = [i for i, e in enumerate(extends) if e.ids]
        scores = [np.zeros(0) for _ in extends]
        if asked:
            texts = [self._rows[extends[i].row] for i in asked]
            self._count(texts)
            for i, found in zip(asked, self._model.prompt_log_probs(texts), strict=True):
                scores[i] = found[known[i] - 1 :]
        return scores

    def _drawn(self, extends: Sequence[Extend], known: Sequence[int], temperature: float) -> Drawn:
        """Answers to all queries in order."""
        parts = []
        flat = ((self._rows[e.row][: k + q.offset], q) for e, k in zip(extends, known, strict=True) for q in e.queries)
        while some := list(islice(flat, QUERIES)):
            self.counters.forward_passes += 1
            log_probs = self._model.next_log_probs([text for text, _ in some])
            numbers = torch.tensor([q.token_set for _, q in some])
            uniforms = torch.tensor([np.nan if q.uniform is None else q.uniform for _, q in some], dtype=torch.float64)
            top_p = torch.tensor([q.top_p for _, q in some], dtype=torch.float64)
            parts.append(answer_queries(log_probs, self._sets, numbers, uniforms, self._vocab, temperature, top_p))
        empty = torch.zeros(0, dtype=torch.float64)
        return Drawn(
            torch.cat([empty, *(p.log_masses for p in parts)]),
            torch.cat([empty.long(), *(p.ids for p in parts)]),
            torch.cat([empty, *(p.log_probs for p in parts)]),
        )

    def _count(self, texts: Sequence[Sequence[int]]) -> None:
        self.counters.forward_passes += 1
        self.counters.tokens += sum(map(len, texts))


class VllmModel:
    """vLLM in this process with the weights of the model that trains. NOT RUN: see docs/performance.md."""

    def __init__(self, chunk: torch.nn.Module, architecture: Architecture, parallel: Parallel, **limits: Any) -> None:
        self._model, self._architecture = unwrap(chunk), architecture
        # The engine must live in this process, or tensors would have to be sent to it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        places = {"RANK": parallel.rank, "LOCAL_RANK": parallel.local_rank, "WORLD_SIZE": parallel.world_size}
        for name, value in places.items():
            os.environ.setdefault(name, str(value))
        import vllm

        self._params: Callable[..., Any] = vllm.SamplingParams
        dtype = str(next(self._model.parameters()).dtype).removeprefix("torch.")
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(architecture.to_hf(dtype)), encoding="utf-8")
            self._llm = vllm.LLM(
                model=folder,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",
                dtype=dtype,
                # One engine per process; replicas generate without waiting for each other.
                distributed_executor_backend="external_launcher",
                enable_prefix_caching=True,
                max_logprobs=-1,
                logprobs_mode="raw_logprobs",
                **limits,
            )
        self.update()

    def update(self) -> None:
        """See `ScoringModel`: by reference, and what is cached of the old weights is dropped."""
        named = list(live_hf_tensors(dict(self._model.named_parameters()), self._architecture))

        def load(model: Any) -> None:
            model.load_weights(named)

        self._llm.apply_model(load)
        if not self._llm.reset_prefix_cache():
            raise RuntimeError("vLLM did not drop its prefix cache, which holds keys of the old weights")

    def _ask(self, texts: Sequence[Sequence[int]], **wanted: Any) -> Iterable[Any]:
        params = self._params(max_tokens=1, temperature=0.0, detokenize=False, **wanted)
        return self._llm.generate([{"prompt_token_ids": list(t)} for t in texts], params, use_tqdm=False)

    def prompt_log_probs(self, texts: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """See `ScoringModel`."""
        return [
            np.array([p[i].logprob for p, i in zip(out.prompt_logprobs[1:], text[1:], strict=True)], dtype=np.float64)
            for out, text in zip(self._ask(texts, prompt_logprobs=0), texts, strict=True)
        ]

    def next_log_probs(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """See `ScoringModel`. Raises RuntimeError when vLLM leaves ids out."""
        rows = torch.full((len(texts), self._architecture.vocab_size), torch.nan)
        for row, out in zip(rows, self._ask(texts, logprobs=-1, flat_logprobs=True), strict=True):
            found = out.outputs[0].logprobs
            row[torch.tensor(found.token_ids)] = torch.tensor(found.logprobs, dtype=torch.float32)
        if rows.isnan().any():
            raise RuntimeError("vLLM gave log-probabilities of a part of the vocabulary; the masses would be wrong")
        return rows


def vllm_engine(
    chunks: Sequence[torch.nn.Module],
    architecture: Architecture,
    parallel: Parallel,
    max_batch: int,
    max_tokens: int,
    memory: float,
    weights_version: int = 0,
) -> PromptEngine:
    """The engine on vLLM with the weights of `chunks`; `memory` is the share of the GPU that vLLM may take.

    Raises UserError without vLLM or a GPU, for a split model, and for rows that fill the model's positions.
    """
    sizes = parallel.sizes
    if sizes.tensor * sizes.pipeline * sizes.context > 1:
        raise UserError(
            f"latent.engine is vllm; parallel.tensor {sizes.tensor} x pipeline {sizes.pipeline} x context "
            f"{sizes.context} split the model, and its weights are handed over whole; set these to 1, or "
            "latent.engine=megatron"
        )
    if max_tokens >= architecture.max_positions:
        raise UserError(
            f"latent.engine is vllm with rows of {max_tokens} tokens; vLLM draws one more and the model has "
            f"{architecture.max_positions} positions; lower train.seq_length"
        )
    require_vllm("latent.engine=vllm")
    limits = {"max_model_len": max_tokens + 1, "max_num_seqs": max_batch, "gpu_memory_utilization": memory}
    model = VllmModel(chunks[0], architecture, parallel, **limits)
    return PromptEngine(model, architecture.vocab_size, max_batch, max_tokens, weights_version)
