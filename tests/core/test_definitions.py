"""The model, its dropout, its text and its start values against definitions written out here.

Ranks and oracle share all of these, so that a bug in one of them is in both, and "equals one process" cannot see it.
"""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from core.ledger import Ledger
from core.mesh import Mesh
from core.model.gpt import GPT, Dropout, GPTConfig, LayerNorm, initial_value, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks
from core.model.streams import RandomTracker
from core.model.text import Text
from tests.pool import Pool

CPU = torch.device("cpu")
DROP = 0.3


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


# ---- The model


def norm_by_definition(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """1607.06450, with the variance of all H features, and PyTorch's and GPT-2's epsilon."""
    centred = x - x.sum(-1, keepdim=True) / x.shape[-1]
    return centred / (centred.square().sum(-1, keepdim=True) / x.shape[-1] + 1e-5).sqrt() * weight + bias


def attention_by_definition(x: Tensor, p: dict[str, Tensor], heads: int, drop: Tensor) -> Tensor:
    """1706.03762, section 3.2, query by query; `drop` (B, A, S, S) is what the probabilities are multiplied by."""
    size, rows = x.shape[-1] // heads, []
    for head in range(heads):
        of_q, of_k, of_v = (3 * size * head + size * i + torch.arange(size) for i in range(3))
        q, k, v = (x @ p["qkv.weight"][of].T + p["qkv.bias"][of] for of in (of_q, of_k, of_v))
        out = []
        for i in range(x.shape[1]):
            scores = (q[:, i : i + 1] * k[:, : i + 1]).sum(-1) / math.sqrt(size)
            probabilities = scores.exp() / scores.exp().sum(-1, keepdim=True) * drop[:, head, i, : i + 1]
            out.append((probabilities.unsqueeze(-1) * v[:, : i + 1]).sum(1))
        rows.append(torch.stack(out, 1))
    return torch.cat(rows, -1) @ p["out.weight"].T + p["out.bias"]


def model_by_definition(p: dict[str, Tensor], tokens: Tensor, config: GPTConfig, masks: SampleMasks) -> Tensor:
    """GPT-2: pre-LN layers, exact GELU, learned positions, a head that is the embedding; four dropouts."""

    def scale(name: str, *shape: int) -> Tensor:
        kept = masks.keep_mask(torch.Size((len(tokens), *shape)), config.dropout, name, None, CPU)
        return kept.double() / (1 - config.dropout)

    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(f"{prefix}."): value for name, value in p.items() if name.startswith(f"{prefix}.")}

    def norm(name: str) -> Tensor:
        return norm_by_definition(x, p[f"{name}.weight"], p[f"{name}.bias"])

    s, h = tokens.shape[1], config.hidden
    x = p["embed.token.weight"][tokens] + p["embed.position.weight"][:s]
    x = x * scale("embed", s, h)
    for i in range(config.layers):
        layer = f"blocks.{i}"
        drop = scale(f"{layer}.attention.scores", config.heads, s, s)
        y = attention_by_definition(norm(f"{layer}.attention_norm"), part(f"{layer}.attention"), config.heads, drop)
        x = x + y * scale(f"{layer}.attention", s, h)
        y = norm(f"{layer}.mlp_norm") @ p[f"{layer}.mlp.up.weight"].T + p[f"{layer}.mlp.up.bias"]
        y = y * (1 + torch.erf(y / math.sqrt(2))) / 2
        y = y @ p[f"{layer}.mlp.down.weight"].T + p[f"{layer}.mlp.down.bias"]
        x = x + y * scale(f"{layer}.mlp", s, h)
    return norm("norm") @ p["embed.token.weight"].T


@pytest.mark.parametrize(("attention", "dropout"), [("sdpa", 0.0), ("softmax", 0.0), ("softmax", DROP)])
def test_the_model_is_its_definition(attention: str, dropout: float) -> None:
    """Logits, loss and all gradients. The bug: dropout without 1/(1-p), in any of its four places."""
    config = GPTConfig(40, 7, 12, 2, 3, feed_forward=20, attention=attention, dropout=dropout)
    model = materialize(GPT(config), 0, CPU, torch.float64)
    for p in model.parameters():  # larger than at the start, so that GELU and softmax are far from linear
        p.data.add_(0.3 * seeded(*p.shape, seed=p.numel()))
    tokens, targets = torch.randint(40, (2, 3, 6), generator=torch.Generator().manual_seed(0))
    masks = use_masks(model, SampleMasks(5, step=2))
    p = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    logits, exact = model(tokens), model_by_definition(p, tokens, config, masks)
    torch.testing.assert_close(logits, exact, rtol=1e-11, atol=1e-11)
    chosen = exact.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    right = (exact.exp().sum(-1).log() - chosen).sum() / 24  # of a global batch of 24 tokens, 18 are here
    loss = token_loss(logits, targets, 24)
    assert loss.item() == pytest.approx(right.item(), rel=1e-12)
    loss.backward()
    right.backward()
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, p[name].grad, rtol=1e-9, atol=1e-11, msg=name)


