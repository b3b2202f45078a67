"""The model: GPTModel from an architecture, layer specs for Transformer Engine and for torch, precision."""

import ra3_megatron.parallel  # noqa: F401  must come before the first import of Megatron-Core
