"""Lecture 05: dropout from two streams of random numbers, `core.model.streams.RandomTracker`."""

from collections import defaultdict
from dataclasses import replace
from itertools import combinations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.mesh import Axis
from core.model.gpt import GPT, GPTConfig, materialize, use_masks
from core.model.seeded import generator
from core.model.streams import RandomTracker
from core.proof.lesson import Run
from megatron_tp.evidence.training import Parallelize

DROP = 0.2
INSIDE, OUTSIDE = "blocks.0.attention.scores", "blocks.0.attention"  # of the tensor-parallel region


class Recorded(RandomTracker):
    """Remembers the masks, by the name of the dropout."""

    def __init__(self, seed: int, axis: Axis, device: torch.device):
        super().__init__(seed, axis, device)
        self.masks: defaultdict[str, list[Tensor]] = defaultdict(list)

    def keep_mask(self, shape: torch.Size, drop: float, name: str, *where: object) -> Tensor:
        mask = super().keep_mask(shape, drop, name, *where)
        self.masks[name].append(mask.cpu())
        return mask


def _backward(block: nn.Module, x: Tensor, tracker: Recorded, recomputed: bool) -> list[Tensor]:
    """All gradients of one layer, and what is drawn for later between its forward and backward, and after it."""
    use_masks(block, tracker)
    again = {"use_reentrant": False, "context_fn": tracker.contexts}
    y = checkpoint(block, x, **again) if recomputed else block(x)
    tracker.keep_mask(x.shape, DROP, "later", None, x.device)  # must not disturb what is recomputed
    gradients = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    tracker.keep_mask(x.shape, DROP, "later", None, x.device)  # nor be disturbed by it
    return [*gradients, *tracker.masks["later"]]


def claim_streams(run: Run, config: GPTConfig, axis: Axis, parallelize: Parallelize) -> None:
    """Each of the two streams does on the ranks what it is for, and recomputation meets the same numbers again."""
    seed, device = run.args.seed, run.job.device
    config = replace(config, dropout=DROP, attention="softmax", layers=1)
    block = materialize(parallelize(GPT(config), axis), seed, device, run.dtype).blocks["0"]
    x = torch.randn(2, 16, config.hidden, dtype=torch.float64, generator=generator(seed, "x"))
    x = x.to(device, run.dtype).requires_grad_()
    tracker = Recorded(seed, axis, device)
    usual = _backward(block, x, tracker, recomputed=False)
    again = _backward(block, x, Recorded(seed, axis, device), recomputed=True)
    changed = sum((a.cpu() != b.cpu()).sum().item() for a, b in zip(usual, again, strict=True))
    everyone = run.job.gather((tracker.masks[INSIDE][0].flatten(), tracker.masks[OUTSIDE][0].flatten(), changed))
    if not everyone:
        return
    inside, outside, changed = zip(*everyone, strict=True)
    claim = run.evidence.claim
    pairs = [*combinations(range(len(everyone)), 2)]
    if pairs:
        different = sum(not torch.equal(outside[a], outside[b]) for a, b in pairs)
        shared = sum(torch.equal(inside[a], inside[b]) for a, b in pairs)
        claim("dropout outside: masks that two ranks draw differently", f"0 of {len(pairs)}", 0, different)
        claim("dropout of the scores: masks that two ranks share", f"0 of {len(pairs)}", 0, shared)
    shortest = min(inside[0].numel(), outside[0].numel())
    one = sum(torch.equal(a[:shortest], b[:shortest]) for a, b in zip(inside, outside, strict=True))
    claim("ranks whose two streams are one", "0", 0, one)
    for what, masks in (("scores", inside), ("outside", outside)):
        sigma = (DROP * (1 - DROP) / masks[0].numel()) ** 0.5
        kept = [mask.double().mean().item() for mask in masks]
        run.evidence.on_ranks(f"dropout, {what}: share kept", f"1 - {DROP}, within 6 sigma", 1 - DROP, kept, 6 * sigma)
    claim("elements that recomputation changes", "0, to the last bit", 0, sum(changed), correctness=True)
