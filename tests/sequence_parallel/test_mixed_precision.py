"""Bugs in lecture 06's lessons with --dtype bfloat16: the claims fail in mixed precision too."""

from functools import partial

import pytest

from core.proof.arguments import add_model_flags
from core.proof.lesson import Lesson
from tests import mixed
from tests.mixed import Caught, claims_catch, small_parameters
from tests.pool import Pool
from tests.sequence_parallel.test_mutations import layernorms_are_not_summed, plain_layernorms_are_not_summed

SIZES = {"steps": 2, "batch": 8, "sequence": 8, "hidden": 16, "heads": 2, "layers": 2, "clip": 0.05}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
TRAINING = "sequence_parallel.evidence.training"
SMALL = ("blocks.0.attention_norm.weight", "blocks.0.attention.qkv.bias", "blocks.1.attention.out.bias", "norm.bias")
EVERYWHERE = small_parameters(TRAINING, *SMALL) | {
    "a rank is lost": Caught(partial(mixed.a_rank_is_lost, "tp replicated gradients", "cp gradients")),
    "master weights in bfloat16": Caught(mixed.master_weights_in_bfloat16, mixed.PARAMETER),
}
MEGATRON = {
    "LayerNorms are not summed": Caught(layernorms_are_not_summed, versions=("(engine)",)),
    "LayerNorms are not summed, plain": Caught(plain_layernorms_are_not_summed, versions=("(plain)",)),
}


def add_flags(frame: Lesson) -> None:
    add_model_flags(frame)
    frame.parser.add_argument("--placement", default="zigzag")


@pytest.mark.parametrize("lesson", ["megatron_sp", "ulysses", "ring_attention"])
def test_the_claims_catch(pool: Pool, lesson: str) -> None:
    bugs = EVERYWHERE | (MEGATRON if lesson == "megatron_sp" else {})
    claims_catch(pool, f"sequence_parallel.{lesson}", add_flags, FLAGS, bugs)
