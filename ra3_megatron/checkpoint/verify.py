"""Proof that a checkpoint is a Hugging Face model: the same tensors, and the same logits on the same text.

Equal weights do not make equal models (a wrong rotary base, norm epsilon or scaling leaves every weight in place), so
both are compared, each figure against a limit.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ra3_megatron.checkpoint.convert import open_source
from ra3_megatron.checkpoint.hf_io import Source, dtype_name
from ra3_megatron.checkpoint.hf_mapping import compare_tensors, units
from ra3_megatron.checkpoint.weights import CheckpointModel, load_weights
from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.errors import UserError
from ra3_megatron.config.sections import ModelConfig
from ra3_megatron.model.factory import build_model
from ra3_megatron.parallel.groups import Parallel, initialize

TEXT = '''def merge(left: list[int], right: list[int]) -> list[int]:
    """Merge two sorted lists into one; runs in O(n + m)."""
    merged, i, j = [], 0, 0
    while i < len(left) and j < len(right):
        if left[i] <= right[j]:
            merged.append(left[i])
            i += 1
        else:
            merged.append(right[j])
            j += 1
    return merged + left[i:] + right[j:]

# The quick brown fox jumps over 12,345 lazy dogs — naïvely, at 6.02e23 Hz.
print(merge([1, 4, 9], [2, 3, 10, 11]))
'''
"""Text that is run when none is given: code, prose, numbers and a few characters outside ASCII."""

_MAX_TOKENS = 1024


@dataclass(frozen=True)
class VerifyLimits:
    """What a faithful conversion may show. Logit differences are in units of the reference logits' deviation."""

    weight_difference: float = 0.0
    """Largest difference of any weight, both sides rounded to the narrower of the two dtypes."""
    max_logit_difference: float = 1e-3
    """Largest difference of any logit / standard deviation of the reference's logits."""
    mean_logit_difference: float = 1e-4
    """Mean absolute difference / standard deviation of the reference's logits."""
    cosine: float = 0.99999
    """Smallest cosine between the two logit vectors of a token."""
    top1: float = 0.99
    """Share of tokens with the same most likely next token; near ties may fall either way."""
    kl: float = 1e-6
    """Mean KL(reference ‖ checkpoint) over tokens, nats."""


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    """What was measured."""
    found: str
    """The figure, formatted."""
    limit: str
    """The limit, formatted; empty for a line that only informs."""
    ok: bool
    """Whether the figure is within its limit."""


@dataclass(frozen=True)
class VerifyReport:
    """Result of `verify`."""

    checkpoint: Path
    """The checkpoint folder."""
    reference: Path
    """The Hugging Face folder or GGUF file."""
    tokens: int
    """Tokens of text that were run."""
    checks: tuple[Check, ...]
    """Every comparison."""

    @property
    def ok(self) -> bool:
        """Whether every figure is within its limit."""
        return all(check.ok for check in self.checks)

    def failed(self) -> tuple[str, ...]:
        """Names of the checks that are not within their limits."""
        return tuple(check.name for check in self.checks if not check.ok)

    def table(self) -> Any:
        """The comparisons as a `rich` table."""
        from rich.table import Table

        table = Table("comparison", "found", "limit", "", title=f"{self.checkpoint} against {self.reference}")
        for check in self.checks:
            verdict = ("ok" if check.limit else "") if check.ok else "[bold red]FAILED[/]"
            table.add_row(check.name, check.found, check.limit, verdict)
        return table

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = []
        for c in self.checks:
            verdict = ("ok" if c.limit else "") if c.ok else "FAILED"
            limit = f"(limit {c.limit})" if c.limit else ""
            lines.append(f"  {c.name:{width}}  {c.found} {limit} {verdict}".rstrip())
        head = f"{self.checkpoint} {'equals' if self.ok else 'DIFFERS from'} {self.reference} ({self.tokens} tokens)"
        return "\n".join([head, *lines])


