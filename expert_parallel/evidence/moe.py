"""What `moe.py` shows and claims: which rows an expert gets; the parameters of E MLPs for the work of k."""

from dataclasses import replace

import torch
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from core.model.gpt import GPT, MLP, GPTConfig, materialize
from core.model.text import Text
from core.proof.figures import grid
from core.proof.lesson import Run
from expert_parallel.engine.moe import MoE, order_of, to_moe
from expert_parallel.engine.router import Choice
from expert_parallel.engine.routing import MoEConfig


def first_layer(run: Run, config: GPTConfig, moe: MoEConfig) -> tuple[GPT, MoE]:
    """A real model, and its first mixture."""
    model = materialize(to_moe(GPT(config), moe), run.args.seed, run.job.device, run.precision)
    return model, next(block.mlp for block in model.blocks.values() if isinstance(block.mlp, MoE))


def show_routed_tokens(run: Run, config: GPTConfig, moe: MoEConfig) -> None:
    """Some tokens, their experts, and their rows."""
    model, layer = first_layer(run, config, moe)
    made: list[Choice] = []
    layer.router.register_forward_hook(lambda _, __, choice: made.append(choice))
    inputs, _ = Text(run.args.data, config.sequence).batch(run.args.seed, 0, 1)
    inputs = inputs[:, :8].to(run.job.device)
    model(inputs)
    order, counts = order_of(made[0], moe.routing.experts)
    rows = zip(inputs[0].tolist(), made[0].experts.tolist(), made[0].weights.tolist(), strict=True)
    by_token = [
        (t, repr(chr(byte)), " ".join(map(str, experts)), " ".join(f"{weight:.2f}" for weight in weights))
        for t, (byte, experts, weights) in enumerate(rows)
    ]
    blocks = (order // moe.routing.top_k).split(counts.tolist())
    by_expert = [(e, len(block), " ".join(map(str, block.tolist()))) for e, block in enumerate(blocks)]
    run.say("the first layer at the start: some tokens and their experts")
    run.say(tabulate(by_token, ("token", "byte", "experts", "weights"), disable_numparse=True))
    if run.job.rank == 0:
        colours = [(str(t), str(t % 8)) for t in range(len(by_token))]
        most = max(map(len, blocks))
        cells = [
            (f"expert {e}", [colours[t] for t in block.tolist()] + [("", None)] * (most - len(block)))
            for e, block in enumerate(blocks)
        ]
        legend = {str(t): f"{t}: {byte} → {experts} ({weights})" for t, byte, experts, weights in by_token}
        title = "Tokens permuted by expert: the rows of each", "按专家重排后的 token：每个专家的行"
        run.draw(grid(title, ("expert", "专家"), [str(i) for i in range(most)], cells, legend))
    run.say("\npermuted by expert: one block of rows for each")
    run.say(tabulate(by_expert, ("expert", "rows", "tokens"), disable_numparse=True) + "\n")


def claim_work(run: Run, config: GPTConfig, moe: MoEConfig) -> None:
    """The parameters of E MLPs for the work of k."""
    _, layer = first_layer(run, config, moe)
    with torch.device("meta"):
        dense = MLP(replace(config, feed_forward=layer.experts.up.weight.shape[1]))
    tokens = torch.zeros(config.sequence, config.hidden, device=run.job.device)
    e, k, rows = moe.routing.experts, moe.routing.top_k, config.sequence * moe.routing.top_k
    counts = [rows // e + (1 if i < rows % e else 0) for i in range(e)]
    with FlopCounterMode(display=False) as of_experts:
        layer.experts.float()(tokens.repeat_interleave(k, 0), counts)  # of its grouped_mm torch counts none
    with FlopCounterMode(display=False) as of_dense:
        dense(tokens.to("meta"))
    claim, size = run.evidence.claim, sum(p.numel() for p in layer.experts.parameters())
    one = sum(p.numel() for p in dense.parameters())
    claim("parameters of the experts, in MLPs", f"E = {e}", e, size / one)
    claim("their FLOPs for a token, in MLPs", f"k = {k}", k, of_experts.get_total_flops() / of_dense.get_total_flops())