def test_the_loss_of_sixteen_bits_is_computed_in_32() -> None:
    logits, targets = seeded(2, 9, 300).bfloat16(), torch.arange(18).view(2, 9)
    exact = -logits.double().softmax(-1).gather(-1, targets.unsqueeze(-1)).log().sum() / 18
    loss = token_loss(logits, targets, 18)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)


# ---- LayerNorm


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layer_norm_is_its_definition(dtype: torch.dtype, trained: tuple[bool, bool, bool]) -> None:
    """The output and all gradients of those of (x, weight, bias) that are trained, against float64.

    Of 16 bits each is rounded once: that of the weight is a sum over 3000 tokens, which 16 bits would get wrong by 0.1.
    """
    layer = LayerNorm(48)
    layer.weight.data, layer.bias.data = 1 + 0.1 * seeded(48), seeded(48, seed=1)
    layer.to(dtype)
    x = (3 + seeded(3, 1000, 48, seed=2)).to(dtype)
    x[0, 0] = x[0, 1] = 0.0
    x[0, 0, 0] = 2**-7  # its variance is not large against epsilon, and that of the second is 0
    leaves = (x, layer.weight, layer.bias)
    for leaf, is_trained in zip(leaves, trained, strict=True):
        leaf.requires_grad_(is_trained)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    upstream = seeded(*x.shape, seed=3).to(dtype)
    y, exact = layer(x), norm_by_definition(*wide)
    assert y.dtype == dtype
    rounding, small = (torch.finfo(dtype).eps, 0.01) if dtype.itemsize == 2 else (100 * torch.finfo(dtype).eps, 1.0)
    apart = (y - exact).abs() / (exact.abs() + small)
    assert apart.max().item() < rounding
    if not any(trained):
        assert not y.requires_grad
        return
    y.backward(upstream)
    right = torch.autograd.grad(exact, wide, upstream.double())
    for leaf, of_leaf, is_trained in zip(leaves, right, trained, strict=True):
        assert (leaf.grad is not None) == is_trained
        if is_trained:
            assert leaf.grad.dtype == dtype
            assert off(leaf.grad, of_leaf) < rounding / 2


# ---- Dropout


def dropped(x: Tensor, name: str = "x", step: int = 0, first: int = 0, seed: int = 0) -> Tensor:
    layer = Dropout(DROP, name)
    use_masks(layer, SampleMasks(seed, step, first))
    return layer(x)


def test_dropout_of_ones_is_0_or_its_inverse() -> None:
    """The bug: without 1/(1-p), so that the mean is 1 - p in training and 1 afterwards."""
    x = torch.ones(4, 50, 60, dtype=torch.float64, requires_grad=True)
    y = dropped(x)
    assert sorted(y.unique().tolist()) == pytest.approx([0.0, 1 / (1 - DROP)], rel=1e-14)
    sigma = math.sqrt(DROP / (1 - DROP) / x.numel())  # of the mean of the outputs
    assert abs(y.mean().item() - 1) < 4 * sigma
    for sample in y:
        assert abs(sample.mean().item() - 1) < 8 * sigma
    y.sum().backward()
    assert torch.equal(x.grad, y), "the gradient passes the same mask, scaled alike"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_type(dtype: torch.dtype) -> None:
    assert dropped(torch.ones(2, 3, 4, dtype=dtype)).dtype == dtype


def test_dropout_is_nothing_in_evaluation_or_with_p_0() -> None:
    x = seeded(2, 3, 4)
    for layer in (Dropout(0.0, "x"), Dropout(DROP, "x").eval()):
        assert torch.equal(layer(x), x)


def test_masks_are_independent_of_each_other() -> None:
    """Of two different ones 2p(1-p) of the entries differ: more or fewer mean that one is drawn from the other."""
    x = torch.ones(3, 40, 50)
    others = [{"name": "y"}, {"step": 1}, {"first": 3}, {"seed": 1}]
    masks = [dropped(x) > 0, *(dropped(x, **each) > 0 for each in others)]
    samples = [sample for mask in masks for sample in mask]  # also of one forward
    for a, b in itertools.combinations(samples, 2):
        assert (a != b).double().mean().item() == pytest.approx(2 * DROP * (1 - DROP), abs=0.055)


def test_no_two_dropouts_of_the_model_have_one_name() -> None:
    model = GPT(GPTConfig(layers=3, dropout=DROP, attention="softmax"))
    names = [module.name for module in model.modules() if isinstance(module, Dropout)]
    assert len(names) == len(set(names)) == 1 + 3 * 3


