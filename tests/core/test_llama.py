"""The parts of a Llama against definitions written out here, and what refuses such a model.

The whole of it is compared with transformers in test_hf.py.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from cluster.planner.command import lacking
from cluster.planner.counting import model_parameters
from cluster.planner.models import PRESETS
from core.model.attention import dense_attention
from core.model.config import Latent, Llama3Scaling, ModelConfig, YarnScaling
from core.model.gpt import GPT, materialize
from core.model.norms import RMSNorm
from core.model.rotary import Rotary, frequencies
from core.proof.memory import SavedActivations
from pipeline.stages import partition
from tests.core.test_definitions import CPU, off, seeded

LLAMA = ModelConfig(
    vocabulary=13, sequence=7, hidden=12, layers=3, heads=6, kv_heads=2, head_size=4, feed_forward=10, gated=True,
    biases=False, learned_positions=False, tied=False, norm="rms", name="small llama",
)  # fmt: skip


def built(config: ModelConfig, dtype: torch.dtype = torch.float64) -> GPT:
    return materialize(GPT(config), 0, CPU, dtype)


# ---- RMSNorm


@pytest.mark.parametrize("trained", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norm_is_its_definition(dtype: torch.dtype, trained: tuple[bool, bool]) -> None:
    """1910.07467, equation 4, with a variance of zero and one near epsilon. Of 16 bits each is rounded once."""
    layer = RMSNorm(48, 1e-5)
    layer.weight.data = 1 + 0.1 * seeded(48)
    layer.to(dtype)
    x = (0.5 + seeded(3, 1000, 48, seed=2)).to(dtype)
    x[0, 0] = x[0, 1] = 0.0
    x[0, 0, 0] = 2**-7
    leaves = (x, layer.weight)
    for leaf, is_trained in zip(leaves, trained, strict=True):
        leaf.requires_grad_(is_trained)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    exact = wide[0] / (wide[0].square().sum(-1, keepdim=True) / 48 + 1e-5).sqrt() * wide[1]
    y = layer(x)
    rounding = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 100)
    assert y.dtype == dtype
    assert off(y, exact) < rounding / 2
    if any(trained):
        upstream = seeded(*x.shape, seed=3).to(dtype)
        y.backward(upstream)
        right = torch.autograd.grad(exact, wide, upstream.double())
        for leaf, of_leaf, is_trained in zip(leaves, right, trained, strict=True):
            assert (leaf.grad is not None) == is_trained
            if is_trained:
                assert leaf.grad.dtype == dtype
                assert off(leaf.grad, of_leaf) < rounding / 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_rms_norm_saves_its_input_as_it_is(dtype: torch.dtype) -> None:
    """And a number a token; torch's keeps the normalised input besides, of 16 bits both in 32: see findings/."""
    layer, x = RMSNorm(48, 1e-5).to(dtype), seeded(3, 5, 48).to(dtype).requires_grad_()
    of_tokens = 15 * max(4, dtype.itemsize)
    assert saved_bytes(layer, lambda: layer(x)) == x.nbytes + of_tokens


def saved_bytes(layer: torch.nn.Module, forward: Callable[[], torch.Tensor]) -> int:
    saved = SavedActivations(layer.parameters())
    with saved:
        forward()
    return saved.peak


# ---- Rotary positions


@pytest.mark.parametrize(
    "scaling", [None, Llama3Scaling(4.0, 1.0, 4.0, 16), YarnScaling(4.0, 16, 1.25, 2.0, 0.5)], ids=str
)
def test_scores_depend_on_the_distance(scaling: Llama3Scaling | YarnScaling | None) -> None:
    """2104.09864, equation 16: q at m times k at n is a function of m - n; YaRN's factor is on both."""
    config = replace(LLAMA, head_size=8, rope_scaling=scaling)
    rotary, (q, k) = Rotary(config), seeded(2, 1, 1, 1, 8)
    turned_q, turned_k = rotary(q.expand(1, 6, 9, 8), k.expand(1, 2, 9, 8))
    factor = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    radians = frequencies(config, CPU)[0].double()
    for m, n in itertools.product(range(9), range(9)):
        score = (turned_q[0, 0, m] * turned_k[0, 0, n]).sum().item()
        right = 0.0
        for i in range(4):  # as complex numbers
            pair = complex(q[..., i], q[..., i + 4]) * complex(k[..., i], k[..., i + 4]).conjugate()
            angle = radians[i].item() * (m - n)
            right += (pair * complex(math.cos(angle), math.sin(angle))).real
        assert score == pytest.approx(right * factor**2, rel=1e-5, abs=1e-5)


def test_frequencies_at_both_ends_of_a_scaling() -> None:
    """By a pair's turns in the original sequence: many, and it is as it was; few, and it is `factor` times slower."""
    plain, _ = frequencies(replace(LLAMA, head_size=64), CPU)
    assert plain.tolist() == pytest.approx([10_000 ** (-i / 32) for i in range(32)], rel=1e-6)
    turns = 512 * plain / (2 * math.pi)
    for scaling, many in ((Llama3Scaling(8.0, 1.0, 4.0, 512), 4.0), (YarnScaling(8.0, 512, 1.0), 32.0)):
        scaled, _ = frequencies(replace(LLAMA, head_size=64, rope_scaling=scaling), CPU)
        assert torch.equal(scaled[turns > many], plain[turns > many])
        torch.testing.assert_close(scaled[turns < 1.0], plain[turns < 1.0] / 8.0)
        between = (turns < 0.9 * many) & (turns > 1.1)
        assert between.any()
        assert ((scaled < plain) & (scaled > plain / 8.0))[between].all()


