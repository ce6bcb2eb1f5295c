"""Block quantization of the weights as the product does it, simulated in fp32.

Each row is cut along K, the input dimension, into blocks of 32, each with a scale of its own."""

from contextlib import contextmanager

import torch

BLOCK = 32


def blocks(weight: torch.Tensor) -> torch.Tensor:
    assert weight.shape[-1] % BLOCK == 0
    return weight.reshape(-1, BLOCK)


def int4(weight: torch.Tensor) -> torch.Tensor:
    """Round to nearest, symmetric: the element of largest magnitude, with its sign, becomes -8."""
    x = blocks(weight)
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    scale = largest / -8
    steps = torch.where(scale == 0, 0.0, x / torch.where(scale == 0, 1.0, scale)) + 8
    # From 0 to 16: half away from zero is half up.
    q = torch.floor(steps + 0.5).clamp(0, 15)
    return ((q - 8) * scale).reshape(weight.shape)


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Round to nearest, symmetric: the largest magnitude becomes 127."""
    x = blocks(weight)
    scale = x.abs().amax(-1, keepdim=True) / 127
    q = torch.round(x / torch.where(scale == 0, 1.0, scale)).clamp(-127, 127)
    return (q * scale).reshape(weight.shape)


def matrices(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What is quantized: every linear layer, and the embedding, which is the head as well."""
    return [weight for weight in model.parameters() if weight.dim() == 2]


@contextmanager
def fake_int4(model: torch.nn.Module, on: bool):
    """Within, the model computes with int4 weights; gradients go to the full ones (straight-through)."""
    if not on:
        yield
        return
    full = [(weight, weight.data) for weight in matrices(model)]
    for weight, data in full:
        weight.data = int4(data)
    try:
        yield
    finally:
        for weight, data in full:
            weight.data = data
