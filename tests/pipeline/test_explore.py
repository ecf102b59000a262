"""The explorer of schedules in a real browser: its numbers are the validator's."""

import json
import random
import re
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest

from pipeline.engine.actions import Schedule, ScheduleError, stage_share, stages_of_ranks
from pipeline.engine.validator import validate
from pipeline.evidence.claims import messages_by_rule
from pipeline.evidence.pictures import cells
from pipeline.explore import main, page
from pipeline.schedules import SCHEDULES, build, from_csv
from tests.browser import Browser

SETTINGS = [(1.0, 1.0, 1.0, 0.0), (1.3, 0.7, 1.9, 0.35), (0.25, 4.0, 0.5, 2.0)]  # F, I, W, a message
SIZES = [*product((1, 2, 3, 4, 8), (1, 2, 5, 8, 16), (2,)), (4, 8, 1), (4, 9, 3), (3, 7, 4), (5, 17, 2)]  # p, m, v
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser() as browser:
        path = tmp_path_factory.mktemp("explorer") / "schedules.html"
        path.write_text(page(), "utf-8")
        browser.open(path)
        yield browser
        assert browser.errors == []
        assert browser.asked == []


def by_validator(schedule: Schedule, f: float, i: float, w: float, message: float) -> dict:
    """What the page says of a schedule, by Python."""
    verdict, share = validate(schedule, {"F": f, "B": i + w, "I": i, "W": w}, message), stage_share(schedule)
    return {
        "events": [[[*e.label, e.start[0], e.end[0]] for e in row] for row in verdict.events],
        "makespan": verdict.makespan,
        "bubbleOfWall": verdict.bubble_of_wall,
        "bubbleOfIdeal": verdict.bubble_of_ideal,
        "ownBubble": verdict.own_bubble,
        "inFlight": verdict.in_flight,
        "activations": max(verdict.in_flight) * share,
        "parameters": max(map(len, stages_of_ranks(schedule))) * share,
        "messages": max(messages_by_rule(schedule)),
        "allMessages": sum(messages_by_rule(schedule)),
    }


ASKED = """(cases => cases.map(([make, costs, message]) => {
  try {
    const v = validate(make.csv === undefined ? SCHEDULES[make.name](make.p, make.m, make.v) : fromCSV(make.csv),
                       costs, message);
    const path = v.path.map(([r, i]) => v.rows[r][i]);
    const gaps = path.slice(1).map((e, i) => e[3] - path[i][4]);
    return {...v, rows: undefined, path: undefined, events: v.rows.map(row => row.map(e => e.slice(0, 5))),
            waited: v.rows.map(row => row.map(e => e[5])),
            begins: path[0][3], ends: path.at(-1)[4], gaps};
  } catch (error) { if (!(error instanceof ScheduleError)) throw error; return error.message; }
}))"""


def ask(browser: Browser, cases: list) -> list:
    """What the page's own functions say of these: (what to make, F I W, message)."""
    with_costs = [[make, {"F": f, "B": i + w, "I": i, "W": w}, message] for make, (f, i, w, message) in cases]
    return browser.run(f"{ASKED}({json.dumps(with_costs)})")


def made_or_refused(make: Callable[[], Schedule]) -> tuple[Schedule | None, str]:
    """A schedule that can run, or why there is none."""
    try:
        schedule = make()
        validate(schedule)
    except ScheduleError as error:
        return None, str(error)
    return schedule, ""


def compare(found: dict | str, schedule: Schedule, setting: tuple[float, float, float, float]) -> None:
    expected = by_validator(schedule, *setting)
    assert isinstance(found, dict), found
    for name, value in expected.items():
        pairs = [*zip(_flat(found[name]), _flat(value), strict=True)]
        assert all(abs(a - b) <= 1e-12 * max(1, abs(b)) for a, b in pairs), name  # approx of thousands takes seconds
    costs = {"F": setting[0], "B": setting[1] + setting[2], "I": setting[1], "W": setting[2]}
    drawn = cells(validate(schedule, costs, setting[3]).events)
    assert found["waited"] == [[e[5] and [*e[5]] for e in row] for row in drawn]
    # The critical path: from the start of the step to its end, without a gap but for messages on their way.
    assert found["begins"] == 0
    assert found["ends"] == expected["makespan"]
    assert all(min(abs(gap), abs(gap - setting[3])) < 1e-9 for gap in found["gaps"])


def _flat(value: object) -> list:
    """Nested lists as one, kinds of actions as numbers."""
    if isinstance(value, list):
        return [each for part in value for each in _flat(part)]
    return [ord(value)] if isinstance(value, str) else [value]


def test_every_number_is_the_validator_s(browser: Browser) -> None:
    cases = [
        ({"name": name, "p": p, "m": m, "v": v}, setting)
        for name, (p, m, v), setting in product(SCHEDULES, SIZES, SETTINGS)
        if name == "interleaved" or v == 2
    ]
    made = 0
    for (make, setting), found in zip(cases, ask(browser, cases), strict=True):
        schedule, why = made_or_refused(lambda make=make: build(make["name"], make["p"], make["m"], make["v"]))
        if schedule is None:
            assert found == why
        else:
            compare(found, schedule, setting)
            made += 1
    assert made > 500


