"""The combined run of a small Llama against picotron (github.com/huggingface/picotron), tp 2, pp 2, dp 2 on 8 ranks.

`PICOTRON` is the folder of a clone (`python -m tests.bench --help`); where it is not set the row is left out. Both have
the same weights, samples, micro-batches, 1F1B and AdamW in float32; ours has ZeRO-1 too, which picotron does not have.
Of picotron are the process groups, the model, its shards, the schedule and the buckets, put together as in its
`train.py`, less the logging. Measured is its own path for a CPU (`use_cpu`): torch's attention, and the norm and the
rotary positions by plain operations. Two things keep it from running, and are replaced here: the import of flash_attn,
of which it calls nothing on this path, and `torch.cuda.synchronize()` after every message.

The losses of all steps are compared. picotron's gradients are not right with a pipeline: measured, all of them are
4.00000 times those of one process, for 4 micro-batches, and otherwise differ by 2e-6: the losses are means over a
micro-batch, and their gradients are summed (without a pipeline it divides). Adam hides the scale.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor, nn

from core.model.gpt import GPT, GPTConfig, materialize
from core.model.hf import to_published
from core.proof.launch import Job
from tests.bench import combined
from tests.bench.combined import DTYPE, LAYOUT, adamw
from tests.bench.harness import Row, Step, Topic, alternate, row, silent

CONFIG = GPTConfig(
    name="llama", layers=8, hidden=256, heads=8, kv_heads=4, feed_forward=704, sequence=128, gated=True, biases=False,
    learned_positions=False, tied=False, norm="rms", rope_theta=500_000.0,
)  # fmt: skip
ROW = "combined Llama / picotron"
FLASH = {  # what picotron's model imports at the top
    "flash_attn.flash_attn_interface": "flash_attn_func",
    "flash_attn.layers.rotary": "apply_rotary_emb",
    "flash_attn.ops.triton.layer_norm": "layer_norm_fn",
}
NAMES = {"model.": "", "layers.": "decoder_layers.", "embed_tokens": "embedding", "self_attn": "attention",
         "o_proj": "out_proj", "lm_head": "final_proj"}  # fmt: skip
# Of a published name, to picotron's.


def lacking() -> str:
    """Why picotron cannot be measured here; empty where it can."""
    folder = os.environ.get("PICOTRON", "")
    if not folder:
        return "PICOTRON is not set; --help says how"
    model = Path(folder) / "picotron" / "model.py"
    return "" if model.is_file() else f"PICOTRON={folder}: there is no {model}; it is the folder of a clone"


def modules(folder: str, device: torch.device) -> Callable[[str], ModuleType]:
    """picotron.NAME by its name, with what it reads of the environment."""
    os.environ |= {"DEVICE": device.type, "DTYPE": "float32", "FLASH_ATTEN": "0", "CONTEXT_PARALLEL": "0"}
    os.environ.setdefault("LOCAL_RANK", os.environ.get("RANK", "0"))
    sys.path.append(str(Path(folder).resolve()))
    stand_ins = {} if importlib.util.find_spec("flash_attn") else dict(flash_attention())
    sys.modules.update(stand_ins)
    importlib.import_module("picotron.model")
    for name in stand_ins:  # so that nothing else takes it for installed
        del sys.modules[name]
    return lambda name: importlib.import_module(f"picotron.{name}")


def flash_attention() -> Iterator[tuple[str, ModuleType]]:
    """Modules to import, whose functions raise."""

    def called(*_: object, **__: object) -> None:
        raise AssertionError("picotron calls flash_attn, which is not installed: this is not its path for a CPU")

    for path, function in FLASH.items():
        for end in range(1, path.count(".") + 1):
            yield (name := ".".join(path.split(".")[:end])), ModuleType(name)
        module = ModuleType(path)
        setattr(module, function, called)
        yield path, module


class Batches:
    """This rank's micro-batches, the same in every step, in picotron's form."""

    def __init__(self, inputs: Tensor, targets: Tensor):
        self.grad_acc_steps = LAYOUT.microbatches
        self.endless = cycle(zip(inputs.chunk(LAYOUT.microbatches), targets.chunk(LAYOUT.microbatches), strict=True))
        self.positions = torch.arange(inputs.shape[1], device=inputs.device).expand(LAYOUT.microbatch, -1)

    def __next__(self) -> dict[str, Tensor | None]:
        x, y = next(self.endless)
        return {"input_ids": x, "target_ids": y, "position_ids": self.positions, "hidden_states": None}


def load(model: nn.Module, rank: int, ranks: int) -> None:
    """Our start values into this rank's stage and shards: a parameter is cut where it is shorter than the whole."""
    whole = {}
    for ours, value in materialize(GPT(CONFIG), 0, torch.device("cpu"), DTYPE).named_parameters():
        for name, each in to_published(ours, value.detach(), CONFIG):
            for published, pico in NAMES.items():
                name = name.replace(published, pico)
            whole["final_norm.weight" if name == "norm.weight" else name] = each
    for name, parameter in model.named_parameters():
        value = whole[name]
        for dim, size in enumerate(parameter.shape):
            if size < value.shape[dim]:
                value = value.chunk(ranks, dim)[rank]
        assert parameter.shape == value.shape, f"{name}: {parameter.shape}, and ours is {value.shape}"
        parameter.data.copy_(value)


