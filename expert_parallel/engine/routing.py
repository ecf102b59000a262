"""How many experts there are, how tokens find them, and the decisions: experts and capacity, without gradients.

Top-k gating: Shazeer et al. 2017 (1701.06538). Capacity: Switch (2101.03961), section 2.2. Groups of experts:
DeepSeek-V3 (2412.19437), section 2.1.2.

B samples, S tokens of a sample, E experts, k of them for each token
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction

import torch
from einops import rearrange
from torch import Tensor, nn

from core.model.config import ModelConfig
from core.model.gpt import GPT
from core.proof.rulebook import ONE_EXPERT, TOP_K
from core.proof.rules import Rule, at_least, check

SCORES = ("softmax-topk", "topk-softmax", "sigmoid")
DROPS = ("position", "probability")


def _finite(flag: str, works: str) -> Rule:
    name = flag.replace("-", "_")
    reason = "must be finite, and not negative"
    return Rule(flag, f"--{flag} {{{name}}}", lambda r: 0 <= getattr(r, name) < math.inf, reason,
                lambda r: f"--{flag} {works}")  # fmt: skip


def one_of(flag: str, known: tuple[str, ...]) -> Rule:
    reason = f"must be one of {', '.join(known)}"
    return Rule(flag, f"--{flag} {{{flag}}}", lambda r: getattr(r, flag) in known, reason,
                lambda r: f"--{flag} {known[0]}")  # fmt: skip


def _fewer_choices(case: "Routing") -> str:
    """The flags with which a token chooses as many experts as there are."""
    score = " --score softmax-topk" if case.experts == 1 and case.score == "topk-softmax" else ""
    groups = f" --top-groups {case.groups}" if case.groups > 1 else ""
    return f"--top-k {case.experts}{score}{groups}"


def _fewer_groups(case: "Routing") -> str:
    fitting = max(g for g in range(1, case.groups + 1) if case.experts % g == 0)
    return f"--groups {fitting} --top-groups {fitting}"


def _enough_groups(case: "Routing") -> bool:
    """Whether the experts of `top_groups` groups are at least `top_k`."""
    return case.top_k <= case.top_groups * (case.experts // case.groups) and case.top_groups <= case.groups


ROUTING = (
    Rule("experts", "--experts {experts}", lambda r: r.experts >= 1, "must be at least 1",
         lambda r: f"--experts {max(8, r.top_k)}"),
    replace(ONE_EXPERT, use=lambda r: f"--top-k {min(2, r.experts)}"),
    at_least("groups", 1, 1),
    at_least("top-groups", 1, 1),
    _finite("capacity", "1.25, or 0 to drop nothing"),
    _finite("aux", "0.01"),
    _finite("z", "0.01"),
    _finite("bias-rate", "0.001"),
    one_of("score", SCORES),
    one_of("drop", DROPS),
    replace(TOP_K, use=_fewer_choices),
    Rule("top k: softmax", "--top-k {top_k}", lambda r: r.top_k > 1 or r.score != "topk-softmax",
         "the softmax over one chosen expert is always 1, and the router would learn nothing",
         lambda r: "--score softmax-topk",
         peer="Megatron-LM, TransformerConfig.__post_init__: use --moe-router-pre-softmax when topk is 1"),
    Rule("groups: equal", "--groups {groups}", lambda r: r.experts % r.groups == 0,
         "must divide --experts {experts}, so that groups are equal", _fewer_groups,
         peer="Megatron-LM, TransformerConfig: num_moe_experts should be divisible by moe_router_num_groups"),
    Rule("top groups", "--top-groups {top_groups}", _enough_groups,
         "at most the {groups} groups, and with --top-k {top_k} experts in them", lambda r: f"--top-groups {r.groups}",
         peer="Megatron-LM, TransformerConfig: moe_router_group_topk must not exceed moe_router_num_groups"),
)  # fmt: skip
MIXTURE = (at_least("feed-forward", 0, 0), at_least("shared", 0, 0))
OF_MODEL = ("experts", "top_k", "score", "weight_scale", "groups", "top_groups")  # the rest is how it is trained
TINY = 1e-20  # is added to a sum of scores, which may all be 0 in few bits


@dataclass(frozen=True)
class Routing:
    """How tokens find experts.

    Raises:
        ValueError: the numbers do not fit each other.
    """

    experts: int = 8
    top_k: int = 2
    score: str = "topk-softmax"  # softmax over the chosen; or over all, then choose; or sigmoids, divided by their sum
    groups: int = 1  # the experts are in so many equal groups,
    top_groups: int = 1  # and a token's must be in so many of them
    capacity: float = 0.0  # an expert takes at most ceil(capacity k S / E) tokens of a sample; 0: all
    drop: str = "position"  # what goes beyond that is dropped: the last tokens, or those with the lowest score
    aux: float = 0.0  # coefficient of Switch's load-balancing loss
    z: float = 0.0  # of the router z-loss
    bias_rate: float = 0.0  # how fast the bias of selection moves against the load
    weight_scale: float = 1.0  # that the weights are multiplied by in the end

    def __post_init__(self) -> None:
        check(self, ROUTING)

    @property
    def normalised(self) -> bool:
        """Whether the scores of the chosen experts are divided by their sum."""
        return self.score == "sigmoid" and self.top_k > 1

    @property
    def sums_to_one(self) -> bool:
        """Whether the weights of a token's experts do, if none is dropped."""
        return (self.score == "topk-softmax" or self.normalised) and self.weight_scale == 1.0

    @property
    def biased(self) -> bool:
        """Whether the selection has a bias: DeepSeek's, whose scores are sigmoids, or where it balances the load."""
        return self.score == "sigmoid" or self.bias_rate > 0

    def expert_capacity(self, tokens: int) -> int:
        """Tokens that an expert takes of a sample of so many."""
        # A decimal, as it is written: 0.55 x 2 x 50 / 5 is 11, and a little more in binary, which ceil would make 12.
        return min(tokens, math.ceil(Fraction(str(self.capacity)) * self.top_k * tokens / self.experts))


