"""Lecture 06: activation memory and recomputation (Megatron-LM SP 代码解析). Korthikanti et al. 2022 (2205.05198).

    torchrun --nproc_per_node=8 sequence_parallel/activations.py

The bytes that one layer keeps for backward, in bfloat16, by the paper's table 2, with tensor parallelism, sequence
parallelism, and recomputation; counted as autograd saves them. Selective recomputation forgets what attention makes
between Q, K, V and its output, which is large (5as/h of 34 + 5as/h) and cheap to compute again. Full recomputation
forgets all of a layer but its input. Between the two are policies by operator: what is pointwise, norms and GELU or
SwiGLU (12 of the 34), costs no matrix product. None changes anything: with it a model trains as one process does,
dropout included, and the gradients of a layer are the same to the last bit.

read: activations.py:38-98; then engine/recompute.py, engine/layers.py

b samples, s tokens in a sample, h hidden, a heads, t ranks
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Axis, Mesh
from core.model.gpt import GPT
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker
from core.proof.arguments import add_model_flags, configuration
from core.proof.lesson import Lesson, Run
from sequence_parallel import megatron_sp
from sequence_parallel.engine.recompute import KINDS
from sequence_parallel.evidence import activations, rules
from sequence_parallel.evidence.training import compare, tensor_engine, tensor_version


def table_2(a: int, s: int, h: int, t: int) -> dict[str, tuple[str, float]]:
    """The paper's bytes of one layer in units of sbh: by mode its formula and value.

    2 bytes an activation, 1 a dropout mask. 34 = attention 11 (2 LayerNorm's output, 6 Q K V, 2 output, 1 mask)
    + MLP 19 (2 LayerNorm's output, 8 before and 8 after GELU, 1 mask) + LayerNorms' inputs 4.
    """
    scores = 5 * a * s / h  # softmax 2, its mask 1, dropped 2: of (b, a, s, s)
    return {
        "one process": ("34 + 5as/h", 34 + scores),
        "TP": ("10 + 24/t + 5as/(ht)", 10 + 24 / t + scores / t),
        "TP + SP": ("(34 + 5as/h)/t", (34 + scores) / t),
        "TP + SP, plain": ("4 + (30 + 5as/h)/t", 4 + (30 + scores) / t),  # saves both gathered inputs
        "TP, selective": ("10 + 24/t", 10 + 24 / t),
        "TP + SP, selective": ("34/t", 34 / t),
        "TP, pointwise": ("6 + 16/t + 5as/(ht)", 6 + 16 / t + scores / t),  # without norms' outputs 4 and GELU's 8
        "TP + SP, pointwise": ("(22 + 5as/h)/t", (22 + scores) / t),
        "TP, operators": ("4 + 16/t", 4 + 16 / t),  # nor masks 2, nor what attention makes
        "TP + SP, operators": ("20/t", 20 / t),
        "TP, full": ("2", 2),
        "TP + SP, full": ("2/t", 2 / t),
    }


class Recompute(torch.autograd.Function):
    """Saves the inputs of `function` and nothing that it makes; backward calls it again, this time under autograd."""

    @staticmethod
    def forward(
        ctx: Any, function: Callable[..., Tensor], masks: SampleMasks | RandomTracker, *inputs: Tensor
    ) -> Tensor:
        ctx.function = function
        _, ctx.same_masks = masks.contexts()  # backward must drop what forward has dropped
        ctx.save_for_backward(*inputs)
        return function(*inputs)  # autograd is off in a forward: nothing is saved

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad(), ctx.same_masks:
            y = ctx.function(*inputs)
        torch.autograd.backward(y, gradient)  # also adds to the gradients of the layer's parameters
        return None, None, *(x.grad for x in inputs)


def recompute(model: GPT, kind: str) -> GPT:
    """Let every layer forget: "selective" the attention core, "full" all but the layer's input, "none" nothing.

    What a product reads of a pointwise function the product saves, not the function: that is for the engine.
    """

    def again(function: Callable[..., Tensor], layer: torch.nn.Module) -> Callable[..., Tensor]:
        return lambda *inputs, **options: Recompute.apply(
            partial(function, **options), layer.mlp_dropout.masks, *inputs
        )

    for layer in model.blocks.values():
        if kind == "selective":
            layer.attention.core = again(layer.attention.core, layer)
        if kind == "full":
            layer.forward = again(layer.forward, layer)
    return model


# ---- The lesson ------------------------------------------------------------------------------------------------------


def lesson(run: Run) -> None:
    config, kind = configuration(run.args), run.args.recompute
    axis = Mesh(run.job.device.type, Ledger(), run.job.timeout, tp=run.job.world_size)["tp"]

    def parallelize(model: GPT, axis: Axis) -> GPT:
        return recompute(megatron_sp.parallelize(model, axis), kind)

    of_megatron = megatron_sp.token_loss, megatron_sp.sum_replicated_gradients
    plain = partial(tensor_version, run, config, axis, parallelize, *of_megatron)
    versions = {"engine": tensor_engine(run, config, axis, megatron_sp.token_loss, kind)}
    if kind in ("none", "selective", "full"):
        versions = {"plain": plain()} | versions
    computed = {name: activations.count_computed(version.model) for name, version in versions.items()}
    compare(run, config, axis, versions)
    activations.claim_computed(run, config, computed)
    paper = table_2(config.heads, run.args.sequence, config.hidden, axis.size)
    expected = paper if run.args.model == "gpt" else activations.table_of_llama(config, run.args.batch, axis.size)
    activations.claim_bytes(run, config, axis, expected, megatron_sp.parallelize)
    activations.claim_flops(run, config, axis)
    activations.claim_same_gradients(run, config, axis)


if __name__ == "__main__":
    frame = Lesson(
        __file__,
        "06",
        "Activation memory and recomputation",
        "Megatron-LM SP 代码解析",
        "The bytes that a layer keeps for backward, less with tensor and sequence parallelism and with recomputation.",
    )
    add_model_flags(frame, layers=1, batch=1, attention="softmax", dropout=0.1)
    frame.parser.set_defaults(steps=5)
    frame.parser.add_argument("--recompute", choices=KINDS, default="full", help="in training (default %(default)s)")
    sys.exit(frame.main(rules.activations, lesson))