def test_masks_are_the_same_in_every_layout() -> None:
    """Ranks by `seek`, micro-batches by `at`, shards by `split`: together what one process drops, each by itself."""
    full = dropped(torch.ones(8, 6, 4), step=3)
    found = torch.zeros_like(full)
    for rank, micro, shard in itertools.product(range(2), range(2), range(3)):
        layer = Dropout(DROP, "x")
        masks = use_masks(layer, SampleMasks(0))
        masks.seek(3, 4 * rank)
        masks.at(2 * micro)
        layer.split = (1, shard, 3)
        first = 4 * rank + 2 * micro
        found[first : first + 2, 2 * shard : 2 * shard + 2] = layer(torch.ones(2, 2, 4))
    assert torch.equal(found, full)


def tracked() -> list[tuple[list[float], float]]:
    """Values and mean of dropout under the tracker, replicated and sharded."""
    tracker, found = RandomTracker(0, Mesh("cpu", Ledger(), 30.0, tp=2)["tp"], CPU), []
    for split in (None, (1, 0, 2)):
        layer = Dropout(DROP, "x")
        layer.split, layer.masks = split, tracker
        y = layer(torch.ones(4, 50, 60, dtype=torch.float64))
        found.append((sorted(y.unique().tolist()), y.mean().item()))
    return found


def test_dropout_with_the_tracker(pool: Pool) -> None:
    (same, other), (same_again, another) = pool.run(2, tracked)
    assert same == same_again
    assert other != another
    for values, mean in (same, other, another):
        assert values == pytest.approx([0.0, 1 / (1 - DROP)], rel=1e-14)
        assert mean == pytest.approx(1.0, abs=0.025)


# ---- Text


@pytest.fixture
def positions(tmp_path: Path) -> str:
    """A text whose bytes say where they are."""
    path = tmp_path / "text"
    path.write_bytes(bytes(range(250)))
    return str(path)


@pytest.mark.parametrize("share", [0.1, 0.25, 0.104])
def test_no_window_reaches_into_the_other_split(positions: str, share: float) -> None:
    """The bug: the training text keeps the held-out part, and the loss of validation is that of training."""
    splits = Text(positions, 7).split(share)
    end = 250 - int(250 * share)
    assert [len(each.tokens) for each in splits] == [end, 250 - end]
    assert torch.equal(torch.cat([each.tokens for each in splits]), torch.arange(250, dtype=torch.uint8))
    for text, (low, high) in zip(splits, ((0, end), (end, 250)), strict=True):
        inputs, targets = text.batch(0, 0, 4000)
        assert torch.equal(inputs, inputs[:, :1] + torch.arange(7)), "what follows each other in the text"
        assert torch.equal(targets, inputs + 1), "the target is the byte that follows"
        # Every window is drawn, the last of which ends with the last byte as a target; none beyond.
        assert sorted(set(inputs[:, 0].tolist())) == list(range(low, high - 7))


def test_the_help_texts_split_is_complete() -> None:
    text = Text(None, 64)
    training, held_out = text.split(0.1)
    assert len(training.tokens) + len(held_out.tokens) == len(text.tokens)
    assert len(held_out.tokens) == len(text.tokens) // 10
    assert bytes(held_out.tokens[:65].tolist()) not in bytes(training.tokens.tolist())


def test_batches_of_the_same_step_are_drawn_anew_for_every_step(positions: str) -> None:
    """64 starts of 243: how many two steps have at the same place is a matter of chance, not all or none."""
    text = Text(positions, 7)
    starts = [text.batch(0, step, 64)[0][:, 0] for step in range(20)]
    equal = [(a == b).sum().item() for a, b in itertools.combinations(starts, 2)]
    assert max(equal) < 8
    assert torch.cat(starts).double().mean().item() == pytest.approx(121, abs=10)


# ---- Start values


def test_start_values_are_gpt2s() -> None:
    """Radford et al. 2019, and OpenAI's code: 0.02 everywhere, but 0.02/sqrt(2L) where a layer adds to the residual."""
    config = GPTConfig(512, 128, 128, 3, 4, tied=False, head_bias=True)
    firsts = set()
    for name, meta in GPT(config).named_parameters():
        value, n = initial_value(name, meta.shape, config, 0), meta.numel()
        residual = name.startswith("blocks") and name.split(".", 2)[2] in ("attention.out.weight", "mlp.down.weight")
        std, mean = 0.02 / math.sqrt(6) if residual else 0.02, 1.0 if name.endswith("norm.weight") else 0.0
        assert value.std().item() == pytest.approx(std, rel=4 / math.sqrt(2 * n)), name
        assert value.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(n)), name
        firsts.add(round((value.flatten()[0].item() - mean) / std, 9))
    assert len(firsts) == len(list(GPT(config).parameters())), "each is drawn by itself"
