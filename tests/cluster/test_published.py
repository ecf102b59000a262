"""Published models (Hugging Face) in and out of a combined run, in every layout that the topics have."""

import json
import re
import socket
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from cluster.planner.layout import Layout
from cluster.run import export, hf, load
from cluster.run.arguments import add_all_flags, check, configured, folder_of, full_model
from cluster.run.build import TrainSpec, make_mesh
from cluster.run.data import HELD_OUT, check_data
from cluster.run.hf import Folder, pieces
from cluster.run.worker import Worker
from core.ledger import Ledger
from core.model.hf import to_published
from core.model.precision import POLICIES
from core.model.text import Text
from core.proof.chunks import Chunks
from core.proof.lesson import Lesson
from tests.core.test_hf import InFloat64
from tests.pool import ROOT, Outcome, Pool

transformers = pytest.importorskip("transformers")

LLAMA = {"vocab_size": 263, "hidden_size": 36, "intermediate_size": 60, "num_hidden_layers": 4,
         "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 10,
         "tie_word_embeddings": False, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2,
         "rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}}  # fmt: skip
GPT2 = {"vocab_size": 263, "n_positions": 32, "n_embd": 36, "n_layer": 4, "n_head": 6, "n_inner": 52,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", LLAMA),
    "llama, tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "mistral": ("mistral", LLAMA | {"sliding_window": 16}),
    "qwen2": ("qwen2", {k: v for k, v in LLAMA.items() if k != "head_dim"}),
    "qwen3": ("qwen3", LLAMA | {"tie_word_embeddings": True, "num_attention_heads": 4}),
    "mixtral": ("mixtral", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3-moe": ("qwen3_moe", LLAMA | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}),
    "deepseek": ("deepseek_v3", {k: v for k, v in LLAMA.items() if k != "head_dim"} | {
        "num_key_value_heads": 6, "q_lora_rank": 12, "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6,
        "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "n_group": 2,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1}),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied": ("gpt2", GPT2 | {"tie_word_embeddings": False, "activation_function": "gelu"}),
    "llama, scaled by yarn": ("llama", LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 700.0,
        "factor": 4.0, "original_max_position_embeddings": 16}}),
}  # fmt: skip
RUN = ("--batch", "8", "--sequence", "16", "--sample", "0")
KEPT = (*RUN, "--steps", "0", "--no-verify")
EAGER = {"experts_implementation": "eager"}  # grouped products have no float64


def published(name: str, folder: Path, dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A small random model of transformers, saved as it saves it."""
    kind, content = MODELS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **content)
    model = transformers.AutoModelForCausalLM.from_config(config, **EAGER)
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    model.to(dtype).eval()
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # float32 in every published file
            bias.data = torch.rand(bias.shape)
    model.save_pretrained(folder, **options)
    return model


def loaded(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **EAGER).eval()


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def trained(pool: Pool, ranks: int, *flags: str) -> Outcome:
    outcome = pool.script(ranks, "cluster/train.py", *flags)
    assert outcome.codes == [0] * ranks, outcome.out + outcome.err
    return outcome


def parsed(*flags: str) -> Namespace:
    frame = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(frame)
    return frame.parser.parse_args([*RUN, *flags])


# ---- In and out ------------------------------------------------------------------------------------------------------

# Model, ranks, layout.
ROUND_TRIPS = {
    "llama, one process": ("llama", 1, ()),
    "llama, stages": ("llama", 4, ("--pp", "2", "--dp", "2", "--schedule", "interleaved")),
    "llama, everything": ("llama", 8, ("--tp", "2", "--cp", "2", "--pp", "2", "--zero", "1")),
    "llama, zero-3": ("llama", 3, ("--dp", "3", "--zero", "3", "--batch", "9")),
    "llama, tied, stages": ("llama, tied", 4, ("--pp", "2", "--dp", "2", "--zero", "1")),
    "mistral, more ranks than key heads": ("mistral", 6, ("--tp", "6", "--batch", "6", "--zero", "1")),
    "qwen2, tp and zero-3": ("qwen2", 4, ("--tp", "2", "--dp", "2", "--zero", "3")),
    "qwen3, key heads copied, zero-1": ("qwen3", 8, ("--tp", "4", "--dp", "2", "--zero", "1")),
    "gpt2, tp": ("gpt2", 4, ("--tp", "2", "--pp", "2")),
    "gpt2, tp and zero-1": ("gpt2", 4, ("--tp", "2", "--dp", "2", "--zero", "1")),
    "gpt2, zero-3": ("gpt2", 3, ("--dp", "3", "--zero", "3", "--batch", "9")),
    "gpt2, untied, cp": ("gpt2, untied", 4, ("--cp", "2", "--pp", "2")),
    "mixtral, ep": ("mixtral", 4, ("--ep", "2", "--dp", "4", "--zero", "1")),
    "mixtral, etp, pp": ("mixtral", 4, ("--tp", "2", "--pp", "2", "--ep", "1", "--etp", "2")),
    "qwen3-moe, ep and tp": ("qwen3-moe", 4, ("--tp", "2", "--dp", "2", "--ep", "2", "--etp", "2")),
    "deepseek, ep": ("deepseek", 4, ("--dp", "4", "--ep", "2", "--zero", "1")),
    "deepseek, stages": ("deepseek", 2, ("--pp", "2")),
    "llama, stages, zero-3": ("llama", 4, ("--pp", "2", "--dp", "2", "--schedule", "zb-h1", "--zero", "3")),
    "qwen3-moe, stages, ep, zero-3": ("qwen3-moe", 4, ("--pp", "2", "--dp", "2", "--ep", "2", "--zero", "3")),
    "deepseek, ep, zero-3": ("deepseek", 4, ("--dp", "4", "--ep", "2", "--zero", "3")),
}


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_a_round_trip_keeps_every_bit(pool: Pool, tmp_path: Path, case: str) -> None:
    name, ranks, flags = ROUND_TRIPS[case]
    into, out = tmp_path / "in", tmp_path / "out"
    theirs = published(name, into, max_shard_size="40KB")
    trained(pool, ranks, *KEPT, *flags, "--hf", str(into), "--export", str(out), "--shard-size", "40KB")
    before, after = tensors(into), tensors(out)
    assert before.keys() == after.keys()
    for each in before:
        assert torch.equal(before[each].view(torch.uint8), after[each].view(torch.uint8)), each
    assert len(list(out.glob("*.safetensors"))) > 1
    tokens = torch.randint(263, (2, 16))
    with torch.no_grad():
        assert torch.equal(loaded(out)(tokens).logits, theirs(tokens).logits)


LOSSES = {
    "llama": ("llama", 4, ("--tp", "2", "--pp", "2")),
    "llama, scaled by yarn": ("llama, scaled by yarn", 2, ("--dp", "2", "--zero", "3")),
    "qwen2": ("qwen2", 4, ("--tp", "2", "--cp", "2")),
    "qwen3": ("qwen3", 2, ("--pp", "2")),
    "gpt2": ("gpt2", 4, ("--tp", "2", "--dp", "2", "--zero", "1")),
    "mixtral": ("mixtral", 4, ("--ep", "2", "--dp", "2", "--pp", "2", "--aux", "0")),
    "qwen3-moe": ("qwen3-moe", 2, ("--ep", "2", "--dp", "2", "--aux", "0")),
    "deepseek": ("deepseek", 2, ("--pp", "2", "--aux", "0")),
}


@pytest.mark.parametrize("case", LOSSES)
def test_the_loss_is_that_of_transformers_before_and_after(pool: Pool, tmp_path: Path, case: str) -> None:
    """Of the first batch with what was read; and of the validation batch with what was trained and written."""
    name, ranks, flags = LOSSES[case]
    theirs, report, out = published(name, tmp_path / "in"), tmp_path / "report.json", tmp_path / "out"
    flags = (*RUN, *flags, "--steps", "2", "--lr", "0.01", "--hf", str(tmp_path / "in"), "--export", str(out))
    outcome = trained(pool, ranks, *flags, "--report", str(report))  # beside one process
    text, held_out = Text(None, 16).split(HELD_OUT)

    def loss(model: Any, batch: tuple[torch.Tensor, torch.Tensor]) -> float:
        with torch.no_grad(), InFloat64():
            return torch.nn.functional.cross_entropy(
                model.double()(batch[0]).logits.flatten(0, 1), batch[1].flatten()
            ).item()

    found = json.loads(report.read_text())["losses"]
    assert found[0] == pytest.approx(loss(theirs, text.batch(0, 0, 8)), rel=1e-10)
    _, after = map(float, re.search(r"validation loss (\S+) before, (\S+) after", outcome.out).groups())
    assert after == pytest.approx(loss(loaded(out), held_out.batch(0, 0, 8)), abs=5.1e-5)
    assert abs(found[1] - found[0]) > 1e-3


@pytest.mark.parametrize(
    ("flags", "kind"),
    [
        (("--model", "gpt", "--untied"), "gpt2"),
        (("--model", "llama", "--tp", "2"), "llama"),
        (("--model", "gpt", "--dtype", "bfloat16"), "gpt2"),
    ],
)
def test_a_model_of_flags_is_written(pool: Pool, tmp_path: Path, flags: tuple[str, ...], kind: str) -> None:
    sizes = ("--hidden", "16", "--heads", "4", "--steps", "2", "--no-verify", "--lr", "0.01")
    outcome = trained(pool, 2, *RUN, *sizes, *flags, "--export", str(tmp_path / "out"), "--shard-size", "1KB")
    model = loaded(tmp_path / "out")
    assert model.config.model_type == kind
    inputs, targets = Text(None, 16).split(HELD_OUT)[1].batch(0, 0, 8)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(inputs).logits.flatten(0, 1), targets.flatten()).item()
    _, after = map(float, re.search(r"validation loss (\S+) before, (\S+) after", outcome.out).groups())
    assert after == pytest.approx(loss, abs=1e-2 if "bfloat16" in flags else 5.1e-5)
    dtype = torch.bfloat16 if "bfloat16" in flags else torch.float64
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_bits_are_kept_in_the_precision_of_the_training(pool: Pool, tmp_path: Path, dtype: str) -> None:
    published("llama", tmp_path / "in", torch.bfloat16)
    (tmp_path / "in" / "tokenizer.json").write_text("{}")
    flags = ("--dtype", dtype, "--dp", "2", "--zero", "1", "--hf", str(tmp_path / "in"))
    trained(pool, 2, *KEPT, *flags, "--export", str(tmp_path / "out"))
    before, after = tensors(tmp_path / "in"), tensors(tmp_path / "out")
    for name, value in before.items():
        assert after[name].dtype == getattr(torch, dtype)
        assert torch.equal(after[name].to(value), value)
    content = json.loads((tmp_path / "out" / "config.json").read_text())
    assert content == json.loads((tmp_path / "in" / "config.json").read_text()) | {"dtype": dtype}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip


def test_gpt2_as_it_was_published(pool: Pool, tmp_path: Path) -> None:
    """Names without the decoder's, masks in the file, dropouts in the configuration."""
    theirs, into = published("gpt2", tmp_path / "in"), tmp_path / "in" / "model.safetensors"
    plain = {name.removeprefix("transformer."): value for name, value in load_file(into).items()}
    plain |= {f"h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8) for i in range(4)}
    save_file(plain, into)
    config = json.loads((into.parent / "config.json").read_text())
    (into.parent / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.1, "attn_pdrop": 0.1}))
    with pytest.raises(ValueError, match="has resid_pdrop 0.1, .* use --dropout 0, or --dropout 0.1 --attention soft"):
        check(parsed("--hf", str(into.parent)), 1)
    trained(pool, 1, *KEPT, "--hf", str(into.parent), "--dropout", "0", "--export", str(tmp_path / "out"))
    for name, p in theirs.named_parameters():
        assert torch.equal(tensors(tmp_path / "out")[name], p), name


def test_a_head_that_was_saved_though_it_is_the_embedding(pool: Pool, tmp_path: Path) -> None:
    into = tmp_path / "model.safetensors"
    published("llama, tied", tmp_path)
    content = load_file(into)
    assert "lm_head.weight" not in content
    save_file(content | {"lm_head.weight": content["model.embed_tokens.weight"].clone()}, into)
    trained(pool, 1, *KEPT, "--hf", str(tmp_path))
    content["model.embed_tokens.weight"][262, 35] += 1e-9
    save_file(content | {"lm_head.weight": load_file(into)["lm_head.weight"]}, into)
    outcome = pool.script(2, "cluster/train.py", *KEPT, "--hf", str(tmp_path))
    assert outcome.codes == [1, 1]
    assert "lm_head.weight is not model.embed_tokens.weight" in outcome.err
    assert "Traceback" not in outcome.err
    assert "training" not in outcome.err


def test_a_folder_with_its_configuration_only(pool: Pool, tmp_path: Path) -> None:
    published("qwen3", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="has no model.safetensors, nor model.safetensors.index.json; use"):
        check(parsed("--hf", str(tmp_path)), 1)
    trained(pool, 2, *RUN, "--steps", "1", "--hf", str(tmp_path), "--init", "random", "--tp", "2")


def test_it_goes_on_from_a_checkpoint_and_has_a_dry_run(pool: Pool, tmp_path: Path) -> None:
    """Of a model whose description has named tuples, which JSON has not."""
    into, saved = str(tmp_path / "in"), ("--save", str(tmp_path / "run"), "--save-every", "1", "--no-verify")
    published("llama, scaled by yarn", tmp_path / "in")
    trained(pool, 2, *RUN, "--steps", "1", "--hf", into, *saved, "--tp", "2")
    outcome = trained(pool, 2, *RUN, "--steps", "2", "--hf", into, *saved, "--pp", "2")
    assert "goes on from" in outcome.out
    outcome = pool.script(
        1, "cluster/train.py", *RUN, "--hf", into, "--dry-run", "--world", "4", "--tp", "2", "--dp", "2"
    )
    assert "bytes held: weights" in outcome.out, outcome.err


MUON = {  # of q, k and v apart, copied, of latent attention, and of gated experts
    "qwen3, key heads copied": ("qwen3", 4, ("--tp", "4")),
    "qwen3-moe": ("qwen3-moe", 4, ("--tp", "2", "--dp", "2", "--ep", "2", "--etp", "2", "--sp", "--zero", "3")),
    "deepseek, stages": ("deepseek", 4, ("--pp", "2", "--dp", "2", "--ep", "2", "--zero", "3")),
}


@pytest.mark.parametrize("case", MUON)
def test_muon_trains_it_as_one_process(pool: Pool, tmp_path: Path, case: str) -> None:
    name, ranks, flags = MUON[case]
    published(name, tmp_path)
    flags = (*RUN, "--steps", "2", "--hf", str(tmp_path), "--optimizer", "muon", "--weight-decay", "0.3", *flags)
    assert "moments, elements on all ranks" in trained(pool, ranks, *flags).out


def test_a_failed_export_leaves_nothing(pool: Pool, tmp_path: Path) -> None:
    published("llama", tmp_path / "in")
    old = tmp_path / "out"
    published("gpt2", old)
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    assert pool.run(2, failing, str(tmp_path / "in"), str(old)) == ["no room"] * 2
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


def failing(folder: str, out: str) -> str:
    """An export in which the second rank cannot write."""
    args = parsed("--hf", folder)
    layout = Layout(pp=2, microbatch=1, microbatches=8)
    mesh, config = make_mesh(layout, "cpu", Ledger(), 30.0), configured(args)
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    spec = TrainSpec(config, None, layout, 0, POLICIES["float32"], torch.device("cpu"), adamw, drawn=False)
    worker, write_piece = Worker(spec, mesh), export.write_piece

    def full(*arguments: Any) -> None:
        if dist.get_rank() == 1:
            raise OSError("no room")
        write_piece(*arguments)

    export.write_piece = full
    try:
        export.export(worker, out, full_model(config, None), 10**9, folder_of(args))
    except ValueError as error:
        return re.search("no room", str(error)).group()
    finally:
        export.write_piece = write_piece
        worker.close()
    return "written"


# ---- Refused ---------------------------------------------------------------------------------------------------------


def rewritten(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        content = load_file(folder / "model.safetensors")
        change(content)
        save_file(content, folder / "model.safetensors")

    return act


def says(**fields: Any) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return act


def truncated(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def split(folder: Path, change: Callable[[dict[str, str]], object] = lambda _: None) -> None:
    content = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(content)
    where = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    for file in ("a.safetensors", "b.safetensors"):
        save_file({name: content[name] for name in names if where[name] == file}, folder / file)
    change(where)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))


NORM = "model.norm.weight"
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (rewritten(lambda c: c.pop(NORM)), f"has no tensor {NORM}, which the model of its config.json has"),
    "extra": (rewritten(lambda c: c.update(more=torch.ones(1))), "has a tensor more, which the model"),
    "a layer more": (rewritten(lambda c: c.update({"model.layers.4.mlp.up_proj.weight": torch.ones(1)})),
                     "has a tensor model.layers.4.mlp.up_proj.weight"),
    "a bias": (rewritten(lambda c: c.update({"model.layers.0.mlp.up_proj.bias": torch.ones(60)})), "mlp.up_proj.bias"),
    "misshaped": (rewritten(lambda c: c.update({NORM: torch.ones(35)})), r"is \[35\], and by config.json \[36\]"),
    "integers": (rewritten(lambda c: c.update({NORM: torch.ones(36, dtype=torch.int8)})), "is of type I8, which is"),
    "truncated": (truncated, "model.safetensors is no safetensors file, or truncated"),
    "no file": (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors, nor"),
    "an absent shard": (lambda f: split(f, lambda w: w.update(x="c.safetensors")), "has no c.safetensors, which"),
    "another place": (lambda f: split(f, lambda w: w.update({NORM: "a.safetensors" if w[NORM][0] == "b" else
                      "b.safetensors"})), f"{NORM} is in ., and by|{NORM} is in .*safetensors, and by"),
    "not in its shard": (lambda f: split(f, lambda w: w.update(x="a.safetensors")), "x is not in a.safetensors, where"),
    "outside": (lambda f: split(f, lambda w: w.update(x="../a.safetensors")), "has no ../a.safetensors"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "no configuration": (lambda f: (f / "config.json").unlink(), "config.json: No such file"),
    "another family": (says(model_type="bert"), "model_type 'bert' is not known, only gpt2, llama"),
    "another head": (says(architectures=["LlamaForSequenceClassification"]), "architecture LlamaForSequenceClassif"),
    "counted only": (says(model_type="qwen2_moe", num_experts=4, num_experts_per_tok=2, architectures=None,
                          moe_intermediate_size=8),
                     "a gate of the shared expert"),
    "another rotary scaling": (says(rope_parameters={"rope_type": "longrope"}),
                               "not built: rotary positions scaled by longrope"),
    "part of a head": (says(partial_rotary_factor=0.5), "not built: partial_rotary_factor 0.5"),
    "part of a head, new": (says(rope_parameters={"partial_rotary_factor": 0.5}), "partial_rotary_factor 0.5"),
    "a rotary field": (says(rope_parameters={"long_factor": [1.0]}), "rope_parameters: long_factor is not known"),
    "window": (says(model_type="mistral", sliding_window=8, architectures=None), "not built: a window of 8 tokens"),
    "positions": (says(max_position_embeddings=8), "--sequence 16: max_position_embeddings is 8"),
    "activation": (says(hidden_act="gelu"), 'not built: hidden_act "gelu"'),
    "biases": (says(attention_bias=True), "not built: attention_bias true"),
    "biases of the MLP": (says(mlp_bias=True), "not built: mlp_bias true"),
    "layers": (says(layer_types=["sliding_attention"] * 4), "layer_types .*sliding_attention.* is not built"),
    "dropout": (says(attention_dropout=0.1), "has attention_dropout 0.1, and in a training that is for you to say"),
    "quantized": (says(quantization_config={"quant_method": "fp8"}), "quantized weights are not built"),
    "some layers without experts": (says(mlp_only_layers=[1]), "mlp_only_layers .1. is not built"),
    "unknown": (says(logit_scale=0.5), "logit_scale 0.5 is not known here, and could change what is computed"),
    "vocabulary": (says(vocab_size=255), "vocab_size 255: text in bytes has 256"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSED)
def test_a_folder_is_refused_by_name(tmp_path: Path, why: str) -> None:
    change, message = REFUSED[why]
    published("llama", tmp_path, torch.float32)
    change(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        check(parsed("--hf", str(tmp_path)), 1)
    assert "use " in str(refusal.value)
    assert str(tmp_path) in str(refusal.value)


GPT2_REFUSED = {
    "activation_function": "gelu_fast", "scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
    "add_cross_attention": True, "scale_attn_weights": False,
}  # fmt: skip


@pytest.mark.parametrize("field", GPT2_REFUSED)
def test_what_gpt2_can_say_and_is_not_built(tmp_path: Path, field: str) -> None:
    published("gpt2", tmp_path)
    says(**{field: GPT2_REFUSED[field]})(tmp_path)
    with pytest.raises(ValueError, match=field):
        check(parsed("--hf", str(tmp_path)), 1)


CONTRADICTIONS = {
    "--layers 3: --hf .* has 4, and says what the model is; leave --layers out": ("--layers", "3"),
    "--kv-heads 3: --hf .* has 2": ("--kv-heads", "3"),
    "--experts 4: --hf .* has 0": ("--experts", "4"),
    "--model: --hf": ("--model", "llama"),
    "--shard-size 5XB: must be a size of a file; use 5GB": ("--shard-size", "5XB"),
    "--init random.safetensors: No such file": ("--init", "random.safetensors"),
    "is the folder that --hf reads": ("--export", "SAME"),
    "--export /nowhere/out: there is no folder /nowhere": ("--export", "/nowhere/out"),
    "holds test_plan.py, which an export does not replace|holds .*, which an export": ("--export", "tests/cluster"),
    "is a file; use a folder": ("--export", "README.md"),
}


@pytest.mark.parametrize("message", CONTRADICTIONS)
def test_flags_are_refused(tmp_path: Path, message: str) -> None:
    published("llama", tmp_path)
    flags = [str(tmp_path) if flag == "SAME" else flag for flag in CONTRADICTIONS[message]]
    with pytest.raises(ValueError, match=message):
        check(parsed("--hf", str(tmp_path), *flags), 1)
    check(parsed("--hf", str(tmp_path), "--layers", "4", "--kv-heads", "2", "--untied"), 1)


def test_what_no_family_has_is_not_exported(tmp_path: Path) -> None:
    out = ("--export", str(tmp_path / "out"))
    with pytest.raises(ValueError, match=r"use --export .*out.safetensors, with our own names"):
        check(parsed("--experts", "4", *out), 1)
    with pytest.raises(ValueError, match="no published family has a bias of the selection"):
        check(parsed("--model", "llama", "--experts", "4", "--bias-rate", "0.1", *out), 1)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_a_rank_has_its_part_and_one_tensor(tmp_path: Path) -> None:
    """Most memory while reading and writing, mapped files too, of each of 4 ranks, above its part and gradients.

    The file has 128 MiB, a rank a quarter of the layers' 96 MiB and of the two tables, of 16 MiB each.
    """
    sizes = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 2, "head_dim": None,
             "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096}  # fmt: skip
    config = transformers.AutoConfig.for_model("llama", **LLAMA | sizes)
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / "in")
    total, largest = sum(4 * p.numel() for p in model.parameters()), max(4 * p.numel() for p in model.parameters())
    flags = [str(tmp_path / "in"), str(tmp_path / "out")]
    port = socket.socket()
    port.bind(("127.0.0.1", 0))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=4", "--master_port",
               str(port.getsockname()[1]), "-m", "tests.cluster.peak", *flags]  # fmt: skip
    port.close()
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    print(f"file {total:,}, largest tensor {largest:,}; part, peak of reading, of writing:", *found)  # pytest -rP
    assert len(found) == 4
    for part, reading, writing in found:
        assert part < 0.27 * total
        assert reading < largest + 4e6
        assert writing < largest + 4e6
    for name, value in tensors(tmp_path / "out").items():
        assert torch.equal(value, tensors(tmp_path / "in")[name])


# ---- Bugs put in -----------------------------------------------------------------------------------------------------


def read_in_order(self: Folder, weights: dict[str, Chunks], found: dict[str, Any]) -> None:
    """As if the rows of a fused weight were ordered as here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "to_published", lambda name, value, config: [
            (theirs, value.T if ".h." in theirs and value.dim() == 2 else value)
            for theirs, _ in to_published(name, value, config)
        ])  # fmt: skip
        READ(self, weights, found)


def first_slices(self: Folder, weights: dict[str, Chunks], found: dict[str, Any]) -> None:
    """Every rank reads what the first one has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hf, "pieces", lambda name, offset, *rest: pieces(name, torch.Size([0] * len(offset)), *rest))
        READ(self, weights, found)


def published_late(self: Folder, weights: dict[str, Chunks], found: dict[str, Any]) -> None:
    """A tensor is left out."""
    READ(self, {name: each for name, each in weights.items() if not name.endswith("mlp.down.weight")}, found)


READ = Folder.read
BUGS = {
    "gpt2": (read_in_order, {"tp": 1}),
    "llama": (first_slices, {"tp": 2}),
    "llama, tied": (published_late, {"tp": 1}),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_reading_is_seen(pool: Pool, tmp_path: Path, name: str) -> None:
    theirs, (bug, axes) = published(name, tmp_path), BUGS[name]
    text = Text(None, 16).split(HELD_OUT)[0].batch(0, 0, 8)
    with torch.no_grad():
        exact = torch.nn.functional.cross_entropy(theirs(text[0]).logits.flatten(0, 1), text[1].flatten()).item()
    for read, apart in ((READ, False), (bug, True)):
        found = pool.run(2, evaluated, str(tmp_path), read, axes)[0]
        assert (abs(found - exact) > 1e-3) == apart


def evaluated(folder: str, read: Callable, axes: dict[str, int]) -> float:
    layout = Layout(**axes, dp=2 // axes["tp"], microbatch=8 // (2 // axes["tp"]))
    args = parsed("--hf", folder)
    mesh, config = make_mesh(layout, "cpu", Ledger(), 30.0), configured(args)
    adamw = partial(torch.optim.AdamW, lr=1e-3)
    spec = TrainSpec(config, None, layout, 0, POLICIES["float64"], torch.device("cpu"), adamw, drawn=False)
    worker = Worker(spec, mesh)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Folder, "read", read)
        load.load_published(worker, folder_of(args), full_model(config, None))
    found = worker.evaluate(*Text(None, 16).split(HELD_OUT)[0].batch(0, 0, 8))
    worker.close()
    return found


def test_a_token_outside_its_vocabulary_is_refused_with_what_works(tmp_path: Path) -> None:
    """`--vocabulary` would be refused."""
    published("llama", tmp_path)
    ids = np.arange(600, dtype=np.uint16) % 264
    np.save(tmp_path / "ids.npy", ids)
    args = parsed("--hf", str(tmp_path), "--tokens", str(tmp_path / "ids.npy"))
    with pytest.raises(ValueError, match="id 263 at position 263 is outside the vocabulary of 263; use the tokens of"):
        check_data(args, folder_of(args).config)