@dataclass(frozen=True)
class MoEConfig:
    """What replaces the MLPs: what the model's configuration says of its experts, and how they are trained.

    Raises:
        ValueError: a size is not possible.
    """

    routing: Routing = field(default_factory=Routing)
    feed_forward: int = 0  # of an expert; 0: of the MLP it replaces
    shared: int = 0  # feed-forward of a shared expert, an MLP that all tokens go through besides; 0: none

    def __post_init__(self) -> None:
        check(self, MIXTURE)

    @classmethod
    def of(cls, config: ModelConfig, **training: float | str) -> "MoEConfig":
        """Of a model that has experts.

        Args:
            training: those of `Routing` that are no property of the model: capacity, drop, aux, z, bias_rate.
        """
        return cls(
            Routing(**{name: getattr(config, name) for name in OF_MODEL}, **training),
            feed_forward=config.expert_size,
            shared=config.shared_feed_forward,
        )

    def described(self, config: ModelConfig) -> ModelConfig:
        """The configuration of the model whose MLPs these have replaced."""
        return replace(
            config,
            **{name: getattr(self.routing, name) for name in OF_MODEL},
            expert_feed_forward=self.feed_forward or config.feed_forward,
            shared_feed_forward=self.shared,
        )


def replace_mlps(model: GPT, moe: MoEConfig | None, make: Callable[[ModelConfig, MoEConfig], nn.Module]) -> GPT:
    """Put a mixture in the place of each MLP of the model, or of a pipeline stage of it, but in the first dense layers.

    Args:
        moe: None: as the model's configuration says, trained without more. Of a model without experts the MLPs are
            replaced, too, and its configuration says so afterwards.

    Raises:
        ValueError: the model's configuration has other experts.
    """
    moe = moe or MoEConfig.of(model.config)
    described = moe.described(model.config)
    if model.config.experts and described != replace(model.config, expert_feed_forward=model.config.expert_size):
        raise ValueError(f"{model.config.name} has other experts than these; use MoEConfig.of its configuration")
    model.config = described
    for name, block in model.blocks.items():
        if int(name) >= model.config.dense_layers:
            block.mlp = make(model.config, moe)
    return model


def first_of_the_largest(scores: Tensor, k: int) -> Tensor:
    """Where the k largest are, (..., E) to (..., k), the largest first; of equal ones the first, as in a stable sort.

    `Tensor.topk` takes any of equal ones, and others where the row has another length: a choice by it would depend on
    the layout. A stable sort of all E takes up to eight times as long as `topk`; this, k passes, as long as `topk`.
    """
    left, found = scores.clone(), []
    for _ in range(k):
        found.append(left.argmax(-1, keepdim=True))  # documented: the first of equal ones
        left.scatter_(-1, found[-1], -math.inf)
    return torch.cat(found, -1)


def choose(scores: Tensor, routing: Routing) -> Tensor:
    """The k experts of each token, (..., E) to (..., k), the best first; in the best groups, where there are groups.

    Of equal experts, and of equal groups, the first.
    """
    if routing.top_groups < routing.groups:
        grouped = rearrange(scores, "... (g e) -> ... g e", g=routing.groups)
        # A group is as good as its share of the choice: the sum of its best k / top_groups.
        of_group = grouped.topk(max(1, routing.top_k // routing.top_groups)).values.sum(-1)
        closed = torch.ones_like(of_group, dtype=torch.bool)
        closed.scatter_(-1, first_of_the_largest(of_group, routing.top_groups), False)
        scores = grouped.masked_fill(closed.unsqueeze(-1), -math.inf).flatten(-2)
    return first_of_the_largest(scores, routing.top_k)


def chosen_of(experts: Tensor, scores: Tensor) -> Tensor:
    """Whether a token chose an expert, bool (B, S, E), from the k that it chose."""
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, experts, True)


def by_score(scores: Tensor) -> Tensor:
    """How many tokens of a sample have a higher score of an expert, or as high a one before: (B, S, E) to the same."""
    return scores.argsort(dim=1, descending=True, stable=True).argsort(1)


def keep(experts: Tensor, scores: Tensor, routing: Routing) -> Tensor:
    """Which choices are within their expert's capacity, bool (B, S, k); the others are dropped.

    Args:
        experts: (B, S, k).
        scores: (B, S, E).
    """
    chosen = chosen_of(experts, scores)
    before = chosen.cumsum(1) - 1 if routing.drop == "position" else by_score(scores.masked_fill(~chosen, -math.inf))
    return (before < routing.expert_capacity(scores.shape[1])).gather(-1, experts)
