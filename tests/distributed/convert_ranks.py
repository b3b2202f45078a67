"""What the ranks of test_convert.py do: load one imported checkpoint in several layouts, and save from one of them."""

from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from ra3_megatron.checkpoint.capture import model_state
from ra3_megatron.checkpoint.distributed import save_sharded
from ra3_megatron.checkpoint.hashing import hash_parameters
from ra3_megatron.checkpoint.weights import load_weights, read_done
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.sections import ModelConfig, ParallelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything

TOKENS = 48


def token_ids(vocab_size: int) -> torch.Tensor:
    """Ids `[1, TOKENS]`, the same everywhere."""
    return torch.randint(vocab_size, (1, TOKENS), generator=torch.Generator().manual_seed(11))


def _logits(chunks: list[Any], arch: Architecture, parallel: Parallel) -> torch.Tensor | None:
    """Logits `[TOKENS, vocab]` on the last stage through Megatron's own schedule, None elsewhere."""
    seen: list[torch.Tensor] = []

    def step(_iterator: Any, model: Any) -> Any:
        ids = token_ids(arch.vocab_size)
        out = model(ids, torch.arange(TOKENS)[None], None)

        def loss(logits: torch.Tensor) -> Any:
            full = gather_from_tensor_model_parallel_region(logits, group=parallel.group("tp").device_group)
            seen.append(full[0, :, : arch.vocab_size].clone())
            return full.sum(), torch.ones((), dtype=torch.int32), {}

        return out, loss

    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter([]) for _ in chunks] if len(chunks) > 1 else iter([]),
            model=chunks if len(chunks) > 1 else chunks[0],
            num_microbatches=parallel.sizes.pipeline,
            seq_length=TOKENS,
            micro_batch_size=1,
            forward_only=True,
        )
    return seen[0] if seen else None


def layouts(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each case load `checkpoint` at `parallel` sizes; write logits, and a checkpoint where `save` names one."""
    results = []
    for case in cases:
        arch = Architecture.from_dict(case["architecture"])
        with initialize(ParallelConfig(**case["parallel"])) as parallel:
            seed_everything(1, parallel)
            chunks = build_model(arch, ModelConfig(vocab_multiple=case["vocab_multiple"]), parallel)
            for chunk in chunks:
                chunk.eval()
            load_weights(case["checkpoint"], chunks, arch, parallel)
            sha256 = hash_parameters(chunks, parallel, arch.vocab_size)
            padded = [
                p.shape[0] for c in chunks for n, p in c.named_parameters() if n.endswith("word_embeddings.weight")
            ]
            logits = _logits(chunks, arch, parallel)
            if logits is not None and parallel.tensor_rank == parallel.data_rank == 0:
                torch.save(logits, case["logits"])
            if case.get("save"):
                save_sharded(Path(case["save"]), model_state(chunks, parallel), parallel)
            same = sha256 == read_done(Path(case["checkpoint"]))["parameters_sha256"]
            results.append({"same_hash": same, "rows": padded, "last": logits is not None})
    return results
