"""A stand-in for Transformer Engine on a CPU, put on the path by tests of how Megatron-Core and this project use it.

The real package refuses to build a module without CUDA. This one has the classes, signatures and state that are used,
computes with torch, and rounds through torch's float8 types where the real one multiplies in FP8. It tests wiring, not
kernels: those are `tests/gpu`, where the signatures here are compared with the real ones.
"""

from transformer_engine import common, pytorch

__version__ = "2.20.2"
__all__ = ["common", "pytorch"]
