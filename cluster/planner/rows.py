"""A row of `published_runs.csv` as a model, a machine, a named software, and every layout that it can mean. Lecture 03.

A row that does not print what the model of time needs means several layouts: one for each possible value. A row of
which a model, a cluster or a step is not known means none, and `Row.why` says what it lacks.
"""

import csv
import re
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from cluster.planner.counting import attention_flops, step_flops
from cluster.planner.hardware import PRESETS as MACHINES
from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.machines import network
from cluster.planner.memory import parameters
from cluster.planner.models import DEEPSEEK_V3, FAMILIES, PUBLISHED
from cluster.planner.overlap import ways
from cluster.planner.printed import again_of, features_of, recomputation
from cluster.planner.software import NAMED, NOTHING_AGAIN, Again, Software, with_features
from core.model.config import ModelConfig

COLUMNS = frozenset(
    ("source", "model", "gpu", "gpus", "precision", "tp", "cp", "ep", "pp", "vpp", "zero", "mbs", "gbs", "seq",
     "recompute", "tokens_per_s_per_gpu", "tflops_per_gpu", "mfu", "memory_gb", "notes")
)  # fmt: skip
FILE = Path(__file__).parent / "published_runs.csv"
ALL_LOGITS = 2**40  # tokens of a chunk of the loss: all at once, as all of these programs make them
GIB = 2**30

