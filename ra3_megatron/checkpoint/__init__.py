"""Checkpoints: distributed save and load, train state, retention, verification; Hugging Face in and out."""

import ra3_megatron.parallel  # noqa: F401  must come before the first import of Megatron-Core
