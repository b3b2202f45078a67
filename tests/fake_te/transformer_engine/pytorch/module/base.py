"""The stand-in gradient of a weight whose real one was added to `main_grad`."""

import torch


def get_dummy_wgrad(shape, dtype, zero=False):
    return torch.zeros(shape, dtype=dtype)
