"""Text, seeds, the reference GPT, and the oracle's comparison."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from core.model.gpt import GPT, GPTConfig, initial_value, materialize, token_loss, use_masks
from core.model.seeded import SampleMasks, generator
from core.model.text import Text
from core.proof.oracle import Oracle, worst_difference

CPU = torch.device("cpu")
SMALL = {"sequence": 8, "hidden": 16, "layers": 2, "heads": 4}


def model(seed: int = 0, **options: object) -> GPT:
    return materialize(GPT(GPTConfig(**SMALL | options)), seed, CPU, torch.float64)


def batch(step: int = 0, samples: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    return Text(None, 8).batch(0, step, samples)


# ---- Text


def test_the_help_text_is_there_and_targets_follow_inputs() -> None:
    text = Text(None, 8)
    assert len(text.tokens) > 400_000
    inputs, targets = text.batch(1, 2, 5)
    assert inputs.shape == targets.shape == (5, 8)
    assert (inputs[:, 1:] == targets[:, :-1]).all()
    content = bytes(text.tokens.tolist())
    for row, following in zip(inputs.tolist(), targets.tolist(), strict=True):
        assert bytes([*row, following[-1]]) in content


def test_batches_depend_on_seed_and_step_only() -> None:
    a, b = Text(None, 8), Text(None, 8)
    a.batch(0, 5, 3)
    assert (a.batch(0, 1, 4)[0] == b.batch(0, 1, 4)[0]).all()
    assert (a.batch(0, 1, 4)[0] != a.batch(0, 2, 4)[0]).any()
    assert (a.batch(0, 1, 4)[0] != a.batch(1, 1, 4)[0]).any()


def test_the_shortest_text(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes(bytes(range(9)))
    inputs, targets = Text(str(path), 8).batch(0, 0, 3)
    assert inputs.tolist() == [list(range(8))] * 3
    assert targets.tolist() == [list(range(1, 9))] * 3
    with pytest.raises(ValueError, match=r"9 bytes is too short: a sample of --sequence 9 .* use .* --sequence 8"):
        Text(str(path), 9)


# ---- The model


def test_weights_depend_on_name_and_seed_only() -> None:
    a, b = model(layers=2), model(layers=2)
    parameters = dict(a.named_parameters())
    assert all((p == parameters[n]).all() for n, p in b.named_parameters())
    assert (parameters["blocks.0.mlp.up.weight"] != parameters["blocks.1.mlp.up.weight"]).any()
    assert (parameters["norm.bias"] != dict(model(1).named_parameters())["norm.bias"]).any()
    single = materialize(GPT(GPTConfig(**SMALL)), 0, CPU, torch.float32)
    assert all((p == parameters[n].float()).all() for n, p in single.named_parameters()), "float32 is float64, rounded"


def test_start_values_have_the_right_size() -> None:
    config = GPTConfig(hidden=256)
    assert initial_value("blocks.3.mlp.up.weight", (1024, 256), config, 0).std() == pytest.approx(0.02, rel=0.02)
    down = initial_value("blocks.3.mlp.down.weight", (256, 1024), config, 0)
    assert down.std() == pytest.approx(0.02 / math.sqrt(2 * config.layers), rel=0.02)
    assert initial_value("norm.weight", (4096,), config, 0).mean() == pytest.approx(1.0, abs=0.01)


def test_the_head_is_the_embedding_unless_untied() -> None:
    tied, untied = model(), model(tied=False)
    assert tied.head.weight is tied.embed.token.weight
    assert untied.head.weight is not untied.embed.token.weight
    names = {n for n, _ in untied.named_parameters()} - {n for n, _ in tied.named_parameters()}
    assert names == {"head.weight"}
    h, v, s, f = 16, 256, 8, 64
    layer = 4 * h + (3 * h * h + 3 * h) + (h * h + h) + (f * h + f) + (h * f + h)
    assert sum(p.numel() for p in tied.parameters()) == v * h + s * h + 2 * layer + 2 * h


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_both_attentions_are_torchs_definition(heads: int) -> None:
    """Against multi-head attention written out head by head."""
    inputs, _ = batch()
    gpts = [model(heads=heads, attention=kind) for kind in ("sdpa", "softmax")]
    a, b = (gpt(inputs) for gpt in gpts)
    assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)
    attention, x = gpts[0].blocks["0"].attention, torch.randn(2, 8, 16, dtype=torch.float64)
    size, contexts = 16 // heads, []
    for head in range(heads):
        rows = slice(3 * size * head, 3 * size * (head + 1))
        q, k, v = F.linear(x, attention.qkv.weight[rows], attention.qkv.bias[rows]).split(size, -1)
        scores = (q @ k.mT / math.sqrt(size)).masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf)
        contexts.append(scores.softmax(-1) @ v)
    assert torch.allclose(attention(x), attention.out(torch.cat(contexts, -1)), rtol=1e-12, atol=1e-12)


def test_the_future_does_not_leak() -> None:
    inputs, _ = batch()
    changed = inputs.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 256
    gpt = model()
    assert (gpt(inputs)[:, :5] == gpt(changed)[:, :5]).all()
    assert (gpt(inputs)[:, 5:] != gpt(changed)[:, 5:]).any()


def test_the_loss_of_parts_adds_up() -> None:
    inputs, targets = batch()
    logits = model()(inputs)
    whole = token_loss(logits, targets, targets.numel())
    parts = sum(token_loss(a, t, targets.numel()) for a, t in zip(logits.split(2), targets.split(2), strict=True))
    assert whole.item() == pytest.approx(parts.item(), rel=1e-14)
    assert whole.item() == pytest.approx(F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item(), rel=1e-14)


def keep_mask(shape: tuple[int, ...], masks: SampleMasks, split: tuple[int, int, int] | None = None) -> torch.Tensor:
    return masks.keep_mask(torch.Size(shape), 0.3, "x", split, CPU)


def test_dropout_does_not_depend_on_the_layout() -> None:
    shape = (6, 3, 4)
    whole = keep_mask(shape, SampleMasks(0, 1, 0))
    parts = [keep_mask((2, 3, 4), SampleMasks(0, 1, first)) for first in (0, 2, 4)]
    assert (torch.cat(parts) == whole).all()
    for dim, count in ((1, 3), (2, 2), (2, 4)):
        part = [size // (count if i == dim else 1) for i, size in enumerate(shape)]
        parts = [keep_mask(tuple(part), SampleMasks(0, 1, 0), (dim, index, count)) for index in range(count)]
        assert (torch.cat(parts, dim) == whole).all()
    assert (whole[0] != whole[1]).any()
    for other in (SampleMasks(1, 1, 0), SampleMasks(0, 2, 0)):
        assert (keep_mask(shape, other) != whole).any()
    assert keep_mask((1, 10000), SampleMasks(0, 0, 0)).float().mean() == pytest.approx(0.7, abs=0.02)
    gpt, (inputs, _) = model(dropout=0.3, attention="softmax"), batch()
    masks = use_masks(gpt, SampleMasks(0))
    full, halves = gpt(inputs), []
    for half, first in zip(inputs.split(3), (0, 3), strict=True):
        masks.seek(0, first)
        halves.append(gpt(half))
    assert torch.allclose(full, torch.cat(halves), rtol=1e-12, atol=1e-12)
    assert (gpt.eval()(inputs) == model(attention="softmax")(inputs)).all()


def test_generators_differ_by_purpose() -> None:
    seeds = {generator(*purpose).initial_seed() for purpose in [(0,), (1,), (0, "a"), (0, "b"), ("a", 0), (0, 0)]}
    assert len(seeds) == 6


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"heads": 3}, "use --heads 2"), ({"layers": 0}, "--layers 0"), ({"attention": "flash"}, "--attention sdpa"),
     ({"dropout": 1.0}, "--dropout 0.1"), ({"dropout": float("nan"), "attention": "softmax"}, "--dropout 0.1"),
     ({"dropout": 0.1}, "--attention softmax")],
)  # fmt: skip
def test_bad_sizes_are_refused(options: dict, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        GPTConfig(**SMALL | options)


# ---- The oracle


def test_the_oracle_learns_and_keeps_gradients_unclipped() -> None:
    oracle = Oracle(GPTConfig(**SMALL), 0, CPU, partial(torch.optim.AdamW, lr=1e-2), 0.1)
    losses = [oracle.step(*batch(0)) for _ in range(30)]
    assert losses[-1] < losses[0] / 2, "one batch can be learnt by heart"
    norm = torch.stack([g.norm() for g in oracle.gradients.values()]).norm().item()
    assert norm == pytest.approx(oracle.norm, rel=1e-12)
    assert norm > 0.1


def test_differences_are_never_overlooked() -> None:
    one, nan = torch.ones(3), torch.tensor([1.0, math.nan, 1.0])
    reference = {"a": one, "b": 2 * one}
    assert worst_difference([("a", one), ("b", 2 * one), ("b", 2 * one)], reference) == 0
    assert worst_difference([("a", one), ("b", 3 * one)], reference) == pytest.approx(0.5)
    for pieces in ([("a", one)], [("a", one), ("b", nan)], [("a", one), ("c", one)], [("a", one), ("b", one[:2])], []):
        assert worst_difference(pieces, reference) == math.inf
