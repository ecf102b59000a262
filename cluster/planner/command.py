"""The command that trains a planned model in a planned layout, and what of the model it cannot say. Lecture 03."""

import argparse
import json
import re
import shlex
from math import gcd
from pathlib import Path

from cluster.planner.hardware import Machine
from cluster.planner.layout import Layout
from cluster.planner.options import SIZES
from cluster.run.hf import CONFIG, INDEX, SINGLE
from core.model.config import ModelConfig
from core.model.publish import to_content
from core.model.published import read_json
from core.model.text import VOCABULARY

OWN_TEXT = 40_000  # tokens of the tenth of CPython's help text that cluster/train.py validates on, at least
# What the flags of cluster/train.py say of a model, and the words for the rest, which a published folder can say.
TRAINED = ("layers", "hidden", "heads", "feed_forward", "sequence")
UNSAID = {
    "vocabulary": "a vocabulary of {:,}",
    "heads": "{} heads",
    "query_groups": "{} heads of keys and values",
    "head_dim": "heads of {}",
    "latent": "latent attention",
    "dense_layers": "{} layers without experts",
    "qk_norm": "query and key norms",
    "qkv_bias": "biases of queries, keys and values",
    "tied": "a head that is the embedding",
    "positions": "a table of {:,} positions",
    "score": "{} scores",
    "weight_scale": "weights of experts times {}",
    "groups": "{} groups of experts",
    "norm_eps": "norms with {}",
    "rope_theta": "rotary positions to the base {:,.0f}",
    "rope_scaling": "{}",
    "activation": "{}",
}


def folder_of(args: argparse.Namespace) -> str | None:
    """Of `--config`, where the model is what the file says, so that `cluster/train.py --hf` trains it."""
    changed = any(getattr(args, size) is not None for size in SIZES if size != "sequence")
    return None if args.config is None or changed or Path(args.config).name != CONFIG else str(Path(args.config).parent)


def write_config(folder: str, model: ModelConfig) -> str:
    """Write `config.json` of a model into a folder, without weights; returns the folder.

    Raises:
        ValueError: no published family has such models, or the folder cannot be written, or has another model.
    """
    flag, path = f"--write-config {folder}", Path(folder, CONFIG)
    try:
        content = to_content(model)
    except ValueError as error:
        raise ValueError(f"{flag}: {error}; leave --write-config out") from None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and read_json(path, flag) != content:
            raise ValueError(f"{flag}: has a {CONFIG} of another model; use another folder")
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:
        raise ValueError(f"{flag}: {CONFIG} cannot be written: {error.strerror}; use another folder") from None
    return folder


def nodes_of(layout: Layout, machine: Machine) -> tuple[int, int]:
    """Nodes, and ranks on each: equally many."""
    nodes = next(n for n in range(-(-layout.ranks // machine.node), layout.ranks + 1) if layout.ranks % n == 0)
    return nodes, layout.ranks // nodes


def script_of(layout: Layout, model: ModelConfig, folder: str | None) -> list[str]:
    """The script and its flags, after torchrun's own."""
    sizes = flags_of(by_flags(model))
    if folder:
        drawn = not any(Path(folder, name).is_file() for name in (SINGLE, INDEX))
        sizes = [f"--hf {shlex.quote(folder)}", *["--init random"] * drawn, f"--sequence {model.sequence}"]
    data = ["--data text.txt"] * (model.sequence >= OWN_TEXT)
    how = "--dtype bfloat16 --no-verify --sample 0"
    return ["cluster/train.py", str(layout), f"--batch {layout.batch}", *sizes, *data, how]


def commands(layout: Layout, machine: Machine, model: ModelConfig, folder: str | None = None) -> tuple[str, str]:
    """The torchrun line, the same on every node, and a batch script for Slurm.

    Args:
        folder: of a published model, if it is that.
    """
    nodes, each = nodes_of(layout, machine)
    script = " ".join(script_of(layout, model, folder))
    meet = f"--nnodes={nodes} --rdzv_backend=c10d --rdzv_endpoint=$FIRST_NODE:29400 " if nodes > 1 else ""
    line = f"torchrun {meet}--nproc_per_node={each} {script}"
    devices = f"#SBATCH --gpus-per-node={each}\n" if machine.resource else ""
    sbatch = f"""#!/bin/bash
#SBATCH --job-name={label_of(model)}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1
{devices}#SBATCH --exclusive
export FIRST_NODE=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun {line}
"""
    return line, sbatch


def label_of(model: ModelConfig) -> str:
    """The model's name as one of a job: a label of RFC 1035 that leaves room in 63 characters for those of its pods."""
    name = re.sub(r"[^a-z0-9]+", "-", model.name.lower())[:40].strip("-")
    return name if name[:1].isalpha() else f"model-{name}".rstrip("-")


def trainjob(layout: Layout, machine: Machine, model: ModelConfig, folder: str | None = None) -> str:
    """A TrainJob of Kubeflow Trainer 2 (trainer.kubeflow.org/v1alpha1), whose runtime tells torchrun where to meet.

    The image is one with this project in its working directory.
    """
    nodes, each = nodes_of(layout, machine)
    words = [word for part in script_of(layout, model, folder) for word in shlex.split(part)]
    arguments = "\n".join(f"      - {json.dumps(word)}" for word in words)
    devices = f"    resourcesPerNode:\n      limits:\n        {machine.resource}: {each}\n" if machine.resource else ""
    return f"""apiVersion: trainer.kubeflow.org/v1alpha1
kind: TrainJob
metadata:
  name: {label_of(model)}
spec:
  runtimeRef:
    name: torch-distributed
  trainer:
    image: parallelism-lessons:latest
    numNodes: {nodes}
    numProcPerNode: {each}
    command:
      - torchrun
    args:
{arguments}
{devices}"""


def by_flags(model: ModelConfig) -> ModelConfig:
    """The model that the flags of `cluster/train.py` describe, which cannot say all of it."""
    sizes = {name: getattr(model, name) for name in TRAINED}
    if model.hidden % model.heads:  # with a size of a head of their own, which no flag says
        sizes["heads"] = gcd(model.hidden, model.heads)
    if model.experts:  # all layers have them then
        names = ("experts", "top_k", "shared_feed_forward")
        sizes |= {name: getattr(model, name) for name in names} | {"feed_forward": model.expert_size}
    kind = {"tied": model.tied}
    if model.gated:
        kind = {"norm": "rms", "gated": True, "biases": False, "learned_positions": False, "tied": False}
        kind |= {"kv_heads": gcd(sizes["heads"], model.query_groups), "rope_theta": 500_000.0}
    return ModelConfig(VOCABULARY, **sizes, **kind)


def flags_of(model: ModelConfig) -> list[str]:
    """And these flags."""
    found = [f"--{name.replace('_', '-')} {getattr(model, name)}" for name in TRAINED]
    found += [f"--model llama --kv-heads {model.kv_heads}"] if model.gated else ["--untied"] * (not model.tied)
    if model.experts:
        found += [f"--experts {model.experts} --top-k {model.top_k}"]
        found += [f"--shared {model.shared_feed_forward}"] if model.shared_feed_forward else []
    return found


def lacking(model: ModelConfig, folder: str | None = None) -> str:
    """What of a model the one that the command trains does not have.

    Args:
        folder: of a published model, if it is that.
    """
    missing = [model.unbuilt()]
    if folder is None:
        trained = by_flags(model)
        missing += [words.format(getattr(model, field)) for field, words in UNSAID.items()
                    if getattr(model, field) != getattr(trained, field)]  # fmt: skip
    return ", ".join(filter(None, missing))
