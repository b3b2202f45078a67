"""Training speed of our engine against a bare Megatron-Core loop and a plain Hugging Face + PyTorch loop.

    python benchmarks/training.py [--steps 12] [--micro 4] [--seq 512] [--dtype fp32]

Same model, same weights, same packed batches, same process, steps taken in turn, so that a busy machine slows all three
alike. Prints tokens per second (median step) and our ratio to each. The first losses must agree.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from pathlib import Path

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func

from ra3_megatron.checkpoint.convert import import_hf
from ra3_megatron.checkpoint.weights import load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.data.batch import TrainBatch
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import initialize, seed_everything
from ra3_megatron.training.components import cross_entropy_component
from ra3_megatron.training.engine import TrainEngine

LR = 1e-3


def batches(vocab: int, seq: int, micro: int, count: int) -> list[TrainBatch]:
    """Packed micro-batches: windows of about four sequences each, as the quick-start corpus gives."""
    g = torch.Generator().manual_seed(0)
    out = []
    for _ in range(count):
        lengths: list[int] = []
        for _ in range(micro):
            cuts = torch.randperm(seq - 1, generator=g)[:3].sort().values + 1
            edges = [0, *cuts.tolist(), seq]
            lengths += [b - a for a, b in itertools.pairwise(edges)]
        ids = torch.randint(vocab, (micro * seq,), generator=g)
        ends = torch.tensor(lengths).cumsum(0)
        weight = torch.ones(micro * seq)
        weight[ends - 1] = 0.0
        out.append(
            TrainBatch(
                input_ids=ids,
                labels=ids.roll(-1),
                position_ids=torch.cat([torch.arange(n) for n in lengths]),
                cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.int32), ends.int()]),
                max_seqlen=max(lengths),
                weights={"cross_entropy": weight},
            )
        )
    return out


class Ours:
    """The project's engine."""

    def __init__(self, config, arch, parallel, checkpoint, global_batch):
        chunks = build_model(arch, config.model, parallel)
        load_weights(checkpoint, chunks, arch, parallel)
        self.engine = TrainEngine(config, arch, parallel, chunks, [cross_entropy_component()], total_steps=10_000)
        self.batches = global_batch

    def step(self, number: int) -> float:
        return self.engine.train_step(self.batches, number).loss


class BareMegatron:
    """Megatron-Core's schedule, distributed data parallel and distributed optimizer, and nothing else."""

    def __init__(self, config, arch, parallel, checkpoint, global_batch):
        [chunk] = build_model(arch, config.model, parallel)
        load_weights(checkpoint, [chunk], arch, parallel)
        settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config=chunk.config, ddp_config=settings, module=chunk)
        bf16 = config.model.precision != "fp32"
        dtype = torch.bfloat16 if bf16 else torch.float32
        optimizer = OptimizerConfig(
            optimizer="adam", lr=LR, weight_decay=0.1, adam_beta2=0.95, clip_grad=1.0, bf16=bf16, params_dtype=dtype,
            use_distributed_optimizer=True,
        )  # fmt: skip
        self.optimizer = get_megatron_optimizer(optimizer, [self.model], use_gloo_process_groups=False)
        chunk.config.finalize_model_grads_func = finalize_model_grads
        chunk.config.grad_scale_func = self.optimizer.scale_loss
        self.batches, self.tokens = global_batch, global_batch[0].input_ids.numel()

    def _forward(self, iterator, model):
        batch = next(iterator)
        cu = batch.cu_seqlens
        packed = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=batch.max_seqlen,
            max_seqlen_kv=batch.max_seqlen,
        )  # fmt: skip
        losses = model(
            input_ids=batch.input_ids[None], position_ids=batch.position_ids[None], attention_mask=None,
            labels=batch.labels[None], packed_seq_params=packed,
        )  # fmt: skip

        def loss(output):
            weight = batch.weights["cross_entropy"]
            total = (output.view(-1).float() * weight).sum()
            return total, weight.sum().int(), total.detach()

        return losses, loss

    def step(self, number: int) -> float:
        self.model.train()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = get_forward_backward_func()(
            forward_step_func=self._forward, data_iterator=iter(self.batches), model=self.model,
            num_microbatches=len(self.batches), seq_length=self.tokens, micro_batch_size=1, forward_only=False,
        )  # fmt: skip
        self.optimizer.step()
        return float(sum(sums)) / sum(float(b.weights["cross_entropy"].sum()) for b in self.batches)


