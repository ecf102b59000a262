"""LayerNorm and RMSNorm. Of 16 bits they are computed in 32: a weight's gradient is a sum over all tokens, which 16
would not hold. What they save is x as it is, where autograd would save it in 32 bits.
"""

from typing import Any

import torch
from torch import Tensor, nn

from core.model.config import ModelConfig
from core.model.precision import wide


class LayerNorm(nn.LayerNorm):
    """torch's, and in 32 bits inside."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4:
            return super().forward(x)
        return _WideLayerNorm.apply(x, self.weight, self.bias, self.eps)


class _WideLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        y, mean, deviation = torch.native_layer_norm(wide(x), weight.shape, wide(weight), wide(bias), eps)
        ctx.save_for_backward(x, weight, bias, mean, deviation)
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, deviation = ctx.saved_tensors
        gradients = torch.ops.aten.native_layer_norm_backward(
            wide(gradient), wide(x), weight.shape, mean, deviation, wide(weight), wide(bias), ctx.needs_input_grad[:3]
        )
        return *(None if g is None else g.to(x.dtype) for g in gradients), None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, any shape to the same. 1910.07467, equation 4."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale = (wide(x).square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (wide(x) * scale * wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        unit, gradient, of_x, of_weight = wide(x) * scale, wide(gradient), None, None
        if ctx.needs_input_grad[0]:
            of_unit = gradient * wide(weight)
            of_x = (scale * (of_unit - unit * (of_unit * unit).mean(-1, keepdim=True))).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * unit).reshape(-1, len(weight)).sum(0).to(weight.dtype)
        return of_x, of_weight, None


def norm_of(config: ModelConfig) -> LayerNorm | RMSNorm:
    """The model's kind, of H features."""
    if config.norm == "rms":
        return RMSNorm(config.hidden, config.norm_eps)
    return LayerNorm(config.hidden, config.norm_eps)
