"""Packing: useful tokens over all positions, against padding each piece and against the bin-packing bound.

Usage: python benchmarks/packing.py [--seq-length 2048] [--tokenizer FOLDER] [--limit DOCUMENTS] [--workers N]
Without --tokenizer a byte-level BPE is trained on the corpus (the running interpreter's standard library).
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np

from ra3_megatron.config.data import CorpusConfig, DataConfig, TokenizerConfig
from ra3_megatron.data.packing import pack, padded
from ra3_megatron.data.prepare import prepare, prepare_tokenizer


def main() -> None:
    """Prepare the corpus, pack it and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seq-length", type=int, nargs="+", default=[512, 2048, 8192])
    parser.add_argument("--tokenizer", help="local folder with tokenizer.json")
    parser.add_argument("--limit", type=int, help="documents read at most")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--pad-multiple", type=int, nargs="+", default=[1, 16])
    arguments = parser.parse_args()
    kind = TokenizerConfig("hf", arguments.tokenizer) if arguments.tokenizer else TokenizerConfig("train_bpe")
    config = DataConfig(CorpusConfig(limit=arguments.limit), kind, workers=arguments.workers, validation_fraction=0.0)
    print(f"{'length':>7} {'pad to':>6} {'pieces':>7} {'tokens':>9} {'windows':>8} {'bound':>7} {'useful':>7} "
          f"{'of bound':>8} {'one per window':>14} {'cut anywhere':>12} {'pack s':>7} {'prepare s':>9}")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = prepare_tokenizer(config, Path(folder) / "tokenizer")
        for seq_length in arguments.seq_length:
            begin = time.perf_counter()
            corpus = prepare(config, tokenizer, seq_length, Path(folder) / "corpus")
            prepared = time.perf_counter() - begin
            lengths = corpus.train.lengths + corpus.train.ends_document
            for multiple in arguments.pad_multiple:
                begin = time.perf_counter()
                packing = pack(lengths, seq_length, multiple)
                seconds = time.perf_counter() - begin
                total = int(lengths.sum())
                # No packing needs fewer windows than the padded volume, nor than pieces longer than half a window.
                sizes = padded(lengths, multiple)
                bound = max(-(-int(sizes.sum()) // seq_length), int((sizes * 2 > seq_length).sum()))
                naive = total / (len(lengths) * seq_length)
                anywhere = total / (-(-total // seq_length) * seq_length)
                print(f"{seq_length:7d} {multiple:6d} {len(lengths):7d} {total:9d} {len(packing):8d} {bound:7d} "
                      f"{packing.useful:7.4f} {bound / len(packing):8.4f} {naive:14.4f} {anywhere:12.4f} "
                      f"{seconds:7.3f} {prepared:9.1f}")  # fmt: skip
                assert np.array_equal(np.sort(packing.order), np.flatnonzero(lengths))


if __name__ == "__main__":
    main()
