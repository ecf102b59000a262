"""The rules of a layout, as data. Lecture 03. `cluster.rules` applies and explains them.

A rule says what it concerns, its condition, its reason, and where it comes from. The lessons refuse the same
configurations for the same reasons, in the same words: `tests/cluster/test_rules.py` holds that. A rule that is advice
never refuses: without it a layout runs, but slowly.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from cluster.planner.hardware import Machine
from cluster.planner.layout import FOLDED, Layout
from cluster.planner.models import Model
from pipeline.stages import TOO_FEW


@dataclass(frozen=True)
class Case:
    """A layout of a model on so many ranks of a machine. None: not decided, and then no rule is broken by it."""

    layout: Layout
    model: Model
    machine: Machine | None = None
    world: int | None = None
    batch: int | None = None

    def sizes(self) -> dict[str, object]:
        """What a rule may name: the fields of `Layout` and `Model`, and what follows from them."""
        x = self.layout
        more = {
            "ranks": x.ranks, "stages": x.stages, "inside": x.tp * x.cp * x.dp, "twice": 2 * x.pp,
            "of_layout": x.batch, "pieces": x.pieces, "folded": x.schedule in FOLDED, "world": self.world,
            "batch": self.batch, "node": self.machine.node if self.machine else 0,
        }  # fmt: skip
        return vars(self.model) | vars(x) | more


@dataclass(frozen=True)
class Rule:
    """One rule. All texts but the name may hold sizes in braces; the condition is an expression of them, in Python."""

    name: str
    concerns: str  # the flags
    condition: str
    reason: str
    source: str
    advice: bool = False

    def message(self, case: Case) -> str:
        return f"{self.concerns}: {self.reason}".format_map(case.sizes())


EQUAL = "what is cut must be a multiple of the {tp} ranks, so that each gets as much"
SAME_AXES = "tp {tp} x cp {cp} x dp {dp} x pp {pp} = {ranks} ranks, but {world} are running"
RULES = (
    Rule("axes", "--tp {tp} --cp {cp} --ulysses {ulysses} --ep {ep} --etp {etp} --pp {pp} --dp {dp}",
         "min(tp, cp, ulysses, ep, etp, pp, dp) >= 1",
         "an axis has at least one rank", "core.mesh"),
    Rule("stages a rank", "--chunks {v}", "v >= 1", "a rank holds at least one stage", "lecture 08"),
    Rule("microbatches", "--microbatches {microbatches} --microbatch {microbatch}",
         "min(microbatches, microbatch) >= 1", "must be at least 1", "lecture 07"),
    Rule("ranks", "--tp {tp} --cp {cp} --dp {dp} --pp {pp}", "world in (None, ranks)", SAME_AXES, "core.mesh"),
    Rule("batch", "--batch {batch}", "batch in (None, of_layout)",
         "must be a multiple of {dp} ranks x --microbatches {microbatches}, so that all parts are equal", "lecture 01"),
    Rule("heads", "--heads {heads}", "hidden % heads == 0",
         "must divide --hidden {hidden}, so that heads are equal", "core.model.gpt"),
    Rule("dropout", "--dropout", "not dropout or attention == 'softmax'",
         "the masks drawn inside sdpa depend on the layout", "core.model.gpt"),
    Rule("tp: heads", "--tp {tp} --heads {heads}", "heads % tp == 0", EQUAL, "1909.08053, section 3"),
    Rule("tp: key heads", "--tp {tp}, {kv_heads} key and value heads", "latent or kv_heads % tp == 0", EQUAL,
         "Megatron-LM, num_query_groups"),
    Rule("tp: feed-forward", "--tp {tp} --feed-forward {feed_forward}", "feed_forward % tp == 0", EQUAL,
         "1909.08053, section 3"),
    Rule("tp: fast links", "--tp {tp}", "node % tp == 0",
         "a layer waits for its all-reduces over tp, which belong on the fast links of {node} ranks",
         "2104.04473, takeaway 1", advice=True),
    Rule("sp: tp", "--sp --tp {tp}", "not sp or tp > 1",
         "sequence parallelism cuts what tensor parallelism leaves whole, and needs its ranks", "2205.05198, 4.2.2"),
    Rule("sp: sequence", "--sp --tp {tp} --cp {cp} --sequence {sequence}", "not sp or sequence % (tp * cp) == 0", EQUAL,
         "2205.05198, 4.2.2"),
    Rule("cp: attention", "--cp {cp} --attention {attention}", "cp == 1 or (attention == 'sdpa' and not dropout)",
         "cp computes attention in its own way, without the whole matrix of scores and without dropout", "lecture 06"),
    Rule("cp: ulysses", "--ulysses {ulysses}", "cp % ulysses == 0",
         "the {cp} ranks are a ring of groups of so many", "2309.14509; 2310.01889"),
    Rule("cp: heads", "--ulysses {ulysses} --tp {tp} --heads {heads}", "heads % (tp * ulysses) == 0",
         "heads must divide --hidden and be a multiple of the {ulysses} ranks over which they are cut",
         "2309.14509, section 3.1"),
    Rule("cp: sequence", "--cp {cp} --sequence {sequence}", "sequence % pieces == 0",
         "the sequence is cut and must be a multiple of {pieces}", "2310.01889; 2407.21783, 3.3.2"),
    Rule("pp: layers", "--layers {layers}", "layers % stages == 0 or layers + 2 >= 2 * stages", TOO_FEW,
         "2407.21783, section 3.3.2"),
    Rule("pp: several stages", "--chunks {v} --pp {pp}", "v == 1 or pp > 1",
         "several stages a rank shrink a pipeline's bubble, and one rank has none", "2104.04473, section 2.2.2"),
    Rule("pp: schedule", "--schedule {schedule} --chunks {v}", "v == 1 + folded or schedule == 'interleaved'",
         "zb-v and dualpipev hold two stages a rank, interleaved what --chunks says, the others one", "lecture 08"),
    Rule("pp: microbatches", "--microbatches {microbatches} --pp {pp}", "microbatches >= pp",
         "with fewer microbatches than ranks a pipeline never fills", "lecture 07", advice=True),
    Rule("dualpipe: ranks", "--schedule dualpipe --pp {pp}", "schedule != 'dualpipe' or pp % 2 == 0",
         "dualpipe pairs rank r with rank p-1-r, and needs an even number", "2412.19437, section 3.2.1"),
    Rule("dualpipe: microbatches", "--schedule dualpipe --microbatches {microbatches}",
         "schedule != 'dualpipe' or (microbatches % 2 == 0 and microbatches >= twice)",
         "dualpipe needs an even number, 2p = {twice} or more", "2412.19437, section 3.2.1"),
    Rule("dualpipev: microbatches", "--schedule dualpipev --microbatches {microbatches}",
         "schedule != 'dualpipev' or microbatches >= twice", "dualpipev needs 2p = {twice} or more",
         "2412.19437, section 3.2.1"),
    Rule("zero: pp", "--zero {zero} --pp {pp}", "zero <= 1 or pp == 1",
         "a pipeline adds up the gradients of its microbatches, which stages 2 and 3 reduce one by one", "lecture 01"),
    Rule("experts: ranks", "--ep {ep} --etp {etp}", "inside % (ep * etp) == 0",
         "--ep {ep} x --etp {etp} must divide tp x cp x dp = {inside}", "core.mesh"),
    Rule("experts: etp", "--etp {etp}",
         "etp == 1 or (experts and inside % etp == 0 and expert_feed_forward % etp == 0)",
         "must divide the {inside} ranks and the {expert_feed_forward} features of an expert", "CODE 04"),
    Rule("experts: ep", "--ep {ep}", "ep == 1 or (experts and inside // etp % ep == 0 and experts % ep == 0)",
         "must divide the {inside} ranks / --etp {etp} and the --experts {experts}, so that each rank has as many",
         "2006.16668, section 3"),
    Rule("experts: top k", "--top-k {top_k}", "top_k <= experts",
         "a token cannot choose more than the --experts {experts}", "2101.03961, section 2.1"),
    Rule("experts: sp", "--experts {experts} --tp {tp}", "not experts or tp == 1 or sp",
         "without --sp every rank of tp would dispatch the same tokens", "Megatron-LM, validate_args"),
    Rule("experts: zero", "--experts {experts} --zero {zero}", "not experts or zero < 3",
         "stage 3 gathers whole blocks over one axis, and experts have another than the rest", "lecture 01"),
    Rule("experts: dualpipe", "--experts {experts} --schedule {schedule}", "not experts or schedule != 'dualpipe'",
         "the load of a layer would be counted on both ranks that hold it", "2412.19437, section 3.2.1"),
)  # fmt: skip
FIRST = 3  # those without which the others mean nothing

_COMPILED = {rule: compile(rule.condition, rule.name, "eval") for rule in RULES}
_TOGETHER = {
    advice: compile(" and ".join(f"({r.condition})" for r in RULES if advice or not r.advice), "rules", "eval")
    for advice in (False, True)
}


def keeps_all(case: Case, advice: bool = False) -> bool:
    """Whether no rule is broken: at once, as a search of many layouts needs it."""
    return bool(eval(_TOGETHER[advice], {"min": min}, case.sizes()))


def broken(case: Case, advice: bool = False) -> list[Rule]:
    """The rules that do not hold, with those that are advice or without."""
    sizes = case.sizes()

    def failing(rules: Iterable[Rule]) -> list[Rule]:
        return [rule for rule in rules if not eval(_COMPILED[rule], {"min": min}, sizes)]

    return failing(RULES[:FIRST]) or failing(rule for rule in RULES[FIRST:] if advice or not rule.advice)
