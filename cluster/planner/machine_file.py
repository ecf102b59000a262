"""A machine that a file describes: a JSON object with all that `machines.py` says of one. Lecture 03.

    {"like": "dgx-b200", "name": "ours", "node": 72, "memory_gb": 186, "peak_tflops": 2500, "peak8_tflops": 5000,
     "inside_gbs": 900, "outside_gbs": 50, "outside_us": 12, "pod": 576, "beyond_gbs": 25, "sustained": 0.75,
     "host_gbs": 225, "host_memory_gb": 240, "resource": "nvidia.com/gpu"}

"like" is a machine of the table that has all that is not said; without it NEEDED must be. Bandwidths are of one
direction, FLOP/s dense, GB 10^9 bytes; "resource" is what Kubernetes calls its devices.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import inf
from typing import Any

from cluster.planner.machines import GB, PRESETS, US, Link, Machine

NUMBERS = {  # a field, that of `Machine`, what one of it is, and a value that works
    "memory_gb": ("memory", GB, 80), "peak_tflops": ("peak", 1e12, 989), "peak8_tflops": ("peak8", 1e12, 1979),
    "peak4_tflops": ("peak4", 1e12, 9000), "bandwidth_gbs": ("bandwidth", GB, 3350), "host_gbs": ("host", GB, 50),
    "host_memory_gb": ("host_memory", GB, 256), "sustained": ("sustained", 1.0, 0.8),
}  # fmt: skip
WHOLE = {"node": 8, "processors": 132, "pod": 3072}
LINKS = ("inside", "outside", "beyond")
USUAL_US = {"inside": 3.0, "outside": 10.0, "beyond": 10.0}  # of a message, where neither file nor "like" says it
WORDS = {"name": "ours", "source": "its data sheet", "like": "dgx-h100", "resource": "nvidia.com/gpu"}
FIELDS = (*WORDS, *WHOLE, *NUMBERS, "sharp", *(f"{link}_{unit}" for link in LINKS for unit in ("gbs", "us")))
NEEDED = ("node", "memory_gb", "peak_tflops", "bandwidth_gbs", "inside_gbs", "outside_gbs")


def number(found: Mapping[str, Any], field: str, works: float, least: float = 0.0, most: float = inf) -> float:
    """Raises ValueError: it is none, or out of bounds."""
    value = found[field]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least < value < inf or value > most:
        bound = f" and at most {most:g}" if most < inf else ""
        raise ValueError(f'"{field}" is {value!r}, and must be a number above {least:g}{bound}; use {works:g}')
    return float(value)


def whole(found: Mapping[str, Any], field: str, works: int) -> int:
    value = found[field]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f'"{field}" is {value!r}, and must be a whole number, 1 or more; use {works}')
    return value


def described(found: Mapping[str, Any], name: str, base: Machine | None = None) -> Machine:
    """The machine that such an object says.

    Args:
        base: what has all that it does not say; None: the one that it is "like".

    Raises:
        ValueError: a field is not known, or makes no sense, or one that is needed is not there.
    """
    if unknown := sorted(set(found) - set(FIELDS)):
        raise ValueError(f'"{unknown[0]}" is no field of a machine; use {", ".join(FIELDS)}')
    for word, works in WORDS.items():
        if word in found and not (isinstance(found[word], str) and found[word]):
            raise ValueError(f'"{word}" is {found[word]!r}, and must be words; use "{works}"')
    if "like" in found and found["like"] not in PRESETS:
        raise ValueError(f'"like" is {found["like"]!r}, and must be a machine; use one of {", ".join(PRESETS)}')
    base = base or PRESETS.get(found.get("like", ""))
    if base is None:
        if lacks := [field for field in NEEDED if field not in found]:
            raise ValueError(f'it has no "{lacks[0]}"; use one, or "like": "dgx-h100"')
        usual = {link: Link(USUAL_US[link] * US, 1.0) for link in LINKS[:2]}
        base = Machine(name, 1, 1.0, 1.0, 1.0, **usual)
    changes: dict[str, Any] = {"name": found.get("name", name), "source": found.get("source", f"{name}.json")}
    if "resource" in found:
        changes["resource"] = found["resource"]
    for field, works in WHOLE.items():
        if field in found:
            changes[field] = whole(found, field, works)
    for field, (of_machine, unit, works) in NUMBERS.items():
        if field in found:
            changes[of_machine] = unit * number(found, field, works, most=1 if field == "sustained" else inf)
    if "sharp" in found:
        if not isinstance(found["sharp"], bool):
            raise ValueError(f'"sharp" is {found["sharp"]!r}, and must be true or false; use false')
        changes["sharp"] = found["sharp"]
    for link in LINKS:
        if new := link_of(found, link, getattr(base, link)):
            changes[link] = new
    made = replace(base, **changes)
    if (made.pod > 0) != (made.beyond is not None):
        lacks, has = ("beyond_gbs", "pod") if made.pod else ("pod", "beyond_gbs")
        raise ValueError(f'it has "{has}" and no "{lacks}"; use both, or neither')
    if made.pod % made.node:
        raise ValueError(f'"pod" is {made.pod}, and must be a multiple of "node" {made.node}; use {8 * made.node}')
    return made


def link_of(found: Mapping[str, Any], link: str, base: Link | None) -> Link | None:
    """One of a machine's; None: nothing is said of it."""
    bandwidth, alpha = f"{link}_gbs", f"{link}_us"
    if bandwidth not in found and alpha not in found:
        return None
    if bandwidth not in found and base is None:
        raise ValueError(f'it has "{alpha}" and no "{bandwidth}"; use both')
    beta = 1 / (GB * number(found, bandwidth, 50)) if bandwidth in found else base.beta
    usual = base.alpha if base else USUAL_US[link] * US
    return Link(US * number(found, alpha, USUAL_US[link], least=-1e-12) if alpha in found else usual, beta)
