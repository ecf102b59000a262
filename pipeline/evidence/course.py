"""CODE 03: what the course's practice prints of its schedules, and the same from a validated schedule."""

from core.proof.lesson import Run
from core.proof.oracle import relative_difference
from pipeline.engine.actions import stage_share
from pipeline.engine.validator import validate
from pipeline.schedules import build

RANKS, MICROBATCHES, CHUNKS = 4, 32, 2  # S, M, v

# Milliseconds, bubble and memory as the course prints them, and why they are not what a pipeline of 4 ranks has.
COURSE = {
    "naive": (
        "8.8 ms, bubble 0.000, 0.04 GB",
        "One process computes all stages, and is never idle. Of S ranks S-1 are, at any time: (S-1)/S of wall time.",
    ),
    "gpipe": (
        "51.4 ms, bubble 0.086, 0.01 GB",
        "The bubble is a formula's, over wall time: (S-1)/(M+S-1). All M micro-batches are in flight, so GPipe needs "
        "more memory than 1F1B; in one process nothing of that shows.",
    ),
    "1f1b": (
        "57.2 ms, bubble 0.094, 0.01 GB",
        "The bubble is a formula's, over ideal time: (S-1)/M. It is GPipe's bubble, divided by another time. What 1F1B "
        "saves is memory.",
    ),
    "interleaved": (
        "52.1 ms, bubble 0.047, 0.01 GB",
        "Over ideal time: (S-1)/(vM). The times rank the schedules backwards: they are one process's, which has no "
        "bubble to save.",
    ),
}
LOSS_OFF = "The graph is cut between the stages: no gradient reaches those before the last. Here every one is compared."


def show_course(run: Run) -> None:
    """The course's figures, and those of the same schedules on virtual devices: a forward takes 1, a backward 2."""
    rows = []
    for name, (printed, why) in COURSE.items():
        schedule = build(name, RANKS, MICROBATCHES, CHUNKS)
        verdict = validate(schedule)
        in_flight = max(verdict.in_flight) * stage_share(schedule)  # in micro-batches of 1/S of the model
        right = (
            f"{verdict.makespan:g} F, bubble {verdict.bubble_of_wall:.3f} of wall, {verdict.bubble_of_ideal:.3f} of "
            f"ideal time; {in_flight:g} in flight"
        )
        rows.append((f"{name}, S = {RANKS}, M = {MICROBATCHES}", printed, right, why))
    apart = max(map(relative_difference, run.losses, run.reference_losses), default=0.0)
    rows.append(("loss", "stays ln 10", f"one process's: here {apart:.1g} apart", LOSS_OFF))
    run.say_course(rows)
