"""Mixed precision as a named policy: bytes, sums of gradients, master weights. 1710.03740, sections 3.1 and 3.2."""

from collections.abc import Iterable
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from core.model.gpt import GPT, GPTConfig, materialize, token_loss
from core.model.precision import POLICIES, MasterOptimizer, Precision, policy_of, wide
from core.model.text import Text

CPU, CONFIG = torch.device("cpu"), GPTConfig(sequence=16, hidden=32, layers=2, heads=4)
EPS = 2**-8  # of bfloat16: a number is rounded by at most half of it


def model(policy: str, config: GPTConfig = CONFIG) -> GPT:
    return materialize(GPT(config), 0, CPU, POLICIES[policy])


def off(found: Tensor, exact: Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


# ---- Policies


@pytest.mark.parametrize(
    ("name", "parameters", "gradients", "optimizer"),
    [("float64", 8, 8, 16), ("float32", 4, 4, 8), ("bfloat16", 2, 4, 12), ("bfloat16-grads", 2, 2, 12)],
)
def test_bytes_of_a_policy_are_those_that_a_training_has(
    name: str, parameters: int, gradients: int, optimizer: int
) -> None:
    """The paper's 2 + 2 + 12, Megatron-LM's 2 + 4 + 12, and 4 + 4 + 8; then what one step has really made."""
    policy = POLICIES[name]
    assert (policy.parameters.itemsize, policy.gradients.itemsize) == (parameters, gradients)
    assert policy.optimizer_bytes == optimizer
    assert policy.bytes == parameters + gradients + optimizer
    gpt = model(name)
    adam = MasterOptimizer(gpt.parameters(), torch.optim.AdamW, policy.master)
    token_loss(gpt(Text(None, 16).batch(0, 0, 2)[0]), Text(None, 16).batch(0, 0, 2)[1], 32).backward()
    adam.step()
    count = sum(p.numel() for p in gpt.parameters())
    assert sum(p.nbytes for p in gpt.parameters()) == parameters * count
    assert sum(p.grad.nbytes for p in gpt.parameters()) == gradients * count
    assert sum(t.nbytes for t in adam.tensors()) == optimizer * count


def test_the_usual_policy_of_a_type() -> None:
    assert policy_of(torch.bfloat16) is POLICIES["bfloat16"]
    assert policy_of(torch.float32).gradients == torch.float32
    mine = Precision("mine", torch.float16, torch.float16, torch.float32)
    assert policy_of(mine) is mine
    with pytest.raises(StopIteration):
        policy_of(torch.int8)


def test_wide_is_at_least_float32() -> None:
    types = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float64: torch.float64}
    for dtype, expected in types.items():
        assert wide(torch.ones(2, dtype=dtype)).dtype == expected
    x = torch.ones(2)
    assert wide(x) is x


# ---- Gradients


def accumulated(policy: str, microbatches: int) -> dict[str, Tensor]:
    """The sum of the gradients of so many micro-batches, by autograd."""
    gpt, text = model(policy), Text(None, 16)
    for i in range(microbatches):
        inputs, targets = text.batch(0, i, 2)
        token_loss(gpt(inputs), targets, targets.numel()).backward()
    return {name: p.grad for name, p in gpt.named_parameters()}


def rounded_weights(policy: str, microbatches: int) -> dict[str, Tensor]:
    """The same sum in float64, from the weights as the policy rounds them."""
    gpt, text = model("float64"), Text(None, 16)
    for p, other in zip(gpt.parameters(), model(policy).parameters(), strict=True):
        p.data.copy_(other)
    for i in range(microbatches):
        inputs, targets = text.batch(0, i, 2)
        token_loss(gpt(inputs), targets, targets.numel()).backward()
    return {name: p.grad for name, p in gpt.named_parameters()}


def worst(policy: str, microbatches: int) -> float:
    found, exact = accumulated(policy, microbatches), rounded_weights(policy, microbatches)
    assert found.keys() == exact.keys()
    return max(off(gradient, exact[name]) for name, gradient in found.items())


def test_the_error_of_a_sum_of_gradients_does_not_grow() -> None:
    """The bug: gradients added up in bfloat16. 64 micro-batches in float32 are no farther from float64 than one is."""
    one, many, in_sixteen = worst("bfloat16", 1), worst("bfloat16", 64), worst("bfloat16-grads", 64)
    assert many < 1.2 * one
    assert in_sixteen > 2 * many, "which is what the policy is for"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_sum_has_the_policys_type(policy: str) -> None:
    for gradient in accumulated(policy, 2).values():
        assert gradient.dtype == POLICIES[policy].gradients


def test_equal_gradients_add_up_without_end() -> None:
    """1024 times the same: in bfloat16 a sum stands still at 256 times its terms."""
    for policy, expected in (("bfloat16", 1024.0), ("bfloat16-grads", 256.0)):
        p = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        p.grad_dtype = POLICIES[policy].gradients
        for _ in range(1024):
            p.sum().backward()
        assert p.grad.tolist() == [expected] * 3