GPUS = {  # as the table writes them
    "H100 80GB": "dgx-h100", "H100 80GB 700W": "dgx-h100", "H100": "dgx-h100", "H800 80GB": "dgx-h800",
    "H100 96GB HBM2e 500W": "h100-500w", "A100 80GB": "dgx-a100", "B200": "dgx-b200", "B300": "dgx-b300",
    "GB200": "gb200-nvl72", "GB300": "gb300-nvl72",
}  # fmt: skip
SOFTWARE = (  # of a source, by a part of its name; the first that is there
    ("llm-foundry", "fsdp-eager"), ("nanotron", "nanotron"), ("maxtext", "maxtext"), ("fms-fsdp", "fsdp-compiled"),
    ("torchtitan", "fsdp-compiled"), ("accelerate", "fsdp-compiled"), ("Automodel", "automodel"),
    ("ulysses-alst", "deepspeed"), ("", "megatron-core"),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One published run."""

    cells: dict[str, str] = field(hash=False, repr=False)
    model: ModelConfig | None = None
    machine: Machine | None = None
    software: str = ""
    again: Again = NOTHING_AGAIN  # see `Software.again`
    features: tuple[str, ...] = ()  # what its notes say of overlap and launches, see `software.with_features`
    layouts: tuple[Layout, ...] = ()  # that it can mean
    why: str = ""  # what it lacks, where it means none
    seconds: float = 0.0  # of a step; 0: not printed
    memory: float = 0.0  # bytes of a device; 0: not printed
    memory_dp: int = 0  # where the memory is of a smaller or larger cluster, its data parallel ranks
    bits: int = 16  # of the elements that are multiplied
    open: tuple[str, ...] = ()  # what it does not print

    @property
    def source(self) -> str:
        """Short: who published it."""
        name = self.cells["source"]
        owner, *rest = re.split(r"[ \[]", name)
        more = [word for word in ("Large Scale", "PR #482", "maxtext", "grok1", "nemotron", "llama3.1", "175b",
                                  "deepseek", "llama3/fine", "skills", "performance-summary", "asyncTP")
                if word in name]  # fmt: skip
        return " ".join([owner.split("/")[-1], *more[:1], *(["2"] if rest and not owner else [])])

    @property
    def group(self) -> tuple[str, str]:
        """The model and the size of the cluster: what a run is predicted without."""
        return self.cells["model"].split(",")[0], self.cells["gpus"]


def whole(cell: str) -> int | None:
    return int(float(cell)) if re.fullmatch(r"\d+(\.0+)?", cell) else None


# ---- The model -------------------------------------------------------------------------------------------------------


def model_of(name: str, sequence: int) -> ModelConfig | None:
    """The sizes that a name says, or that are published under it; None: not understood."""
    sizes = {key: int(value) for key, value in re.findall(r"\b(ffn|[Lhav])(\d+)", name)}
    if name.startswith(("MPT", "GPT-")) and "h" in sizes:  # GPT style; MPT's head is its embedding
        return ModelConfig(
            sizes["v"], sequence, sizes["h"], sizes["L"], sizes["a"], tied=name.startswith("MPT"), name=name,
        )  # fmt: skip
    if name.startswith("Llama-MHA"):
        return replace(
            PUBLISHED["llama3-8b"], vocabulary=sizes["v"], sequence=sequence, hidden=sizes["h"], layers=sizes["L"],
            heads=sizes["a"], kv_heads=None, feed_forward=sizes["ffn"], tied=" tied" in name, name=name,
        )  # fmt: skip
    plain = re.sub(r"[^a-z0-9]", "", re.sub(r"\(.*?\)|proxy.*|with MTP", "", name).lower())
    found = next((model for key, model in FAMILIES.items() if re.fullmatch(key, plain)), None)
    if found is None:
        return None
    if "L" in sizes and "proxy" in name:
        found = replace(found, layers=sizes["L"])
    # NVIDIA's later runs have the module for the token after next, which is one layer more.
    mtp = "with MTP" in name or (name.startswith("DeepSeekV3") and "w/o MTP" not in name)
    if found.latent and found.layers == DEEPSEEK_V3.layers and mtp:
        found = replace(found, layers=found.layers + 1)
    positions = {"positions": sequence} if found.learned_positions else {}
    return replace(found, sequence=sequence, name=name, **positions)


# ---- The layouts -----------------------------------------------------------------------------------------------------


def layouts_of(cells: dict[str, str], model: ModelConfig, gpus: int) -> tuple[tuple[Layout, ...], tuple[str, ...]]:
    """Every layout that the row can mean, and the fields that it leaves open."""
    tp, cp, ep, pp = (whole(cells[name]) or 1 for name in ("tp", "cp", "ep", "pp"))
    dp = gpus // (tp * cp * pp)
    if not dp or tp * cp * pp * dp != gpus:
        return (), ()
    batch, zero = whole(cells["gbs"]), whole(cells["zero"][:1])
    samples = batch // dp if batch else None
    microbatch, v = whole(cells["mbs"]), whole(cells["vpp"])
    unsaid = []
    if not samples and microbatch:  # one microbatch a rank, or as many as fill the pipeline
        samples, unsaid = microbatch * (4 * pp if pp > 1 else 1), [*unsaid, "gbs"]
    if not samples:
        return (), ()
    if not microbatch and pp > 1 and "torchtitan" in cells["source"]:
        microbatch = max(1, samples // pp)  # its default: as many microbatches as stages
    sizes = [microbatch] if microbatch else [b for b in (1, 2, 4, 8, 16, 32) if samples % b == 0]
    chunks = (
        [v] if v or pp == 1 else [c for c in range(1, model.layers // pp + 1) if model.layers % (pp * c) == 0] or [1]
    )
    chunks = [next(c for c in range(c or 1, 0, -1) if divides(model.layers, pp * c)) for c in chunks]
    if cells["vpp"] == ">1":
        chunks = [c for c in chunks if c > 1]
    said = cells["recompute"] if cells["recompute"] != "selective" else ""  # of some layers, how many is not said
    if "Automodel" in cells["source"]:
        said = said or "full"  # its recipes checkpoint every layer
    if "nanotron" in cells["source"]:
        said = said or "none"  # as its benchmark's script has it
    kinds = [recomputation(said)] if said else ["none", "selective", "full"]
    unsaid += [n for n, known in (("mbs", microbatch), ("vpp", v or pp == 1), ("recompute", len(kinds) == 1))
               if not known]  # fmt: skip
    ulysses = cp if "Ulysses" in cells["notes"] else 1
    found = [
        Layout(
            tp=tp, cp=cp, ep=ep if model.experts else 1, pp=pp, dp=dp, v=c or 1, sp=tp > 1, ulysses=ulysses,
            schedule="interleaved" if (c or 1) > 1 else "1f1b", zero=1 if zero is None else zero, microbatch=b,
            microbatches=max(1, samples // b), recompute=kind, loss_chunk=ALL_LOGITS,
            **({"reduce": "step", "reshard": "step"} if zero == 3 and pp > 1 else {}),
        )
        for b in sizes for c in chunks for kind in kinds if b <= samples
    ]  # fmt: skip
    return tuple(found), tuple(unsaid)


def divides(layers: int, stages: int) -> bool:
    """Whether so many stages have a layer each; else the row's have the embedding or the head alone."""
    return layers % stages == 0 or layers >= 2 * stages - 2


def with_network(machine: Machine, notes: str) -> Machine:
    """With the network that the row prints, for each device."""
    if printed := re.search(r"(\d+)\s?Gbps(?: per node| node-node)?", notes):
        return replace(machine, outside=network(float(printed[1]) / 8 / machine.node))
    return machine


# ---- The time --------------------------------------------------------------------------------------------------------

CAUSAL = ("Megatron-Bridge", "MoE-ModelZoo", "Automodel", "glennklockwood")  # count half of attention's products


def seconds_of(cells: dict[str, str], model: ModelConfig, layout: Layout, machine: Machine) -> float:
    """Of a step: from tokens a second, or where only FLOP are printed from them, as the source counts them."""
    if printed := re.search(r"step ([\d.]+) ?(s|ms)\b", cells["notes"]):
        return float(printed[1]) * (1 if printed[2] == "s" else 1e-3)
    tokens, ranks = layout.batch * model.sequence, layout.ranks
    if rate := cells["tokens_per_s_per_gpu"]:
        return tokens / (float(rate) * ranks)
    flop = step_flops(model, layout.batch)
    if any(name in cells["source"] for name in CAUSAL):
        attention = 2 * model.sequence * (model.query_size + model.value_size) * model.layers
        flop -= 3 * tokens * attention // 2
    if rate := cells["tflops_per_gpu"]:
        return flop / (float(rate) * 1e12 * ranks)
    if cells["mfu"]:
        return flop / (float(cells["mfu"]) / 100 * machine.peak * ranks)
    return 0.0


def too_fast(model: ModelConfig, layout: Layout, machine: Machine, seconds: float, bits: int) -> bool:
    """Whether a step would need more than the peak, with half of attention's products."""
    attention = 3 * layout.batch * model.sequence * model.layers * attention_flops(model) // 2
    peak = {16: machine.peak, 8: machine.peak8, 4: machine.peak4}[bits]
    return step_flops(model, layout.batch) - attention > seconds * layout.ranks * peak


def holds_weights(model: ModelConfig, layout: Layout, machine: Machine) -> bool:
    """Whether there is room for a rank's weights and gradients in 2 bytes each, as ZeRO-1 has them, and little else."""
    return 4 * sum(parameters(model, layout)) < 0.9 * machine.memory


def too_far(model: ModelConfig, layout: Layout, machine: Machine, seconds: float) -> bool:
    """Whether ZeRO-3 gathers weights for longer than a step, at the links' full bandwidth."""
    if layout.zero < 3 or layout.reshard == "step":
        return False
    perfect = replace(NAMED["fsdp-eager"], links=1.0)
    gather = ways(model, layout, parameters(model, layout), machine, perfect).gather
    return 2 * layout.microbatches * gather > seconds


def memory_of(cells: dict[str, str]) -> float:
    """Bytes of a device. The notes say where the table's are GiB."""
    if cells["memory_gb"]:
        return float(cells["memory_gb"]) * (GIB if "GiB" in cells["notes"] else 1e9)
    printed = re.search(r"peak_memory_usage ([\d.]+)e9", cells["notes"])
    return float(printed[1]) * 1e9 if printed else 0.0


# ---- A row -----------------------------------------------------------------------------------------------------------

UNLIKE = {"LoRA": "adapters are trained, not the model", "tokendrop": "drops tokens, how many is not printed",
          "offload": "states are moved to the host"}  # fmt: skip
OTHER_LAYERS = r"Nemotron[-_ ]?(3|V3|H)|Mamba|Qwen3-Next|DeepSeekV4|Jamba|Falcon-H1"  # not attention and an MLP alone


def row_of(cells: dict[str, str]) -> Row:
    """What a row of the table says."""
    source, text = cells["source"], f"{cells['source']} {cells['model']} {cells['recompute']} {cells['notes']}"
    software = next(name for part, name in SOFTWARE if part in source)
    features = features_of(cells["notes"], source, experts=False)
    if "torchtitan" in source and "eager" in features:
        software = "fsdp2-eager"
    if software == "megatron-core" and re.match("Moonlight|DeepSeek|Kimi", cells["model"]):
        features = (*features, "small-moments")  # as the recipes of this family have it
    bits = {"BF16": 16, "BF16 pure": 16, "": 16, "NVFP4": 4}.get(cells["precision"], 8)
    row = Row(cells, software=software, features=features, memory=memory_of(cells), bits=bits)
    if lacks := next((why for word, why in UNLIKE.items() if word in text + cells["precision"]), ""):
        return replace(row, why=lacks)
    gpus, sequence = whole(cells["gpus"]), whole(cells["seq"])
    machine = MACHINES.get(GPUS.get(cells["gpu"], ""))
    if not gpus or machine is None:
        return replace(row, why="no cluster that is known")
    model = model_of(cells["model"], sequence or 4096)
    if model is None:
        hybrid = re.search(OTHER_LAYERS, cells["model"])
        return replace(row, why="layers of state-space or linear attention, which are not modelled" if hybrid
                       else "a model that is not understood")  # fmt: skip
    if not sequence:
        return replace(row, model=model, why="no sequence length")
    if model.experts:
        found = {*features, *features_of(cells["notes"], source, experts=True)}
        row = replace(row, features=tuple(sorted(found)))
    layouts, unsaid = layouts_of(cells, model, gpus)
    if not layouts:
        return replace(row, model=model, machine=machine, why="no layout or batch")
    if "recipe default" in cells["notes"] and not holds_weights(model, layouts[0], machine):
        layouts = tuple(replace(layout, zero=3) for layout in layouts)  # the recipe's stage was assumed: it shards more
        unsaid = (*unsaid, "zero")
    seconds = seconds_of(cells, model, layouts[0], machine)
    if seconds and too_fast(model, layouts[0], machine, seconds, bits):
        return replace(row, model=model, why="more FLOP a second than the device's peak: not this model or batch")
    if seconds and all(too_far(model, layout, machine, seconds) for layout in layouts):
        return replace(row, model=model, why="its weights take longer to gather than its step: not this layout")
    if elsewhere := re.search(r"memory_allocated \S+ B (?:for|at) (\d+) GPUs", cells["notes"]):
        of = layouts[0].ranks // layouts[0].dp
        row = replace(row, memory_dp=int(elsewhere[1]) // of)
    return replace(row, model=model, machine=with_network(machine, f"{source} {cells['notes']}"), layouts=layouts,
                   seconds=seconds, open=unsaid, again=again_of(cells["recompute"], model))  # fmt: skip


def rows(path: Path = FILE) -> list[Row]:
    """Raises ValueError: the file cannot be read, or has not the table's columns."""
    use = f"use a file with the columns of planner/{FILE.name}"
    try:
        with path.open(newline="", encoding="utf-8-sig") as lines:
            table = list(csv.DictReader(lines))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--runs {path}: cannot be read, {error}; {use}") from None
    lacks = COLUMNS - set(table[0] if table else ())
    if lacks:
        raise ValueError(f"--runs {path}: has no column {min(lacks)}; {use}")
    return [row_of({name: value or "" for name, value in cells.items()}) for cells in table]


@cache
def published() -> tuple[Row, ...]:
    return tuple(rows())


def software_of(row: Row, software: Software | None = None) -> Software:
    """The row's named software, or the one given in its place, told to do what the row says."""
    return replace(with_features(software or NAMED[row.software], row.features, row.bits), again=row.again)
