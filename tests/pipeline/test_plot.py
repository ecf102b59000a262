"""The picture that `--plot` writes, seen by a real browser: its labels can be read."""

from pathlib import Path

import pytest

from core.proof.figures import ACTIONS
from pipeline.engine.validator import validate
from pipeline.evidence.timeline import plot
from pipeline.schedules import build
from tests.browser import Browser

# Of every text its box; two that overlap by more than a pixel are in each other's way.
OVERLAPS = """(() => {
  const boxes = [...document.querySelectorAll('text')].map(t => [t.textContent.trim(), t.getBoundingClientRect()])
    .filter(([text]) => text);
  const found = [];
  boxes.forEach(([a, x], i) => boxes.slice(i + 1).forEach(([b, y]) => {
    if (Math.min(x.right, y.right) - Math.max(x.left, y.left) > 1 &&
        Math.min(x.bottom, y.bottom) - Math.max(x.top, y.top) > 1) found.push(`${a} | ${b}`);
  }));
  return [boxes.length, found];
})()"""


@pytest.mark.parametrize(("name", "p", "m"), [("zb-v", 4, 8), ("1f1b", 2, 2)])
def test_no_label_hides_another(name: str, p: int, m: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, verdict = tmp_path / "plot.svg", validate(build(name, p, m))
    plot(str(path), {name: verdict.events, "once more": verdict.events})
    text = path.read_text()
    assert f"bubble {verdict.bubble_of_wall:.4g} of wall time" in text
    kinds = {event.label.kind for row in verdict.events for event in row}
    for kind in kinds:
        assert ACTIONS[kind] in text, "the page's colour"
    with Browser() as browser:
        browser.open(path)
        texts, overlapping = browser.run(OVERLAPS)
    assert texts > 2 * sum(map(len, verdict.events)), "every action has its number"
    assert overlapping == []
