"""The explorer of memory in a real browser: its bytes are the planner's."""

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import explore, plan
from cluster.planner.memory import rank_memory
from cluster.planner.models import PUBLISHED
from cluster.planner.rulebook import Case, broken
from cluster.planner.stages import distinct_ranks
from core.proof.page.page import numbers_of
from tests.browser import Browser

PARTS = ("weights", "gradients", "optimizer", "activations", "gathered", "working")
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("explorer") / "memory.html"
    path.write_text(explore.page(), "utf-8")
    return path


@pytest.fixture(scope="module")
def browser(written: Path) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(written)
        yield browser
        assert browser.errors == []
        assert browser.asked == []


def choices() -> list[dict]:
    """Some of all that can be chosen, the same each time: of every model, ZeRO stage and recomputation many."""
    random.seed(0)
    draw = random.choice
    return [
        {"model": name, "tp": draw(explore.TP), "cp": draw(explore.CP), "pp": draw(explore.PP), "dp": draw(explore.DP),
         "ep": draw(explore.EP) if PUBLISHED[name].experts else draw((1, 1, 1, 2)),
         "etp": draw(explore.ETP) if PUBLISHED[name].experts else draw((1, 1, 1, 2)), "zero": zero,
         "schedule": draw([*explore.NAMES]), "recompute": recompute, "microbatch": draw(explore.MICROBATCH)}
        for name in explore.MODELS for zero in range(4) for recompute in explore.KINDS for _ in range(4)
    ]  # fmt: skip


def test_every_byte_is_the_planner_s(browser: Browser) -> None:
    asked, fine = choices(), 0
    for x, found in zip(asked, browser.run(f"({json.dumps(asked)}).map(memoryOf)"), strict=True):
        model, more = PUBLISHED[x["model"]], {name: x[name] for name in ("dp", "ep", "etp", "zero", "schedule")}
        layout = explore.layout_of(x["tp"], x["cp"], x["pp"], x["recompute"], x["microbatch"], **more)
        failing = broken(Case(layout, model, None, layout.ranks, layout.batch))
        assert bool(failing) == isinstance(found, str), (x, found, [rule.reason for rule in failing])
        if failing:
            continue
        fine += 1
        assert [rank for rank, _ in found] == distinct_ranks(model, layout)
        for rank, held in found:
            expected = rank_memory(model, layout, rank, explore.ITEMSIZE)
            for part in PARTS:
                assert held[part] == pytest.approx(getattr(expected, part), rel=1e-12, abs=1e-3), (x, rank, part)
    assert fine > 500


def test_what_is_chosen_is_shown(browser: Browser) -> None:
    browser.run("setLanguage('en')")
    browser.run("""(values => { for (const [id, value] of Object.entries(values)) FIELDS[id].value = value; draw(); })
        ({model: 'mixtral-8x7b', gpu: 'H100 80 GB', tp: 2, cp: 1, pp: 2, dp: 4, ep: 8, etp: 1, zero: 1,
          schedule: '1f1b', recompute: 'selective', microbatch: 1})""")
    layout = explore.layout_of(2, 1, 2, "selective", 1, dp=4, ep=8, zero=1)
    shown = browser.run("[...document.querySelectorAll('#numbers [data-what]')].map(e => [e.dataset.rank,"
                        "e.dataset.what, +e.dataset.value, e.textContent])")  # fmt: skip
    totals = {}
    for rank, part, value, text in shown:
        held = rank_memory(PUBLISHED["mixtral-8x7b"], layout, int(rank), 2)
        expected = held.total if part == "all" else getattr(held, part)
        totals[rank] = held.total
        assert value == pytest.approx(expected, rel=1e-12)
        assert float(text.replace(",", "")) == pytest.approx(expected / 1e9, rel=1e-3)
    assert len(shown) == 2 * (len(PARTS) + 1)
    fits = max(totals.values()) <= explore.USABLE * explore.GPUS["H100 80 GB"]
    assert browser.run("document.getElementById('fits').textContent").startswith("fits" if fits else "does not fit")
    browser.run("FIELDS.model.value = 'llama3-8b'; FIELDS.model.onchange()")
    assert "has no experts" in browser.run("document.getElementById('why').textContent")
    browser.run("FIELDS.ep.value = 1; draw()")


def test_plans_as_a_page(browser: Browser, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "plans.html"
    flags = (
        "--model",
        "llama3-8b",
        "--machine",
        "dgx-h100",
        "--world",
        "16",
        "--batch",
        "32",
        "--pp",
        "1",
        "--cp",
        "1",
    )
    monkeypatch.setattr("sys.argv", ["plan", *flags, "--page", str(out), "--top", "3"])
    assert plan.main() == 0
    scatter = numbers_of(out.read_text("utf-8"))["figures"][0]
    assert [point[0] for point in scatter["points"][:4]] == ["1", "2", "3", ""]
    assert all(point[2] <= 85 for point in scatter["points"])
    browser.open(out)
    assert browser.run("document.querySelectorAll('circle').length") == len(scatter["points"])
    assert browser.run("document.querySelectorAll('table.grid tbody tr').length") == 3
    browser.open(written)


def test_it_fits_a_phone_and_speaks_both_languages(browser: Browser, written: Path) -> None:
    assert written.stat().st_size < 1_000_000
    for width in (1200, 390):
        browser.resize(width, 800)
        browser.run("draw()")
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run("setLanguage('zh')")
    assert len(CHINESE.findall(browser.run("document.body.innerText"))) > 100
    browser.run("setLanguage('en')")
    assert len(CHINESE.findall(browser.run("document.body.innerText"))) < 5