def test_a_shard_of_the_sequence_is_turned_by_its_own_positions() -> None:
    q, k = seeded(2, 1, 2, 9, 4)
    rotary = Rotary(LLAMA)
    full = torch.stack(rotary(q, k))
    mine = torch.tensor([1, 4, 8])
    rotary.positions = lambda length: mine
    assert torch.equal(torch.stack(rotary(q[:, :, mine], k[:, :, mine])), full[:, :, :, mine])


def test_sixteen_bits_are_turned_in_32() -> None:
    q = seeded(1, 2, 900, 4).bfloat16()
    found, wide = Rotary(LLAMA)(q, q)[0], Rotary(LLAMA)(q.float(), q.float())[0]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wide.bfloat16())
    assert off(wide, Rotary(LLAMA)(q.double(), q.double())[0]) < 1e-6


# ---- The model


def test_both_attentions_are_one_with_repeated_keys() -> None:
    """Query head i reads key and value head i K/A, rounded down: as if the rows of each were there three times."""
    tokens = torch.randint(13, (2, 7), generator=torch.Generator().manual_seed(0))
    grouped = built(LLAMA)
    explicit = built(replace(LLAMA, attention="softmax"))
    repeated = built(replace(LLAMA, kv_heads=6))
    for name, p in repeated.named_parameters():
        value = dict(grouped.named_parameters())[name].detach()
        if name.endswith(("attention.k.weight", "attention.v.weight")):
            value = value.view(2, 4, 12).repeat_interleave(3, 0).flatten(0, 1)
        p.data.copy_(value)
    for other in (explicit, repeated):
        torch.testing.assert_close(other(tokens), grouped(tokens), rtol=1e-12, atol=1e-12)


def test_values_shorter_than_keys_need_no_matrix_of_scores() -> None:
    """torch's would make and keep it: see findings/. What is kept of S tokens grows with S, not with its square."""

    def kept(tokens: int) -> int:
        q, k, v = (seeded(1, 2, tokens, size).requires_grad_() for size in (12, 12, 8))
        return saved_bytes(torch.nn.Identity(), lambda: dense_attention(q, k, v))

    assert kept(256) == 2 * kept(128)


def test_the_future_does_not_leak() -> None:
    tokens = torch.arange(7).view(1, 7)
    changed = tokens.clone()
    changed[:, 5] = 12
    llama = built(LLAMA)
    same = llama(tokens) == llama(changed)
    assert same[:, :5].all()
    assert not same[:, 5:].all()


def test_the_gpt_has_the_names_that_it_had() -> None:
    names = [name for name, _ in GPT(ModelConfig(layers=1)).named_parameters()]
    layer = [f"{module}.{leaf}" for module in ("attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.up",
                                               "mlp.down") for leaf in ("weight", "bias")]  # fmt: skip
    ends = ["norm.weight", "norm.bias"]
    assert names == ["embed.token.weight", "embed.position.weight", *(f"blocks.0.{each}" for each in layer), *ends]


def test_a_pipeline_of_stages_computes_the_same() -> None:
    """What a stage of a pipeline has of the model knows its positions without the embedding."""
    tokens = torch.arange(7).view(1, 7)
    x = tokens
    for stage in range(3):
        x = materialize(partition(GPT(LLAMA), [stage], 3), 0, CPU, torch.float64)(x)
    assert torch.equal(x, built(LLAMA)(tokens))


@pytest.mark.parametrize("policy", [torch.float32, torch.bfloat16])
def test_with_fewer_bits_it_is_near(policy: torch.dtype) -> None:
    tokens = torch.arange(7).view(1, 7)
    config = replace(LLAMA, qk_norm=True, qkv_bias=True)
    found = built(config, policy)
    exact = built(config)
    for p, q in zip(exact.parameters(), found.parameters(), strict=True):
        p.data.copy_(q.detach())
    assert off(found(tokens), exact(tokens)) < 4 * torch.finfo(policy).eps


@pytest.mark.parametrize("name", ["llama3-8b", "llama3-70b", "llama3-405b"])
def test_the_planners_presets_are_built(name: str) -> None:
    """On the meta device, without memory; the flags of a training cannot say all of them, and the planner says so."""
    model = PRESETS[name]
    assert sum(p.numel() for p in GPT(model).parameters()) == model_parameters(model)
    assert lacking(model).startswith("a vocabulary of 128,256")
    assert not lacking(model, "folder")


# ---- What is refused

LATENT = {"latent": Latent(4, 4, 2, 2, 2), "kv_heads": None, "head_size": None}
UNBUILT = {
    "latent attention with learned positions": LATENT | {"learned_positions": True},
    "latent attention with norms of heads": LATENT | {"qk_norm": True},
    "LayerNorm without biases": {"norm": "layer"},
    "rotary positions scaled by longrope": {"rope_scaling": "longrope"},
}


@pytest.mark.parametrize("missing", UNBUILT)
def test_what_is_not_built_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match=rf"small llama: core.model.gpt has no .*{missing}"):
        GPT(replace(LLAMA, **UNBUILT[missing]))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"kv_heads": 4}, "--kv-heads 4: must divide --heads 6.*; use --kv-heads 2"),
     ({"head_size": 5}, "the size of a head must be even.*; use head_size 6"),
     ({"norm": "batch"}, "norm 'batch': must be layer or rms; use norm 'layer'")],
)  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT(replace(LLAMA, **options))
