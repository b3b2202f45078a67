"""RA3 (Reasoning as Action Abstractions, arXiv 2509.25810) mid-training on Megatron-Core."""

__version__ = "0.1.0"
