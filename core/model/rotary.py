"""Rotary positions: features (i, i + D/2) of a query or key are a pair, rotated by position x frequency i. 2104.09864.

Frequencies, angles, cosines and sines are float32 in every precision, as in the published implementations, so that
float64 is of the model that is trained. Queries and keys are rotated in float32, or in float64 if they are that.

S sequence, D head size
"""

import math

import torch
from torch import Tensor, nn

from core.model.config import Llama3Scaling, ModelConfig, YarnScaling
from core.model.documents import restarted
from core.model.precision import wide


class Rotary(nn.Module):
    """Queries and keys (B, A or K, S, D) to the same, rotated. No parameters; layers may share one and its table."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.table = torch.empty(2, 0, 0, device="cpu")  # cosines and sines (2, positions, D/2) of the first positions
        self.last: tuple[object, Tensor | None] = (None, None)  # of which tokens the last ones were

    def positions(self, length: int) -> Tensor:
        """Which tokens of the sample these are, int64 (S). Whoever shards the sequence puts another in its place."""
        return torch.arange(length)

    def forward(self, q: Tensor, k: Tensor, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """With `starts` of `core.model.documents`, (B, all tokens), positions are those in the documents."""
        length = q.shape[-2]
        if starts is not None:
            cos, sin = self._of(restarted(self.positions(length), starts), length)  # (B, S, D/2) each
            return rotated(q, cos, sin), rotated(k, cos, sin)
        tokens = self.positions, length, q.device
        if self.last[0] != tokens:  # else they are those of the layer before, and saved for backward once
            self.last = tokens, self._of(self.positions(length).to(q.device), length)
        cos, sin = self.last[1]  # (S, D/2) each
        return rotated(q, cos, sin), rotated(k, cos, sin)

    def _of(self, positions: Tensor, length: int) -> Tensor:
        self._reach(max(self.config.sequence, length), positions.device)  # a dry run's positions have no numbers
        return self.table[:, positions]

    def _reach(self, length: int, device: torch.device) -> None:
        """Have so many positions in the table."""
        if self.table.shape[1] < length or self.table.device != device:
            radians, factor = frequencies(self.config, device)
            angles = torch.arange(length, device=device).unsqueeze(-1) * radians
            self.table = torch.stack((angles.cos() * factor, angles.sin() * factor))


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, A, S, D) by the angles of (S, D/2) or (B, S, D/2).

    In memory the result is (B, S, A, D), as what linear layers make: so is then the output of attention, and its linear
    layer needs no copy of it.
    """
    first, second = wide(x).transpose(1, 2).chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype).transpose(1, 2)


def frequencies(config: ModelConfig, device: torch.device) -> tuple[Tensor, float]:
    """Radians a token of each pair, float32 (D/2), the fastest first; and the factor of cosines and sines."""
    d, scaling = config.rotary_dim, config.rope_scaling
    periods = config.rope_theta ** (torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)  # tokens a radian
    if isinstance(scaling, Llama3Scaling):
        return _llama3(1.0 / periods, scaling), 1.0
    if isinstance(scaling, YarnScaling):
        return _yarn(periods, scaling, config), scaling.attention_factor
    assert scaling is None, scaling
    return 1.0 / periods, 1.0


def _llama3(radians: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Pairs that turn `high` times or more in the original sequence stay as they are; up to `low`, they are slowed."""
    turns = scaling.original / (2 * math.pi / radians)
    kept = ((turns - scaling.low) / (scaling.high - scaling.low)).clamp(0.0, 1.0)
    return (1 - kept) * radians / scaling.factor + kept * radians


def _yarn(periods: Tensor, scaling: YarnScaling, config: ModelConfig) -> Tensor:
    """The same, but linear in the number of the pair instead of its turns. 2309.00071, section 3.2."""

    d = config.rotary_dim

    def pair(turns: float) -> float:
        """Which pair turns so many times in the original sequence."""
        return d * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    first, last = pair(scaling.fast), pair(scaling.slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, d - 1)
    pairs = torch.arange(len(periods), dtype=torch.float32, device=periods.device)
    kept = 1 - ((pairs - first) / ((last - first) or 0.001)).clamp(0.0, 1.0)
    return 1.0 / (scaling.factor * periods) * (1 - kept) + 1.0 / periods * kept