def picotrons(made: combined.Bench, folder: str) -> Step:
    device = made.job.device
    get = modules(folder, device)
    groups = get("process_group_manager")
    groups.setup_process_group_manager(tp_size=LAYOUT.tp, cp_size=1, pp_size=LAYOUT.pp, dp_size=LAYOUT.dp)
    here = groups.process_group_manager
    pipeline = get("pipeline_parallel.pipeline_parallel")
    config = SimpleNamespace(
        vocab_size=CONFIG.vocabulary, hidden_size=CONFIG.hidden, num_hidden_layers=CONFIG.layers,
        num_attention_heads=CONFIG.heads, num_key_value_heads=CONFIG.kv_heads, intermediate_size=CONFIG.feed_forward,
        max_position_embeddings=CONFIG.sequence, rms_norm_eps=CONFIG.norm_eps, rope_theta=CONFIG.rope_theta,
    )  # fmt: skip
    model = get("tensor_parallel.tensor_parallel").apply_tensor_parallel(get("model").Llama(config))
    model = pipeline.PipelineParallel(model, config).to(device, DTYPE)
    load(model, here.tp_rank, LAYOUT.tp)
    model = get("data_parallel.data_parallel").DataParallelBucket(model)
    optimizer = adamw(model.parameters())
    batches = Batches(*(t.chunk(LAYOUT.dp)[here.dp_rank] for t in made.batch))
    shape = (LAYOUT.microbatch, CONFIG.sequence, CONFIG.hidden)
    counted = here.pp_is_last_stage and here.tp_rank == 0
    on_a_cpu = mock.patch.object(torch.cuda, "synchronize") if device.type == "cpu" else nullcontext()

    def step() -> None:
        optimizer.zero_grad()
        with on_a_cpu:
            loss = pipeline.train_step_pipeline_1f1b(model, batches, shape, device, DTYPE)
        made.losses.setdefault("picotron", []).append(loss / LAYOUT.dp if counted else 0.0)
        optimizer.step()
        model.reset()

    return step


def bench(job: Job, rounds: int, wanted: Collection[str]) -> list[Row]:
    made = combined.Bench(job, CONFIG)
    runs = {"combined": made.ours(), "floor": silent(combined.Bench(job, CONFIG).ours())}
    runs["picotron"] = picotrons(made, os.environ["PICOTRON"])
    times = alternate(job, runs, rounds)
    shares = job.gather(made.losses)
    if job.rank:
        return []
    losses = {name: [sum(each) for each in zip(*(s[name] for s in shares), strict=True)] for name in made.losses}
    for name, found in losses.items():
        apart = max(abs(a / b - 1) for a, b in zip(found, losses["combined"], strict=True))
        assert apart < 1e-3, f"{name} and ours have other losses: {found} for {losses['combined']}"
    return [row(times, name, "combined", "picotron", "floor", 1.5, tokens=LAYOUT.batch * CONFIG.sequence)
            for name in wanted]  # fmt: skip


TOPIC = Topic(8, (ROW,), bench, rounds=9, lacking=lacking)