class PlainHuggingFace:
    """`transformers` model with SDPA, block-diagonal mask, fused AdamW, gradient clipping."""

    def __init__(self, folder, dtype, global_batch, micro, seq):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").train()
        decay = [p for p in self.model.parameters() if p.dim() > 1]
        rest = [p for p in self.model.parameters() if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=LR, betas=(0.9, 0.95), fused=True)
        self.count = sum(float(b.weights["cross_entropy"].sum()) for b in global_batch)
        self.rows = [self._row(b, micro, seq) for b in global_batch]

    @staticmethod
    def _row(batch: TrainBatch, micro: int, seq: int):
        lengths = batch.cu_seqlens.diff().long()
        document = torch.repeat_interleave(torch.arange(len(lengths)), lengths).view(micro, seq)
        same = document[:, :, None] == document[:, None, :]
        mask = (same & torch.ones(seq, seq, dtype=torch.bool).tril())[:, None]
        shape = (micro, seq)
        return batch.input_ids.view(shape), batch.position_ids.view(shape), mask, batch.labels, batch.weights

    def step(self, number: int) -> float:
        total = 0.0
        for ids, positions, mask, labels, weights in self.rows:
            out = self.model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
            logits = out.logits.view(-1, out.logits.shape[-1]).float()
            per_token = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
            loss = (per_token * weights["cross_entropy"]).sum() / self.count
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--micro", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--micro-batches", type=int, default=2)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=192)
    options = parser.parse_args()
    from transformers import AutoConfig, AutoModelForCausalLM

    arch = Architecture(num_layers=options.layers, hidden_size=options.hidden, num_heads=options.hidden // 32)
    config = config_from_dict(
        {
            "model": {"precision": options.dtype},
            "train": {"steps": 10_000, "seq_length": options.seq},
            "optimizer": {"lr": LR, "schedule": "constant", "min_lr": LR},
        }
    )
    dtype = torch.float32 if options.dtype == "fp32" else torch.bfloat16
    with tempfile.TemporaryDirectory() as temporary, initialize(config.parallel) as parallel:
        folder, checkpoint = Path(temporary) / "hf", Path(temporary) / "checkpoint"
        seed_everything(0, parallel)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**arch.to_hf())).save_pretrained(folder)
        import_hf(folder, checkpoint)
        data = batches(arch.vocab_size, options.seq, options.micro, options.micro_batches)
        loops = {
            "ours": Ours(config, arch, parallel, checkpoint, data),
            "bare Megatron-Core": BareMegatron(config, arch, parallel, checkpoint, data),
            "Hugging Face + PyTorch": PlainHuggingFace(folder, dtype, data, options.micro, options.seq),
        }
        first = {name: loop.step(1) for name, loop in loops.items()}
        print("first loss:", ", ".join(f"{name} {loss:.6f}" for name, loss in first.items()))
        spread = max(first.values()) - min(first.values())
        assert spread < (1e-4 if options.dtype == "fp32" else 5e-2), "the three loops do not compute the same loss"
        seconds: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(2, options.steps + 2):
            for name, loop in loops.items():
                start = time.perf_counter()
                loop.step(number)
                seconds[name].append(time.perf_counter() - start)
    tokens = options.micro_batches * options.micro * options.seq
    print(f"{arch.parameter_count / 1e6:.1f} M parameters, {tokens} tokens a step, {torch.get_num_threads()} threads")
    ours = seconds["ours"]
    for name, values in seconds.items():
        ratio = statistics.median(other / mine for other, mine in zip(values, ours, strict=True))
        print(f"{name:24} {tokens / statistics.median(values):10.0f} tokens/s   ours is {ratio:.3f}x of it")


if __name__ == "__main__":
    main()
