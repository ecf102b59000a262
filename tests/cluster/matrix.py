"""Every pair of values of any two flags of `cluster/train.py`, every triple of axes, in few runs beside one process.

    python -m tests.cluster.matrix --world 8                  all rows of the covering array
    python -m tests.cluster.matrix --world 6 --rows 10:20     some
    python -m tests.cluster.matrix --world 8 --only zero=3 schedule=zb-v
    python -m tests.cluster.matrix --world 8 --random 50 --seed 1        rows beyond it
    python -m tests.cluster.matrix --world 8 --list           the rows, and what no row can have, with the rules why
    python -m tests.cluster.matrix --world 8 --seed 0 --write            after a change of the table or the rules

A row is a command line. Its claims are those of the run: losses, the norm, every gradient, every parameter and every
moment of one process in float64, what each rank holds and sends as the planner says; and here besides: the loss that
each rank shows, and the validation loss. `TABLE` has the values; the rules of the run itself say which may be together.
"""

import argparse
import contextlib
import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from functools import cache, partial
from math import gcd
from pathlib import Path
from random import Random
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cluster import train
from cluster.planner.layout import REDUCE, RESHARD, Layout, layout_from
from cluster.planner.rulebook import POSITIVE, REFUSING, Case
from cluster.run import arguments, data, evidence
from cluster.run.arguments import add_all_flags, check, configured, model_of, moe_of
from cluster.run.data import HELD_OUT, data_of
from cluster.run.recipe import RECIPE
from cluster.run.worker import Worker
from core.model.gpt import token_loss
from core.model.precision import POLICIES
from core.model.tokens import documents_of
from core.proof.arguments import TRAINING
from core.proof.launch import Job, Stop
from core.proof.lesson import Lesson, Run
from core.proof.oracle import Oracle, relative_difference
from core.proof.rulebook import DECODER, DROPOUT, ONE_EXPERT, RANKS, TOP_K
from core.proof.rules import Rule
from expert_parallel.engine.router import forget
from pipeline.schedules import SCHEDULES
from pipeline.split import nearly_equal, notation
from sequence_parallel.engine.recompute import KINDS
from sequence_parallel.engine.ring import PLACEMENTS
from sequence_parallel.engine.ulysses import CP_KINDS
from tests.cluster.covering import Combination, Covering, Refusal, Row
from tests.pool import Pool, WorkerError
from zero.newton_schulz import SCALES

AXES = ("tp", "cp", "dp", "pp", "ep", "etp")
STRENGTHS = {3: AXES, 2: None}  # every triple of these, every pair of all
TOKENS, EOS, STEPS, LAYERS = 41, 3, 2, 30  # different tokens; layers at most
SIZES = {8: {"hidden": 16, "heads": 8, "feed-forward": 32, "sequence": 16},
         6: {"hidden": 12, "heads": 6, "feed-forward": 24, "sequence": 12}}  # fmt: skip
FOLDED_FIRST = ("1f1b", *(name for name in SCHEDULES if name != "1f1b"))