def verify(
    checkpoint: Path | str,
    hf_folder: Path | str,
    *,
    text: str | None = None,
    limits: VerifyLimits | None = None,
    parallel: Parallel | None = None,
) -> VerifyReport:
    """Compare `checkpoint` with the Hugging Face folder (or GGUF file) `hf_folder`: tensors, then logits in fp32.

    Runs `text` (default `TEXT`; at most 1024 tokens; random ids when the reference has no tokenizer) through
    transformers and through our model. One process; `parallel` is used when given, else started and shut down.
    Raises UserError when either side cannot be read; differences are in the report, see `VerifyReport.ok`.
    """
    limits = limits or VerifyLimits()
    reference = Path(hf_folder)
    source = open_source(reference)
    model = CheckpointModel(checkpoint)
    checks = _compare_weights(model, source, limits)
    with _single_process(parallel) as handle:
        ids = _token_ids(reference, text, model.architecture)
        ours = megatron_logits(Path(checkpoint), model.architecture, ids, handle)
        theirs = hf_logits(reference, ids, handle.device)
    checks += _compare_logits(theirs, ours, ids, limits)
    return VerifyReport(Path(checkpoint), reference, ids.shape[1], tuple(checks))


@contextmanager
def _single_process(parallel: Parallel | None) -> Iterator[Parallel]:
    if parallel is not None:
        if parallel.world_size != 1:
            raise UserError(f"verification runs in one process, {parallel.world_size} were started; start one")
        yield parallel
        return
    with initialize() as handle, _single_process(handle):
        yield handle


# ------------------------------------------------------------------------------------------------------- weights


def _compare_weights(model: CheckpointModel, source: Source, limits: VerifyLimits) -> list[Check]:
    arch = model.architecture
    shapes = source.shapes()
    sets = compare_tensors(shapes, arch)
    checks = [
        Check(kind, _names(getattr(sets, kind)), "0", not getattr(sets, kind))
        for kind in ("missing", "extra", "misshaped")
    ]
    narrow = min(model.dtype, source.stored_dtype(), key=lambda dtype: dtype.itemsize)
    worst, where, differing, values = 0.0, "", 0, 0
    for unit in units(arch):
        expected = unit.hf_shapes(arch)
        parts = unit.rule.split(model.read(unit), arch)
        for (name, shape), mine in zip(expected.items(), parts, strict=True):
            values += mine.numel()
            if tuple(shapes.get(name, ())) != shape:
                continue
            difference = _difference(mine.to(narrow), source.read(name).to(narrow))
            if difference > 0:
                differing += 1
            if difference > worst:
                worst, where = difference, name
    found = f"{worst:.3g} in {differing} tensor(s), most in {where}" if differing else "0"
    checks.append(
        Check(f"weight difference ({dtype_name(narrow)})", found, f"{limits.weight_difference:g}",
              worst <= limits.weight_difference)
    )  # fmt: skip
    checks.append(Check("bytes of weights", f"{values * model.dtype.itemsize:,} ({dtype_name(model.dtype)})", "", True))
    return checks


def _names(names: tuple[str, ...], limit: int = 4) -> str:
    shown = ", ".join(names[:limit])
    more = ", …" if len(names) > limit else ""
    return f"{len(names)}: {shown}{more}" if names else "0"


