"""Machines that a file describes: all that the table says, and one clear refusal for each field that is wrong."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.planner import machine_file
from cluster.planner.hardware import measured
from cluster.planner.machines import ALL, GB, PRESETS, US, Link, Machine


def written(machine: Machine) -> dict[str, object]:
    """All of a machine in a file's fields."""
    words = {word: getattr(machine, word) for word in ("name", "source", "resource")}
    found: dict[str, object] = words | {"sharp": machine.sharp}
    found |= {field: getattr(machine, field) for field in machine_file.WHOLE if getattr(machine, field)}
    for field, (of, unit, _) in machine_file.NUMBERS.items():
        if value := getattr(machine, of):
            found[field] = value / unit
    for name in machine_file.LINKS:
        if link := getattr(machine, name):
            found |= {f"{name}_gbs": 1 / link.beta / GB, f"{name}_us": link.alpha / US}
    return found


def read(tmp_path: Path, content: object) -> Machine:
    path = tmp_path / "ours.json"
    path.write_text(json.dumps(content))
    return measured(str(path))


@pytest.mark.parametrize("machine", ALL, ids=lambda machine: machine.name)
def test_a_file_says_all_that_the_table_says(machine: Machine, tmp_path: Path) -> None:
    """Bugs: a field that a file cannot say: 8-bit peaks, pods, the host; one in other units."""
    made = read(tmp_path, written(machine))
    for field in vars(machine):
        mine, its = getattr(made, field), getattr(machine, field)
        if isinstance(its, Link):
            mine, its = (mine.alpha, mine.beta), (its.alpha, its.beta)
        assert mine == (pytest.approx(its, rel=1e-12) if isinstance(its, float | tuple) else its), field


def test_the_example_is_like_a_machine_of_the_table(tmp_path: Path) -> None:
    start, end = machine_file.__doc__.index("{"), machine_file.__doc__.index("}") + 1
    made, base = read(tmp_path, json.loads(machine_file.__doc__[start:end])), PRESETS["dgx-b200"]
    assert (made.name, made.node, made.memory, made.peak8, made.pod) == ("ours", 72, 186 * GB, 5000e12, 576)
    assert made.bandwidth == base.bandwidth
    assert made.outside == Link(12 * US, 1 / (50 * GB))
    assert made.inside.alpha == base.inside.alpha
    assert made.beyond == Link(10 * US, 1 / (25 * GB))
    assert read(tmp_path, {"like": "dgx-h100"}) == replace(PRESETS["dgx-h100"], name="ours", source="ours.json")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"memroy_gb": 80}, '"memroy_gb" is no field'),
        ({"memory_gb": 0}, '"memory_gb" is 0, and must be a number above 0; use 80'),
        ({"peak8_tflops": "fast"}, "\"peak8_tflops\" is 'fast', and must be a number"),
        ({"sustained": 1.5}, '"sustained" is 1.5, and must be a number above 0 and at most 1; use 0.8'),
        ({"node": 7.5}, '"node" is 7.5, and must be a whole number, 1 or more; use 8'),
        ({"processors": True}, '"processors" is True'),
        ({"pod": 100, "beyond_gbs": 5}, '"pod" is 100, and must be a multiple of "node" 8; use 64'),
        ({"pod": 64}, 'it has "pod" and no "beyond_gbs"; use both, or neither'),
        ({"beyond_us": 5}, 'it has "beyond_us" and no "beyond_gbs"'),
        ({"sharp": 1}, '"sharp" is 1, and must be true or false'),
        ({"like": "dgx-z9"}, "\"like\" is 'dgx-z9', and must be a machine; use one of dgx-a100"),
        ({"name": 3}, '"name" is 3, and must be words'),
        ({"host_gbs": -1}, '"host_gbs" is -1, and must be a number above 0; use 50'),
        ({"outside_us": -1}, '"outside_us" is -1'),
    ],
)  # fmt: skip
def test_a_field_that_is_wrong_is_named(change: dict[str, object], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        read(tmp_path, {"like": "dgx-h100"} | change)
    assert says in str(refusal.value)
    assert str(refusal.value).startswith("--machine ")


def test_what_a_machine_must_say(tmp_path: Path) -> None:
    whole = {
        "node": 8,
        "memory_gb": 80,
        "peak_tflops": 989,
        "bandwidth_gbs": 3350,
        "inside_gbs": 450,
        "outside_gbs": 50,
    }
    assert set(whole) == set(machine_file.NEEDED)
    made = read(tmp_path, whole)
    assert (made.peak, made.inside, made.peak8) == (989e12, Link(3 * US, 1 / (450 * GB)), 0.0)
    for field in whole:
        with pytest.raises(ValueError, match=f'it has no "{field}"; use one'):
            read(tmp_path, {name: value for name, value in whole.items() if name != field})
