"""What moves between device and host in ZeRO-Offload, and what is on each of them."""

from core.proof.lesson import Run
from zero.evidence.training import Fast, Plain


def claim_offload(run: Run, trained: dict[str, Plain | Fast]) -> None:
    for name, each in trained.items():
        kept = each.memory_bytes()
        traffic = each.axis.ledger.traffic
        down, up = (traffic[way, "host"].elements / run.args.steps for way in ("to the host", "to the device"))
        everyone = run.job.gather((down, up, kept["weights"], kept["gradients"] + kept["optimizer"]))
        if everyone:
            claim_one(run, f", {name}", sum(bucket.padded for bucket in each.buckets), everyone)


def claim_one(run: Run, which: str, size: int, everyone: list[tuple[float, ...]]) -> None:
    shard, m = size // len(everyone), run.args.microbatches
    on_device, on_host = run.dtype.itemsize, run.precision.master.itemsize
    # The engine keeps a buffer for what goes up, where it is not the master weights.
    rounded = on_device if on_device < on_host and "engine" in which else 0
    host = shard * (run.precision.gradients.itemsize + 3 * on_host + rounded)
    down, up, weights, rest = zip(*everyone, strict=True)
    on_ranks = run.evidence.on_ranks
    on_ranks(f"elements to the host in a step{which}", f"mΨ/N = {m * shard:,}; counted", m * shard, down)
    on_ranks(f"elements to the device in a step{which}", f"Ψ/N = {shard:,}; counted", shard, up)
    on_ranks(f"bytes on the device: weights{which}", f"{on_device}Ψ = {on_device * size:,}", on_device * size, weights)
    formula = f"gradients, weights, Adam / N: {host:,}, within 1 %"
    on_ranks(f"bytes on the host{which}", formula, host, rest, 0.01 * host)
