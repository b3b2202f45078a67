"""Whether this GPU runs the layers at all: torch's, Transformer Engine's in BF16, and every FP8 recipe.

    python benchmarks/gpu_smoke.py [--tiny] [--results FILE]

A model of two layers with the same random weights in every setting (numbers that BF16 has): forward and backward on one
packed window, and the relative error of its logits against fp32. Seconds, so it comes first: machine code that does not
load, and versions that do not fit, show here.
"""

import torch
from gpu_common import SETTINGS, Results, can_run, parser_of, why_not

from ra3_megatron.config.architecture import Architecture
from ra3_megatron.config.run import config_from_dict
from ra3_megatron.model.attention import packed_params
from ra3_megatron.model.factory import build_model, unwrap
from ra3_megatron.parallel.groups import Parallel, initialize, seed_everything
from ra3_megatron.report.environment import device_names, driver_version, package_versions

SHAPE = Architecture("qwen3", 2, 512, 8, 4, 64, 1536, 4096, True, False, True, max_positions=2048)
LENGTHS = (512, 256, 256)
TINY, TINY_LENGTHS = (
    Architecture("qwen3", 2, 64, 4, 2, 16, 128, 512, True, False, True, max_positions=128),
    (32, 16, 16),
)
LIMITS = {"local-bf16": 1e-2, "te-bf16": 1e-2}
"""Largest relative error of the logits; others are reported only."""


def logits_of(
    setting: str, parallel: Parallel, weights: dict[str, torch.Tensor] | None, a: Architecture, lengths: tuple[int, ...]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits [tokens, vocabulary] in fp32 on the host, after a backward pass that gave finite gradients, and the
    weights, in fp32 on the host; `weights` replace the random ones."""
    seed_everything(0, parallel)
    [chunk] = build_model(a, config_from_dict({"model": SETTINGS[setting]}).model, parallel)
    model = unwrap(chunk)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = parameter if weights is None else weights[name].to(parameter.device)
            parameter.copy_(value.bfloat16().to(parameter.dtype))
    kept = {name: p.detach().float().cpu() for name, p in model.named_parameters()}
    tokens = sum(lengths)
    ids = torch.randint(a.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)).to(parallel.device)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(parallel.device)
    out = chunk(ids, positions, None, packed_seq_params=packed_params(lengths, parallel.device)).float()
    out.logsumexp(-1).mean().backward()
    gradients = [p.grad for p in chunk.parameters() if p.grad is not None]
    if not gradients or not all(bool(torch.isfinite(g).all()) for g in gradients):
        raise RuntimeError("a gradient is not finite, or there is none")
    parallel.synchronize()
    return out.detach()[0].cpu(), kept


def main() -> None:
    options = parser_of(__doc__).parse_args()
    results = Results("smoke", options.results)
    if not can_run(results, options.tiny):
        return
    print("devices", device_names(), "driver", driver_version(), "packages", package_versions(), flush=True)
    with initialize() as parallel:
        what = (TINY, TINY_LENGTHS) if options.tiny else (SHAPE, LENGTHS)
        reference, weights = logits_of("local-fp32", parallel, None, *what)
        for setting in SETTINGS:
            if setting == "local-fp32":
                continue
            if why := why_not(setting):
                results.missing(setting, why)
                continue
            with results.case(setting):
                found, _ = logits_of(setting, parallel, weights, *what)
                error = float((found - reference).norm() / reference.norm())
                results.add(setting, error, "relative error of logits", most=LIMITS.get(setting))


if __name__ == "__main__":
    main()
