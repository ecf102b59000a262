"""Bugs in CODE 04's training with --dtype bfloat16: the claims fail in mixed precision too."""

from functools import partial

from core.proof.lesson import Lesson
from expert_parallel.evidence import flags
from tests import mixed
from tests.expert_parallel.test_mutations import plain_experts_scaled_by_ep
from tests.mixed import Caught, claims_catch, small_parameters
from tests.pool import Pool

SIZES = {"batch": 8, "sequence": 8, "hidden": 16, "heads": 2, "layers": 1, "feed-forward": 16, "experts": 4}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
TRAINING = "expert_parallel.evidence.training"
BUGS = small_parameters(
    TRAINING, "blocks.0.mlp.router.weight", "blocks.0.mlp.experts.up.bias", "blocks.0.mlp.experts.down.bias",
    "blocks.0.mlp_norm.weight", "norm.bias",
) | {
    "a rank is lost": Caught(partial(mixed.a_rank_is_lost, "dp")),
    "experts are scaled by ep, plain": Caught(plain_experts_scaled_by_ep, versions=("(plain)",)),
    "master weights in bfloat16": Caught(mixed.master_weights_in_bfloat16, mixed.PARAMETER),
}  # fmt: skip
ONE_EXPERT_RANK = {"a rank's part of the experts is lost": Caught(partial(mixed.a_rank_is_lost, "edp"))}


def add_flags(frame: Lesson) -> None:
    flags.add_flags(frame)
    flags.add_parallel_flags(frame)
    frame.parser.set_defaults(steps=2, aux=0.05)


def test_the_claims_catch(pool: Pool) -> None:
    claims_catch(pool, "expert_parallel.train", add_flags, FLAGS, BUGS)


def test_the_claims_catch_with_replicas_of_experts(pool: Pool) -> None:
    claims_catch(pool, "expert_parallel.train", add_flags, [*FLAGS, "--ep=1"], ONE_EXPERT_RANK)
