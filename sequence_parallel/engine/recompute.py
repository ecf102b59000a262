"""Recomputation of activations: which a layer keeps, and which it computes again in backward.

    none        all are kept
    selective   attention's core is computed again: what it makes of Q, K and V. Korthikanti et al. 2022 (2205.05198), 5
    pointwise   the two norms, and GELU or SwiGLU: large and cheap, no matrix product. DeepSeek-V3 (2412.19437), 3.2.3;
                Megatron-LM's `--recompute-modules layernorm moe_act`
    operators   all but what matrix products and fused attention make or read: beside `pointwise` the norms and rotation
                of queries and keys, dropouts, and attention's core where it makes the matrix of scores. torchtitan's
                selective "op", which computes every second product again too
    full        all but the layer's input

Any of them in every k-th layer only (torchtitan's `selective_ac_option`).

What it adds to the plain one of `activations.py`: `torch.utils.checkpoint`, for selective and full, stops the second
forward as soon as it has what backward reads, and works under `torch.autograd.grad`. It restores torch's own generators
only, so `SampleMasks`, or the tracker of lecture 05, restores its own.

For the other two it does not do, because what is to be forgotten is saved *outside*, by the product that reads it. Nor
does torch's own selective kind (`create_selective_checkpoint_contexts`), which keeps results of single operators: our
layers send messages between a product and its result, in place, so the kept operator would be the product before its
sum, the message would be sent again, and what is kept would not pass the hooks by which saved bytes are counted. So
`Forgotten` does what Megatron-LM's `CheckpointWithoutOutput` does.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from core.model.gpt import GPT, Block, Dropout

KINDS = ("none", "selective", "pointwise", "operators", "full")


def recompute_block(block: Block, kind: str) -> Block:
    """Make one layer, sharded already, forget activations in forward and compute them again in backward."""
    assert kind in KINDS, kind
    attention = block.attention
    if kind == "selective" or (kind == "operators" and attention.explicit):
        attention.core = computed_twice(attention.core, attention.dropout)
    if kind == "full":
        block.forward = computed_twice(block.forward, block.attention_dropout)
    if kind in ("pointwise", "operators"):
        forget(block.attention_norm, "forward", attention)
        forget(block.mlp_norm, "forward", block.mlp)
        for mlp in [module for module in block.mlp.modules() if hasattr(module, "activation")]:
            forget(mlp, "activation", mlp.down)
    if kind == "operators":
        if attention.q_norm is not None:
            forget(attention, "placed", attention.out)
        for dropout in (block.attention_dropout, block.mlp_dropout):
            dropout.forward = partial(drawn_twice, dropout, dropout.forward)
    return block


def recompute(model: GPT, kind: str, every: int = 1) -> GPT:
    """The same for the model's layers, or those of a pipeline stage of it: of the whole model's every `every`-th."""
    for name, block in model.blocks.items():
        if is_recomputed(int(name), every):
            recompute_block(block, kind)
    return model


def is_recomputed(layer: int, every: int) -> bool:
    """Whether layer `layer`, from 0, is the last of `every` layers."""
    return layer % every == every - 1


def computed_twice(function: Callable[..., Tensor], dropout: Dropout) -> Callable[..., Tensor]:
    def call(*activations: Tensor, **options: Any) -> Tensor:
        again = partial(function, **options)
        restored = {"context_fn": dropout.masks.contexts} if dropout.masks else {}
        return checkpoint(again, *activations, use_reentrant=False, preserve_rng_state=False, **restored)

    return call


# ---- A dropout without its mask --------------------------------------------------------------------------------------


def drawn_twice(dropout: Dropout, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return _DrawnTwice.apply(x, dropout, forward) if dropout.training and dropout.drop else x


class _DrawnTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dropout: Dropout, forward: Callable[[Tensor], Tensor]) -> Tensor:
        _, ctx.same_masks = dropout.masks.contexts()
        ctx.dropped = forward
        return forward(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        with ctx.same_masks:
            return ctx.dropped(gradient), None, None  # it is linear, and is its own transpose


# ---- What a product has read, without it -----------------------------------------------------------------------------


def forget(module: nn.Module, name: str, user: nn.Module) -> None:
    """Empty what `module.name` returns when `user`, which reads it, has; and compute it again for `user`'s backward.

    Args:
        name: of a method that maps tensors, or None, to a tensor or several, draws nothing and sends nothing.
        user: whose result every gradient of it passes through.
    """
    function, calls = getattr(module, name), []

    def call(*inputs: Tensor | None) -> Tensor | tuple[Tensor, ...]:
        if not torch.is_grad_enabled():
            return function(*inputs)
        calls.append(Forgotten(function, inputs))
        return calls[-1].take()

    def used(_: nn.Module, __: object, result: Tensor) -> None:
        if calls:
            calls.pop().empty(result)

    setattr(module, name, call)
    user.register_forward_hook(used)


class _Inputs(torch.autograd.Function):
    """Saves tensors as any operation does, by the hooks that there are; its backward never runs."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor | None) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)