def _difference(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    difference = (a.float() - b.float()).abs().max().item()
    return difference if difference == difference else float("inf")  # NaN compares as smaller than everything


# -------------------------------------------------------------------------------------------------------- logits


def _token_ids(reference: Path, text: str | None, arch: Architecture) -> Tensor:
    """Ids to run, `[1, seq]`."""
    from transformers import AutoTokenizer

    limit = min(_MAX_TOKENS, arch.max_positions)
    if reference.is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(reference.parent), gguf_file=reference.name)
    elif any((reference / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        tokenizer = AutoTokenizer.from_pretrained(str(reference))
    elif text is not None:
        raise UserError(f"a text was given, but {reference} has no tokenizer; leave the text out to run random ids")
    else:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(arch.vocab_size, (1, min(limit, 256)), generator=generator)
    ids = tokenizer(text if text is not None else TEXT)["input_ids"][:limit]
    if len(ids) < 2:
        raise UserError(f"the text has {len(ids)} token(s); give one with at least 2")
    if max(ids) >= arch.vocab_size:
        raise UserError(
            f"the tokenizer of {reference} gives id {max(ids)}, the model has {arch.vocab_size} rows; "
            "tokenizer and weights do not belong together"
        )
    return torch.tensor([ids])


def hf_logits(reference: Path, ids: Tensor, device: torch.device) -> Tensor:
    """Logits `[seq, vocab]` (fp32, CPU) of transformers' own model for `ids` `[1, seq]`."""
    from transformers import AutoModelForCausalLM

    where = {"pretrained_model_name_or_path": str(reference)}
    if reference.is_file():
        where = {"pretrained_model_name_or_path": str(reference.parent), "gguf_file": reference.name}
    model: Any = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    model.to(device).eval()
    with torch.no_grad():
        return model(input_ids=ids.to(device), use_cache=False).logits[0].float().cpu()


def megatron_logits(checkpoint: Path, arch: Architecture, ids: Tensor, parallel: Parallel) -> Tensor:
    """Logits `[seq, vocab]` (fp32, CPU; vocabulary padding cut off) of our model in fp32 for `ids` `[1, seq]`.

    One process; torch layers, since Transformer Engine's attention does not run in fp32.
    """
    [model] = build_model(arch, ModelConfig(precision="fp32", layers="local"), parallel)
    load_weights(checkpoint, [model], arch, parallel)
    model.eval()
    ids = ids.to(parallel.device)
    positions = torch.arange(ids.shape[1], device=parallel.device)[None]
    with torch.no_grad():
        return model(ids, positions, None)[0, :, : arch.vocab_size].float().cpu()


def _compare_logits(reference: Tensor, found: Tensor, ids: Tensor, limits: VerifyLimits) -> list[Check]:
    """Compare logits `[seq, vocab]` token by token."""
    if reference.shape != found.shape:
        shapes = f"{list(found.shape)} instead of {list(reference.shape)}"
        return [Check("shape of the logits", shapes, "equal", False)]
    spread = reference.std().item()
    difference = (reference - found).abs()
    cosine = torch.nn.functional.cosine_similarity(reference.double(), found.double(), dim=-1).min().item()
    top1 = (reference.argmax(-1) == found.argmax(-1)).float().mean().item()
    log_p, log_q = reference.double().log_softmax(-1), found.double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    nll = [-lp[:-1].gather(-1, ids[0, 1:, None]).mean().item() for lp in (log_p, log_q)]
    largest, mean = difference.max().item(), difference.mean().item()

    def at_most(name: str, value: float, limit: float, found: str) -> Check:
        return Check(name, found, f"{limit:g}", value <= limit)  # NaN is not at most anything

    return [
        at_most("max |Δ logit| / std", largest / spread, limits.max_logit_difference,
                f"{largest / spread:.3g} (absolute {largest:.3g})"),
        at_most("mean |Δ logit| / std", mean / spread, limits.mean_logit_difference,
                f"{mean / spread:.3g} (absolute {mean:.3g})"),
        Check("smallest cosine", f"{cosine:.9f}", f"{limits.cosine:g} or more", cosine >= limits.cosine),
        Check("top-1 agreement", f"{top1:.4f}", f"{limits.top1:g} or more", top1 >= limits.top1),
        at_most("mean KL, nats", abs(kl), limits.kl, f"{kl:.3g}"),
        Check("loss, reference / checkpoint, nats", f"{nll[0]:.6f} / {nll[1]:.6f}", "", True),
    ]  # fmt: skip
