"""Train a tiny model from Python instead of the command line, and load what came out with transformers.

    python examples/train_from_python.py [FOLDER_OF_PYTHON_FILES]

Without a folder it takes the JSON package of this interpreter's library. Takes about a minute on a laptop.
"""

import json
import sys
import tempfile
from pathlib import Path

from ra3_megatron.config.run import config_from_dict
from ra3_megatron.report.schema import read_metrics
from ra3_megatron.stages import pipeline


def main() -> None:
    code = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(json.__file__).parent
    run_dir = Path(tempfile.mkdtemp(prefix="ra3-example-")) / "run"
    config = config_from_dict(
        {
            "run": {"dir": str(run_dir), "arms": ["ntp"]},
            "model": {"architecture": {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "head_dim": 16,
                                       "ffn_hidden_size": 128, "vocab_size": 512}},
            "data": {"corpus": {"kind": "folder", "path": str(code)},
                     "tokenizer": {"kind": "train_bpe", "vocab_size": 512},
                     "validation_fraction": 0.0, "workers": 1},
            "train": {"seq_length": 256, "micro_batch_size": 2, "global_batch_size": 4, "steps": 40},
            "optimizer": {"lr": 5e-3, "warmup_steps": 4},
        },
        ["report.interval=10", "checkpoint.interval=20"],  # overrides as on the command line
    )  # fmt: skip
    pipeline.run(config)

    losses = [r["loss"] for r in read_metrics(run_dir / "01-ntp" / "metrics.jsonl") if "loss" in r]
    print(f"loss of the first step {losses[0]:.3f}, of the last {losses[-1]:.3f} nats per token")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported = run_dir / "02-export" / "hf"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(exported), AutoTokenizer.from_pretrained(exported)
    prompt = tokenizer("def ", return_tensors="pt")
    print(tokenizer.decode(model.generate(**prompt, max_new_tokens=24, do_sample=False)[0]))


if __name__ == "__main__":
    main()