def test_a_sum_of_terms_is_rounded_term_by_term_only() -> None:
    """1000 random gradients of one parameter: each is rounded to bfloat16 once; their sum is not, again and again."""
    p = nn.Parameter(torch.ones(50, dtype=torch.bfloat16))
    p.grad_dtype = torch.float32
    terms = torch.rand(1000, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for term in terms:
        (p * term.bfloat16()).sum().backward()
    assert off(p.grad, terms.sum(0)) < EPS / 2
    assert off(p.grad, terms.bfloat16().double().sum(0)) < 1e-6


# ---- The optimizer

adamw = partial(torch.optim.AdamW, lr=1e-2)


def test_master_weights_keep_updates_that_sixteen_bits_lose() -> None:
    """1 - 2^-10 is 1 in bfloat16. Four such steps are one step of its last digit, if they are kept."""

    def after(steps: int, master: torch.dtype) -> tuple[float, float]:
        p = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        p.grad_dtype = torch.float32
        sgd = MasterOptimizer([p], partial(torch.optim.SGD, lr=2**-10), master)
        for _ in range(steps):
            sgd.zero_grad()
            p.sum().backward()
            sgd.step()
        return p.item(), sgd.master[p].item()

    assert after(1, torch.float32) == (1.0, 1 - 2**-10)
    assert after(8, torch.float32) == (1 - 2**-7, 1 - 2**-7)
    assert after(1024, torch.float32) == (0.0, 0.0)


@pytest.mark.parametrize("policy", POLICIES)
def test_adamw_by_its_equations(policy: str) -> None:
    """1711.05101, algorithm 2, over five steps in float64, with the gradients that were really there."""
    dtype, gradient_dtype, master = POLICIES[policy][1:]
    start = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    p = nn.Parameter(start.clone())
    p.grad_dtype = gradient_dtype
    optimizer = MasterOptimizer([p], partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), master)
    weight, m, v = start.double(), 0.0, 0.0
    for t in range(1, 6):
        optimizer.zero_grad()
        (p.square() * torch.linspace(-1, 2, 40).to(dtype)).sum().backward()
        g = p.grad.double()
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        weight = weight - 1e-2 * 0.1 * weight - 1e-2 * step
        rounding = 1e-13 if master == torch.float64 else 1e-6
        assert off(optimizer.master[p].detach(), weight) < rounding
        assert torch.equal(p.detach(), optimizer.master[p].detach().to(dtype)), "the master weight, rounded"
        state = optimizer.state_of(p)
        assert off(state["exp_avg"], m) < rounding
        assert off(state["exp_avg_sq"], v) < 2 * rounding
        assert state["exp_avg"].dtype == state["exp_avg_sq"].dtype == master


def test_a_frozen_parameter_is_no_cost_and_does_not_move() -> None:
    """Not even by weight decay; no copy of it, and no moments."""
    frozen, trained = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    frozen.requires_grad_(False)
    optimizer = MasterOptimizer([frozen, trained], partial(adamw, weight_decay=0.5), torch.float32)
    (frozen * trained).sum().backward()
    optimizer.step()
    assert optimizer.master[frozen] is frozen
    assert frozen.tolist() == [1.0] * 4
    assert trained[0].item() < 1.0
    assert optimizer.state_of(frozen) == {}
    assert sum(t.nbytes for t in optimizer.tensors()) == 4 * 12


def test_a_parameter_without_a_gradient_stays_as_it_is() -> None:
    """In this step, although it had one before: no decay, no momentum, no count."""
    used, unused = (nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in range(2))
    optimizer = MasterOptimizer([used, unused], partial(adamw, weight_decay=0.5), torch.float32)
    (used.sum() + unused.sum()).backward()
    optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state_of(unused).items()}
    weight, master, moved = unused.detach().clone(), optimizer.master[unused].detach().clone(), used.detach().clone()
    optimizer.zero_grad()
    assert used.grad is unused.grad is None
    used.sum().backward()
    optimizer.step()
    assert torch.equal(unused, weight)
    assert torch.equal(optimizer.master[unused], master)
    assert all(torch.equal(before[key], value) for key, value in optimizer.state_of(unused).items())
    assert not torch.equal(used, moved)


def test_the_optimizer_holds_no_gradients_between_steps() -> None:
    """A float32 copy of all gradients would be 4 bytes a parameter that no policy counts."""
    p = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterOptimizer([p], adamw, torch.float32)
    p.sum().backward()
    optimizer.step()
    assert optimizer.master[p].grad is None
    assert p.grad is not None, "the model's own is there until `zero_grad`"


def test_a_tied_weight_has_one_master() -> None:
    """Both uses add to one gradient; two masters would each make half of the step, and the last would win."""
    gpt = model("bfloat16")
    assert gpt.head.weight is gpt.embed.token.weight
    given: list[int] = []

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        made = list(parameters)
        given.append(len(made))
        return adamw(made)

    both = [gpt.embed.token.weight, gpt.head.weight, gpt.norm.weight]
    optimizer = MasterOptimizer(both, make, torch.float32)
    assert given == [2]
    assert len(optimizer.tensors()) == 2, "one copy each, and no state yet"
    optimizer.zero_grad()
    inputs, targets = Text(None, 16).batch(0, 0, 2)
    token_loss(gpt(inputs), targets, targets.numel()).backward()
    before = gpt.head.weight.detach().clone()
    optimizer.step()
    assert gpt.head.weight is gpt.embed.token.weight
    assert not torch.equal(gpt.head.weight, before)
    assert torch.equal(gpt.head.weight, optimizer.master[gpt.embed.token.weight].bfloat16())
    untied = model("bfloat16", GPTConfig(sequence=16, hidden=32, layers=2, heads=4, tied=False))
    assert len(MasterOptimizer(untied.parameters(), adamw, torch.float32).master) == len(list(gpt.parameters())) + 1


def test_where_the_types_agree_there_is_no_copy() -> None:
    gpt = model("float32")
    optimizer = MasterOptimizer(gpt.parameters(), adamw, torch.float32)
    assert all(master is p for p, master in optimizer.master.items())
    assert optimizer.tensors() == []
