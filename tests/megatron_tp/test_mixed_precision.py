"""Bugs in lecture 05's lesson with --dtype bfloat16: the claims fail in mixed precision too."""

from functools import partial

from core.proof.arguments import add_model_flags
from tests import mixed
from tests.megatron_tp.test_mutations import f_does_not_sum, plain_f_does_not_sum
from tests.mixed import Caught, claims_catch, small_parameters
from tests.pool import Pool

SIZES = {"steps": 2, "batch": 8, "sequence": 8, "hidden": 16, "heads": 2, "layers": 2, "clip": 0.05}
FLAGS = [f"--{name}={value}" for name, value in SIZES.items()]
TRAINING = "megatron_tp.evidence.training"
BUGS = small_parameters(
    TRAINING, "blocks.0.attention_norm.weight", "blocks.0.attention.qkv.bias", "blocks.1.attention.out.bias",
    "blocks.1.mlp.up.bias", "norm.bias",
) | {
    "a rank is lost": Caught(partial(mixed.a_rank_is_lost, "tp layers")),
    "f does not sum": Caught(f_does_not_sum, versions=("(engine)",)),
    "f does not sum, plain": Caught(plain_f_does_not_sum, versions=("(plain)",)),
    "master weights in bfloat16": Caught(mixed.master_weights_in_bfloat16, mixed.PARAMETER),
}  # fmt: skip


def test_the_claims_catch(pool: Pool) -> None:
    claims_catch(pool, "megatron_tp.tensor_parallel", add_model_flags, FLAGS, BUGS)