def table(world: int) -> dict[str, tuple[Any, ...]]:
    """The values of every flag, the plainest first. A new value, or flag, is a line here."""
    divisors = tuple(n for n in range(1, world + 1) if world % n == 0)
    return {
        **dict.fromkeys(AXES, divisors),
        "sp": (False, True),
        "ulysses": divisors,
        "cp_kind": CP_KINDS,
        "placement": PLACEMENTS,
        "schedule": FOLDED_FIRST,
        "v": (1, 2, 3),
        "microbatches": ("1", "p", "2p", "2p + 1"),  # of p ranks of the pipeline
        "microbatch": (1, 2),
        "layers": ("even", "uneven"),
        "split": ("", "ends alone", "most first"),  # --stages
        "zero": (0, 1, 2, 3),
        "reduce": REDUCE,
        "reshard": RESHARD,
        "bucket": (300, 2**18),
        "recompute": KINDS,
        "recompute_every": (1, 2),
        "loss_chunk": (0, 7),
        "optimizer": ("adamw", "muon"),
        "muon_scale": SCALES,
        "clip": (0.05, 1e6),  # clips always, never
        "weight_decay": (0.3, 0.0),
        "model": ("gpt", "llama"),
        "kv_heads": (0, 1, *divisors[1:]),
        "untied": (False, True),
        "attention": ("sdpa", "softmax"),
        "dropout": (0.0, 0.2),
        "vocabulary": (41, 48),  # one that no axis divides, and one that all do
        "pack": (False, True),
        "resume": (False, True),  # of the steps one in another layout, saved
        "experts": (0, world // 2, world),
        "top_k": (2, 1, 3),
        "capacity": (0.0, 1.0),
        "shared": (0, world),
        "bias_rate": (0.0, 0.01),
        "aux": (0.0, 0.02),
        "z": (0.0, 0.01),
    }


SAME_IN_ALL = {  # flags without a line in the table: why
    "what a rank computes with them is another number, and no other way": (
        "beta1", "beta2", "eps", "lr", "decay", "warmup", "cooldown", "min_lr", "momentum", "ns_steps",
        "schedule_steps", "ns_coefficients", "seed", "steps",
    ),
    "said by other lines: pack, resume": ("eos", "save", "save_every", "keep"),
    "where data comes from: tests/cluster/test_train.py": ("data", "tokens", "token_type", "tokenizer"),
    "other weights to start with, or to write: tests/cluster/test_published.py": (
        "hf", "init", "export", "shard_size",
    ),
    "chooses or counts a layout, and trains none": ("auto", "machine", "dry_run", "world", "rank"),
    "how it is shown, or when": (
        "help", "report", "plot", "page", "lang", "sample", "evaluate", "verify", "timeout", "device",
    ),
    "how messages are sent, which changes no value: tests/core/test_flight.py, test_host.py": (
        "check_messages", "share_gpu",
    ),
    "other tolerances: the tests of mixed precision": ("dtype",),
}  # fmt: skip


# ---- Which rows are legal --------------------------------------------------------------------------------------------


def _says_nothing(flag: str, what: str, has: Callable[[Any], bool]) -> Rule:
    """A value that nothing reads would count as covered, and is not."""
    name = flag.replace("-", "_")
    holds = lambda x: x.plain(name) or has(x)  # noqa: E731
    return Rule(f"no effect: {flag}", f"--{flag} {{{name}}}", holds, f"says nothing without {what}")


NO_EFFECT = (
    *(_says_nothing(flag, "experts", lambda x: x.experts > 0)
      for flag in ("top-k", "capacity", "shared", "bias-rate", "aux", "z")),
    _says_nothing("cp-kind", "cp", lambda x: x.cp > x.ulysses),
    _says_nothing("placement", "cp", lambda x: x.cp > x.ulysses),
    _says_nothing("schedule", "pp", lambda x: x.pp > 1),
    _says_nothing("muon-scale", "muon", lambda x: x.optimizer == "muon"),
    _says_nothing("layers", "pp", lambda x: x.pp > 1),
    _says_nothing("split", "pp", lambda x: x.pp > 1),
    _says_nothing("untied", "gpt: Llama's head is its own anyway", lambda x: x.model == "gpt"),
    _says_nothing("bucket", "several ranks that share gradients", lambda x: x.zero > 0),
    Rule("size", "--layers {layers}", lambda x: x.layers <= LAYERS, f"more than {LAYERS} would take long"),
)  # fmt: skip
# The rules of `cluster.run.arguments.check`, in another order: what closes most is first. The runs check them again.
BEFORE = (DROPOUT, *TRAINING, *arguments.RULES, *RECIPE, *data.RULES)  # until there is a model
ALONE = [rule for rule in vars(arguments).values() if isinstance(rule, Rule)]  # those that are in no tuple
RULES = (*NO_EFFECT, *POSITIVE, *REFUSING, *DECODER, ONE_EXPERT, TOP_K, *ALONE)
OF_RANKS = frozenset({"tp", "cp", "dp", "pp"})
FOLLOWS = {  # what a rule reads: which parameters it follows from
    "ranks": tuple(OF_RANKS),
    "inside": ("tp", "cp", "dp"),
    "stages": ("pp", "v"),
    "chunks": ("v",),
    "twice": ("pp",),
    "layers": ("layers", "pp", "v"),
    **dict.fromkeys(("split_error", "split_layers", "split_stages"), ("split", "layers", "pp", "v")),
    "split_idle": ("split", "layers", "pp", "v", "schedule"),
    "microbatches": ("microbatches", "pp"),
    "batch": ("dp", "microbatches", "microbatch", "pp"),
    "samples": ("dp", "microbatches", "microbatch", "pp"),
    "query_groups": ("model", "kv_heads"),
    "sequence_multiple": ("cp", "ulysses", "placement"),
    "stages_of_schedule": ("schedule",),
    "head_size": ("model",),
    "rotary_dim": ("model",),
    "learned_positions": ("model",),
}


class Seen:
    """A case that notes which parameters a rule reads."""

    def __init__(self, case: dict[str, Any], row: Row, values: dict[str, tuple[Any, ...]]):
        self._case, self._row, self._values, self.reads = case, row, values, set()

    def __getattr__(self, name: str) -> Any:
        self.reads.update(FOLLOWS.get(name, (name,) if name in self._values else ()))
        return self._case[name]

    def plain(self, name: str) -> bool:
        """Whether a parameter has the first of its values."""
        self.reads.add(name)
        return self._row[name] == self._values[name][0]


@cache
def lesson_of_the_run() -> Lesson:
    lesson = Lesson("cluster/train.py", "02", "", "", "")
    add_all_flags(lesson)
    return lesson


def parsed(line: str) -> argparse.Namespace:
    return lesson_of_the_run().parser.parse_args(line.split())


@cache
def _usual() -> argparse.Namespace:
    return parsed("")


def split_of(kind: str, layers: int, stages: int) -> str:
    """A distribution over the stages, as --stages takes it."""
    if not kind:
        return ""
    if kind == "most first":
        return notation((layers - (stages - 2), *[1] * (stages - 2), 0))
    return notation((0, *(nearly_equal(layers, stages - 2) if stages > 2 else (layers,)), *[0] * (stages > 2)))


class Matrix:
    """The legal rows of so many ranks."""

    def __init__(self, world: int):
        self.world, self.table, self.sizes = world, table(world), SIZES[world]
        usual = vars(_usual()) | {"tokens": "ids.npy", "steps": STEPS, "eos": EOS}
        self._usual = usual | {"head_size": None}
        self._models = cache(lambda *values: self._model_of(dict(zip(MODEL, values, strict=True))))

    def numbers(self, row: Row) -> dict[str, Any]:
        """What a row says, in the values of its flags, and the sizes that follow."""
        stages, m = row["pp"] * row["v"], {"1": 1, "p": row["pp"], "2p": 2 * row["pp"], "2p + 1": 2 * row["pp"] + 1}
        layers = max(2, {"even": stages, "uneven": 2 * stages - 1}[row["layers"]])
        found = {name.replace("-", "_"): size for name, size in self.sizes.items()} | row
        found |= {"microbatches": m[row["microbatches"]], "layers": layers}
        found["split"] = split_of(row["split"], layers, stages) if row["pp"] > 1 else row["split"]
        return found | {"batch": row["dp"] * found["microbatches"] * row["microbatch"]}

    def line(self, row: Row) -> str:
        """The command line of a row, without what is the same in all (`common`)."""
        said = []
        for name, value in self.numbers(row).items():
            flag = {"v": "--chunks", "split": "--stages"}.get(name, f"--{name.replace('_', '-')}")
            if name == "resume":
                said += ["--save", "RUN", "--save-every", "1"] * value
            elif isinstance(value, bool):
                said += [flag] * value + ["--no-sp"] * (name == "sp" and not value)
            elif name in ALWAYS_SAID or value != self.table.get(name, (None,))[0]:
                said += [flag, str(value)]
        return " ".join(said)

    def refusal(self, row: Row, without: str = "") -> Refusal | None:
        """By the rules of the run, or all but one of them: what they read is noted."""
        ranks = row["tp"] * row["cp"] * row["dp"] * row["pp"]
        if ranks != self.world:  # RANKS, before all else: most rows that are looked at break it
            return Refusal(RANKS.name, OF_RANKS)
        given = self._usual | self.numbers(row)
        seen = Seen(given, row, self.table)
        if (found := _first(seen, BEFORE, without)) is not None:
            return found
        if given["experts"] and given["top_k"] > given["experts"]:
            return Refusal(TOP_K.name, frozenset({"experts", "top_k"}))
        config = self._models(*(given[name] for name in MODEL))
        layout = layout_from(argparse.Namespace(**given), self.world, given["batch"], experts=given["experts"] > 0)
        sizes = vars(Case(layout, config, None, self.world, given["batch"]).sizes)
        of_flags = {name: given[name] for name in ("model", "kv_heads")} | {"rotary_dim": config.rotary_dim}
        return _first(Seen(given | sizes | of_flags, row, self.table), RULES, without)

    def random_rows(self, count: int, seed: int) -> list[Row]:
        """Legal rows of values that are drawn, and mended."""
        drawn, solver = Random(seed), Covering(self.table, self.refusal, {})
        bases = [{name: drawn.choice(values) for name, values in self.table.items()} for _ in range(count)]
        return [row for row in (solver.complete({}, base, set()) for base in bases) if row]

    def _model_of(self, sizes: dict[str, Any]) -> Any:
        args = argparse.Namespace(**vars(_usual()) | sizes)
        return model_of(configured(args), moe_of(args))

    def plain(self) -> Row:
        """The first value of each, and data parallelism over all ranks."""
        return {name: values[0] for name, values in self.table.items()} | {"dp": self.world}

    def refused(self, rows: Sequence[Row]) -> dict[Combination, frozenset[str]]:
        """What no row has, and the rules that refuse every row with it. Raises ValueError: one could have it."""
        missing = Covering(self.table, self.refusal, STRENGTHS, given=rows)
        if missing.rows:
            raise ValueError(f"legal, but in no row: {[self.line(row) for row in missing.rows]}; use --write")
        # That axes must multiply to the ranks closes branches of every proof: a reason where it is the only one.
        return {each: rules - {RANKS.name} or rules for each, rules in missing.refused.items()}

    def needed(self, combination: Combination, rules: frozenset[str]) -> list[str]:
        """Of the rules of a proof those without which there would be a row; all, where each alone would do."""

        def lifted(rule: str) -> bool:
            try:
                solver = Covering(self.table, partial(self.refusal, without=rule), {})
                return solver.complete(dict(combination), self.plain(), set()) is not None
            except ValueError:  # it is the model's own
                return True

        return sorted(filter(lifted, rules)) or sorted(rules)

    def covering(self, seed: int = 0) -> Covering:
        return Covering(self.table, self.refusal, STRENGTHS, seed)


MODEL = (
    "layers", "hidden", "heads", "kv_heads", "feed_forward", "sequence", "vocabulary", "model", "untied", "attention",
    "dropout", "experts", "top_k", "capacity", "shared", "bias_rate", "aux", "z"
)  # fmt: skip
ALWAYS_SAID = {
    "vocabulary", "hidden", "heads", "feed_forward", "sequence", "layers", "batch", "microbatches", "microbatch", "v"
}  # fmt: skip


def _first(seen: Seen, rules: Iterable[Rule], without: str) -> Refusal | None:
    for rule in rules:
        seen.reads.clear()
        if rule.name != without and not rule.holds(seen):
            return Refusal(rule.name, frozenset(seen.reads))
    return None


# ---- A row, run ------------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What came of a row, on rank 0."""

    line: str
    seconds: float
    failed: list[str]  # what does not hold
    largest: dict[str, float]  # differences from one process, by what is compared


COMPARED = {  # the claims of a run that compare it with one process, and of this file
    "losses equal one process": "loss",
    "the global gradient norm": "norm",
    "every gradient equals": "gradient",
    "every parameter after": "parameter",
    "the optimizer's state": "moment",
    "the loss that": "shown loss",
    "the validation loss": "validation loss",
}


def write_tokens(folder: str | Path) -> None:
    ids = np.random.default_rng(0).integers(0, TOKENS, 6000).astype(np.uint16)
    np.save(Path(folder, "ids.npy"), ids)


def common(folder: str | Path) -> str:
    """What all rows say."""
    return (
        f"--tokens {folder}/ids.npy --eos {EOS} --steps {STEPS} --sample 0 --lr 0.01 "
        "--warmup 0 --decay constant --beta1 0.8 --device cpu"
    )


class Shown:
    """What a run shows of losses on this rank, and what one process has: its own validation loss at the same time."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.expected: list[float] = []
        self._oracle: Oracle | None = None
        self._one_process, self._evaluate = evidence.one_process, Worker.evaluate

    def one_process(self, *arguments: Any) -> Oracle | None:
        self._oracle = self._one_process(*arguments)
        return self._oracle

    def evaluate(self, worker: Worker, inputs: Tensor, targets: Tensor) -> float:
        self.losses.append(self._evaluate(worker, inputs, targets))
        if oracle := self._oracle:
            oracle.model.eval()
            oracle.documents.seek(None if oracle.eos is None else documents_of(inputs, oracle.eos))
            with torch.no_grad():
                self.expected.append(token_loss(oracle.model(inputs), targets, targets.numel()).item())
            oracle.model.train()
            forget(oracle.model)
        return self.losses[-1]

    def claim(self, run: Run) -> None:
        """On rank 0 of all ranks."""
        for rank, (losses, of_validation) in enumerate(run.job.gather((run.losses, self.losses))):
            for what, found, expected in (
                ("the loss that", losses, run.reference_losses),
                ("the validation loss", of_validation, self.expected),
            ):
                assert run.job.rank or len(found) == len(expected), (what, found, expected)
                apart = max(map(relative_difference, found, expected), default=torch.inf)
                run.evidence.claim(f"{what} rank {rank} shows", "one process's", 0.0, apart, 1e-10)


def elsewhere(args: argparse.Namespace, world: int) -> argparse.Namespace:
    """The first step of a row that goes on, in another layout where its batch allows one: dp, and the rest tp."""
    dp = gcd(args.batch, world)
    there = {"dp": dp, "tp": world // dp, "sp": dp < world, "zero": 1}
    more = {"steps": 1, "verify": False}
    try:
        found = argparse.Namespace(**vars(args) | {field.name: None for field in fields(Layout)} | there | more)
        check(found, world)
    except ValueError:
        found = argparse.Namespace(**vars(args) | more)
    return found


def again(run: Run, _: Worker, oracle: Oracle | None) -> None:
    """In place of `evidence.follow`: what a checkpoint has lost must show, so the one process makes the steps too."""
    if oracle:
        training, _ = data_of(run.args).split(HELD_OUT)
        for step in range(len(run.losses)):
            run.reference_losses.append(oracle.step(*training.batch(run.args.seed, step, run.args.batch), step))


def run_row(line: str, job: Job) -> Found | None:
    """The claims of one run; on rank 0. All ranks call it."""
    args = parsed(line)
    began, said, shown = time.perf_counter(), io.StringIO(), Shown()
    check(args, job.world_size)
    run = Run(args, job, POLICIES["float64"])
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if args.save:
            args.save = job.share(tempfile.mkdtemp(dir=Path(args.tokens).parent) if job.rank == 0 else None)
            train.lesson(Run(elsewhere(args, job.world_size), job, POLICIES["float64"]))
        with (
            patch.object(evidence, "one_process", shown.one_process),
            patch.object(evidence, "follow", again),
            patch.object(Worker, "evaluate", lambda *arguments: shown.evaluate(*arguments)),
        ):
            train.lesson(run)
    shown.claim(run)
    if job.rank:
        return None
    largest = dict.fromkeys(COMPARED.values(), -1.0)  # below 0: not compared
    for claim in run.evidence.claims:
        for begins, what in COMPARED.items():
            if claim.claim.startswith(begins):
                largest[what] = max(largest[what], claim.measured)
    failed = [] if run.evidence.claims else ["nothing was claimed"]
    failed += [f"{what} was not compared" for what, apart in largest.items() if apart < 0]
    failed += [f"{c.claim}: {c.measured:.4g}, not {c.expected:.4g}; {c.where}"
               for c in run.evidence.claims if not c.holds]  # fmt: skip
    return Found(line, time.perf_counter() - began, failed, largest)


def run_rows(folder: str, lines: Sequence[str]) -> list[Found | None]:
    """Of one rank."""
    job = Job(dist.get_rank(), dist.get_world_size(), torch.device("cpu"), "gloo", 60.0)
    found = []
    for line in lines:
        try:
            found.append(run_row(f"{common(folder)} {line}", job))
        except (Stop, ValueError) as stop:  # which all ranks have
            found.append(Found(line, 0.0, [f"{type(stop).__name__}: {stop}"], {}))
        except Exception as error:
            raise RuntimeError(line) from error
    return found


def run_all(pool: Pool, world: int, folder: str, lines: Sequence[str], together: int = 8) -> Iterator[Found]:
    """Several rows in each call: a group of ranks takes longer to be made than many a row. One that dies is named."""
    for i in range(0, len(lines), together):
        some = lines[i : i + together]
        try:
            yield from pool.run(world, run_rows, folder, some, timeout=60.0 + 30.0 * len(some))[0]
        except WorkerError as error:
            if len(some) == 1:
                yield Found(some[0], 0.0, [str(error)], {})
            else:
                yield from run_all(pool, world, folder, some, 1)


# ---- The rows that are kept ------------------------------------------------------------------------------------------

KEPT = Path(__file__).parent / "rows"


def write_rows(world: int, rows: Sequence[Row]) -> None:
    """A line each: the place of each value in the table, so that the file says nothing twice."""
    names = [*table(world)]
    lines = [",".join(names), *(",".join(str(row[name]) for name in names) for row in rows)]
    KEPT.joinpath(f"{world}.csv").write_text("\n".join(lines) + "\n")


def kept_rows(world: int) -> list[Row]:
    """Raises KeyError: a value that the table does not have."""
    by_text = {name: {str(value): value for value in values} for name, values in table(world).items()}
    header, *lines = KEPT.joinpath(f"{world}.csv").read_text().splitlines()
    return [{n: by_text[n][v] for n, v in zip(header.split(","), line.split(","), strict=True)} for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser("tests.cluster.matrix", description=__doc__)
    parser.add_argument("--world", type=int, choices=tuple(SIZES), default=8)
    parser.add_argument("--rows", default=":", help="of the array, as a slice: 10:20")
    parser.add_argument("--only", nargs="*", default=(), metavar="FLAG=VALUE", help="rows with these values")
    parser.add_argument("--seed", type=int, help="another array, made now, in place of the one that is kept")
    parser.add_argument("--random", type=int, metavar="ROWS", help="legal rows drawn by --seed, in place of an array")
    parser.add_argument("--write", action="store_true", help="keep the array of --seed")
    parser.add_argument("--list", action="store_true", help="the rows, and what no row can have; runs nothing")
    args = parser.parse_args()
    matrix = Matrix(args.world)
    if args.random:
        rows = matrix.random_rows(args.random, args.seed or 0)
    else:
        rows = kept_rows(args.world) if args.seed is None else matrix.covering(args.seed).rows
    if args.write:
        write_rows(args.world, rows)
    wanted = [each.split("=") for each in args.only]
    first, _, last = args.rows.partition(":")
    rows = rows[int(first or 0) : int(last or len(rows))]
    rows = [row for row in rows if all(str(row[name]) == value for name, value in wanted)]
    if args.list:
        print("\n".join(map(matrix.line, rows)))
        for combination, rules in matrix.refused(kept_rows(args.world)).items():
            shown = " ".join(f"{name}={value}" for name, value in combination)
            print(shown, "|", ", ".join(matrix.needed(combination, rules)))
        return 0
    pool, began, largest, failing = Pool(), time.perf_counter(), dict.fromkeys(COMPARED.values(), 0.0), 0
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(folder)
        for i, found in enumerate(run_all(pool, args.world, folder, [matrix.line(row) for row in rows])):
            failing += bool(found.failed)
            print(f"{i}: {'FAILED' if found.failed else 'ok'} {found.seconds:.1f} s {matrix.line(rows[i])}", flush=True)
            print("".join(f"    {each}\n" for each in found.failed), end="", flush=True)
            largest = {what: max(apart, found.largest.get(what, 0.0)) for what, apart in largest.items()}
    pool.close()
    print(f"{len(rows)} rows on {args.world} ranks, {failing} failed, {time.perf_counter() - began:.0f} s")
    print("largest differences: " + ", ".join(f"{what} {apart:.1e}" for what, apart in largest.items()))
    return int(failing > 0)


if __name__ == "__main__":
    sys.exit(main())