def test_pasted_schedules_run_or_are_refused_in_the_same_words(browser: Browser) -> None:
    """Also rows in any order: most of them deadlock, or have a backward before its forward."""
    texts = [
        "", "0F0,0B0", "0F0,0B0\n1F0,1B0", "0F0,x\n", "0F0,0B0\n", "0F0,,0B0\n1F0, 1I0 ,1W0", "0F0\n1F0,1B0",
        "0F0,0F0,0B0", "0F0,0B0,0W0", "0F0,0B0\n0F0,0B0", "0B0,0F0", "1F0,1B0", "0F0,0B0\n2F0,2B0",
        "0F0,0B0\n0F1,0B1\n0F2,0B2", '0F0,"(0F1;0B0)OVERLAP_F_B",0B1',
    ]  # fmt: skip
    random.seed(0)
    for name in ("1f1b", "zb-v", "dualpipe", "interleaved"):
        for _ in range(15):
            rows = [list(map(str, row)) for row in build(name, 2, 4)]
            row = random.choice(rows)
            i, j = random.sample(range(len(row)), 2)
            row[i], row[j] = row[j], row[i] if random.random() < 0.8 else "0F0"
            texts.append("\n".join(map(",".join, rows)))
    setting, refused = SETTINGS[1], 0
    found = ask(browser, [({"csv": text}, setting) for text in texts])
    for text, said in zip(texts, found, strict=True):
        schedule, why = made_or_refused(lambda text=text: from_csv(text.splitlines()))
        if schedule is None:
            assert said == why, text
            refused += 1
        else:
            compare(said, schedule, setting)
    assert 20 < refused < len(texts) - 10


def test_sliders_table_steps_and_csv(browser: Browser) -> None:
    browser.run("setLanguage('en')")
    browser.run("""(values => { for (const [id, value] of Object.entries(values)) KNOBS[id].value = value; draw(); })(
        {p: 6, m: 12, v: 3, F: 1.25, I: 0.75, W: 1.5, message: 0.2, memory: 6})""")
    browser.run("document.getElementById('show-naive').click()")
    shown = browser.run("""Object.fromEntries([...document.querySelectorAll('#numbers tbody tr')].map(row =>
        [row.dataset.schedule, Object.fromEntries([...row.querySelectorAll('[data-what]')].map(cell =>
            [cell.dataset.what, [+cell.dataset.value, cell.textContent]]))]))""")
    assert [*shown] == ["naive", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"]
    for name, row in shown.items():
        expected = by_validator(build(name, 6, 12, 3), 1.25, 0.75, 1.5, 0.2)
        assert len(row) == 8
        for what, (value, text) in row.items():
            assert value == pytest.approx(expected[what], rel=1e-12, abs=1e-12), (name, what)
            assert float(text.replace(",", "")) == pytest.approx(value, rel=1e-3, abs=1e-12)
    fits = {name: row["makespan"][0] for name, row in shown.items() if row["activations"][0] <= 6}
    assert browser.run("document.getElementById('winner').textContent").startswith(f"★ {min(fits, key=fits.get)}:")

    browser.run("document.querySelector('[data-step=\"1f1b\"]').click()")
    told = "document.getElementById('step-told').textContent"
    assert "nothing has begun" in browser.run(told)
    for _ in range(2):
        browser.run("document.getElementById('step-on').click()")
    assert "2 / 144: rank 0, 0F1, forward" in browser.run(told)
    assert "in flight: 2 0 0 0 0 0" in browser.run(told)
    assert browser.run("document.activeElement.id") == "step-at", "the keyboard goes on from here"
    browser.press("ArrowRight")
    assert "3 / 144: rank 1, 1F0" in browser.run(told)
    assert "waited for 0F0 (rank 0)" in browser.run(told)

    browser.run("document.getElementById('critical').click()")
    assert browser.run("document.querySelectorAll('[data-drawn=gpipe] .path').length") > 12
    browser.run("document.getElementById('csv').value = '0F0,0B0\\n1F0,1B0'; draw()")
    assert browser.run("document.querySelector('[data-drawn=yours] svg').querySelectorAll('[data-action]').length") == 4
    browser.run("document.getElementById('csv').value = '0F0,0B0\\n1F0'; draw()")
    assert "rank 1: 1B0 is missing" in browser.run("document.getElementById('numbers').textContent")
    browser.run("document.getElementById('csv').value = ''; draw()")


def test_it_fits_a_phone_and_speaks_both_languages(browser: Browser) -> None:
    for width in (1200, 390):
        browser.resize(width, 800)
        browser.run("draw()")
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.resize(1200, 900)
    browser.run("setLanguage('zh')")
    assert len(CHINESE.findall(browser.run("document.body.innerText"))) > 150
    browser.run("setLanguage('en')")
    assert len(CHINESE.findall(browser.run("document.body.innerText"))) < 5


def test_it_is_one_small_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "schedules.html"
    monkeypatch.setattr("sys.argv", ["explore", "--out", str(out)])
    assert main() == 0
    assert out.read_text("utf-8") == page()
    assert out.stat().st_size < 100_000
    monkeypatch.setattr("sys.argv", ["explore", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2
    assert "is a folder" in capsys.readouterr().err