class _Saved:
    """What autograd has in place of a tensor that it saves: it drops this when it needs it no longer."""

    def __init__(self, forgotten: "Forgotten"):
        self.forgotten, self.tensor = forgotten, None


class Forgotten:
    """One call of a function, of which only the inputs are kept until backward: not what it saves, nor its results.

    The storages of its results are emptied when they have been used. Whoever has saved them for backward has them
    again, filled, when the gradient of what was made of them arrives.
    """

    def __init__(self, function: Callable[..., Any], inputs: tuple[Tensor | None, ...]):
        self.function, self.saved = function, []
        self.trained = [x is not None and x.requires_grad for x in inputs]
        self.inputs = _Inputs.apply(torch.empty(0, requires_grad=True), *inputs).grad_fn
        with saved_tensors_hooks(self._pack, self._unpack):
            self.result = function(*inputs)

    def take(self) -> Tensor | tuple[Tensor, ...]:
        """The results, which this object has then without their graph, which has this object."""
        result = self.result
        self.results = [y.detach() for y in (result if isinstance(result, tuple) else (result,))]
        self.result = None
        for y in self.results:
            assert y.nbytes == y.untyped_storage().nbytes(), "not all of its storage"
            y.untyped_storage().emptied = True
        return result

    def empty(self, used: Tensor) -> None:
        """They have been used, for `used`: when its gradient arrives they are read again."""
        if not used.requires_grad:
            return
        used.register_hook(lambda gradient: self.compute_again())
        for y in self.results:
            y.untyped_storage().resize_(0)

    def compute_again(self) -> None:
        """Fill the results, and have what backward reads; once, and then forget how."""
        if self.inputs is None:
            return
        kept, again = self.inputs.saved_tensors, []
        inputs = [x if x is None else x.detach().requires_grad_(t) for x, t in zip(kept, self.trained, strict=True)]
        with torch.enable_grad(), saved_tensors_hooks(lambda t: again.append(t.detach()), lambda _: None):
            result = self.function(*inputs)
        for saved, tensor in zip(self.saved, again, strict=True):
            if place := saved():  # else what saved it is not part of the graph
                place.tensor = tensor
        with torch.no_grad():
            for y, value in zip(self.results, result if isinstance(result, tuple) else (result,), strict=True):
                y.untyped_storage().resize_(value.nbytes)
                y.data.copy_(value)  # not a change of what is saved: its version stays
                y.untyped_storage().emptied = False
        self.inputs, self.results = None, []

    def _pack(self, _: Tensor) -> _Saved:
        place = _Saved(self)
        self.saved.append(weakref.ref(place))
        return place

    def _unpack(self, place: _Saved) -> Tensor:
        self.compute_again()
        return place.tensor
