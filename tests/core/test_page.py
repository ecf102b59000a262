"""Pages: self-contained, both languages, the report's numbers, and what a real browser makes of them."""

import json
import re
from argparse import Namespace
from pathlib import Path

import pytest

from core.ledger import Traffic
from core.model.precision import POLICIES
from core.proof import figures
from core.proof.launch import Job
from core.proof.lesson import Lesson, Run
from core.proof.page.page import entry, idea, index, memory, numbers_of, render, traffic
from tests.browser import Browser
from tests.pool import Pool

ROOT = Path(__file__).parents[2]
LARGEST = 10**6  # bytes of a page
CHINESE = re.compile("[\u4e00-\u9fff]")


def scripts() -> list[Path]:
    """Every lesson's."""
    found = [p for folder in ROOT.iterdir() if folder.is_dir() for p in folder.glob("*.py") if folder.name != "tests"]
    return [p for p in found if "Lesson(" in p.read_text("utf-8") and "__main__" in p.read_text("utf-8")]


def test_every_lesson_has_its_idea_in_both_languages() -> None:
    assert len(scripts()) > 30
    for script in scripts():
        words = idea(script)
        assert words is not None, script
        english, chinese = words
        assert not CHINESE.search(english)
        assert len(english) > 100
        assert len(CHINESE.findall(chinese)) > 30, script


def test_every_idea_is_a_lesson_s() -> None:
    assert {p.stem for p in scripts()} == {p.stem for p in ROOT.glob("*/texts/*.txt")}


# ---- A page without ranks --------------------------------------------------------------------------------------------


def made(tmp_path: Path) -> tuple[str, dict]:
    """A page with every kind of figure, a claim that failed, and names that HTML must escape; and its report."""
    job = Job(0, 2, None, "gloo", 5.0)
    run = Run(Namespace(page="p.html", plot=None, steps=2), job, POLICIES["float64"])
    run.evidence.claim("good", "a < b & c", 1, 1)
    run.evidence.on_ranks("of ranks", "</script><b>", 2.5, [2.5, 3.5], 0.1)
    run.evidence.claim("fails last", "0", 0, 1e-3)
    run.evidence.claim("right", "0", 0, 0, correctness=True)
    run.losses, run.reference_losses = [2.0, 1.5], [2.0, 1.5 + 1e-12]
    run.held = {"plain": [{"weights": 8, "gradients": 4}] * 2, "engine": [{"weights": 4_000_000}, {"weights": 2}]}
    two = ("one", "一")
    run.draw(figures.bars(two, "MB", ["a long name of a group", two], {"x": [1, 2], "y": [0, 3]}))
    run.draw(figures.bars(two, "MB", ["a"], {"x": [1], "y": [0]}, stacked=True, expected=[1.0], formula="x"))
    run.draw(figures.lines(two, two, two, {"x": [1, 2, 3], "y": [3, 1, 2]}))
    run.draw(figures.scatter(two, two, two, [("p", 1, 2, "x"), ("q", 1, 2, "y")], diagonal=True))
    run.draw(figures.grid(two, "", ["a", "b"], [(two, [("1", 0.5), (two, "3")])], {"3": two}))
    run.draw(figures.shards(two, [("A", (8, 4), 0, two), ("b", (4,), None, "no")], 2))
    run.draw(figures.owners(two, [two, "p"], [[[(0, 5)], [(0, 10)]], [[(5, 10)], [(0, 10)]]], 10))
    run.draw(figures.path(two, [("rank 0", two, "(1, 2)")]))
    run.draw(figures.together(two, 4, {"tp": (two, [[0, 1], [2, 3]])}))
    cell = [0, "F", 0, 0.0, 1.0, None]
    later = [0, "B", 0, 4.0, 6.0, [0, "0F0"]]
    run.draw({"kind": "timeline", "title": two, "note": "", "timelines": [
        {"name": two, "rows": [[cell, later]], "unit": "", "bubble": [0.5, 1.0]}]})  # fmt: skip
    frame = Lesson(str(tmp_path / "topic" / "script.py"), "00", "A title", "标题", "A summary.")
    claims = [{"claim": c.claim, "formula": c.formula, "expected": c.expected, "measured": c.measured, "holds": c.holds}
              for c in run.evidence.claims]  # fmt: skip
    report = {"claims": claims, "lecture": "00", "world_size": 2, "backend": "gloo", "device": "cpu", "seconds": 1.0,
              "dtype": "float64", "mesh": {"dp": 2}, "losses": run.losses}  # fmt: skip
    sent = {"": [{("all-reduce", "dp"): Traffic(1, 2.0, 16.0)}, {("send F", "pp"): Traffic(1, 2.0, 8.0)}]}
    return render(frame, run, report, sent), report


def test_a_page_is_one_file_with_the_report_s_numbers(tmp_path: Path) -> None:
    page, report = made(tmp_path)
    assert len(page.encode()) < LARGEST
    assert numbers_of(page)["report"] == report
    outside = re.findall(r'(?:src|href)="([^"]+)"|url\(([^)#]+)\)|@import', page.split("<script")[0])
    assert {a for a, _ in outside} <= {"data:,", "index.html"}
    assert page.count("</script>") == 2, "what a claim says does not end the script"


def test_a_failed_claim_comes_first_and_is_on_top(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    body = page.split('id="evidence"')[1]
    assert body.index("of ranks") < body.index("fails last") < body.index("good")
    assert page.index('id="failed"') < page.index('id="technique"')
    assert "2 of 5 claims FAILED" in page


def test_memory_is_of_all_versions_or_of_that_of_the_formula() -> None:
    run = Run(Namespace(page="p", plot=None), Job(0, 1, None, "gloo", 5.0), POLICIES["float64"])
    run.held = {"plain": [{"weights": 1}], "engine": [{"weights": 2_000_000, "moments": 1_000_000}]}
    assert [f["series"] for f in memory(run)][1] == {"weights": [2.0], "moments": [1.0]}
    run.formula = "3Ψ", [3e6]
    (only,) = memory(run)
    assert only["expected"] == [3.0]


def test_bytes_are_by_axis_and_operation_of_each_rank() -> None:
    run = Run(Namespace(page="p", plot=None), Job(0, 2, None, "gloo", 5.0), POLICIES["float64"])
    sent = [{("send", "pp"): Traffic(1, 1.0, 8.0)}, {("all-reduce", "dp"): Traffic(1, 2.0, 16.0)}]
    (figure,) = traffic(run, {"": sent})
    assert [[name, [text for text, _ in cells]] for name, cells in figure["rows"]] == [
        ["dp: all-reduce", ["0", "16"]], ["pp: send", ["8", "0"]],
    ]  # fmt: skip


def test_the_index_leads_to_every_page(tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    (tmp_path / "a.html").write_text(page, "utf-8")
    found = index([entry("topic/script.py", tmp_path / "a.html"), entry("topic/none.py", tmp_path / "none.html")])
    assert 'href="a.html"' in found
    assert "A title" in found
    assert "标题" in found
    assert "3 / 5" in found
    assert "none.html" not in found


# ---- In a browser ----------------------------------------------------------------------------------------------------

NUMBERS = """[...document.querySelectorAll('[data-claim]')].map(e => [+e.dataset.claim, e.textContent.trim()])"""
SEEN = "document.body.innerText"
BAD_LABELS = """(() => {
  const bad = [];
  for (const svg of document.querySelectorAll('main svg')) {
    const box = svg.getBoundingClientRect();
    const labels = [...svg.querySelectorAll('text')].filter(t => t.textContent.trim())
      .map(t => [t.getBoundingClientRect(), t.textContent]);
    labels.forEach(([a, text], i) => {
      if (a.left < box.left - 1 || a.right > box.right + 1 || a.bottom > box.bottom + 2) bad.push(`${text} is cut`);
      for (const [b, other] of labels.slice(i + 1))
        if (Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
            && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3) bad.push(`${text} is over ${other}`);
    });
  }
  return bad;
})()"""


@pytest.fixture(scope="module")
def browser() -> Browser:
    with Browser() as browser:
        yield browser


def check(browser: Browser, page: Path) -> None:
    """What holds of every page: no error, no request, no overflow, both languages, all figures drawn."""
    browser.errors.clear()
    for width in (1200, 390):
        browser.resize(width, 900)
        browser.open(page)
        assert browser.run("document.documentElement.scrollWidth") <= width, f"{page.name} is wider than {width}"
        # textContent of SVG, whose texts innerText leaves out
        empty = browser.run("[...document.querySelectorAll('figure')].filter(f => !f.textContent.trim()).length")
        assert empty == 0
        assert "NaN" not in browser.run("document.querySelector('main').innerHTML")
        for language in ("zh", "en"):
            browser.run(f"setLanguage('{language}')")
            assert browser.run(BAD_LABELS) == []
    browser.run("setLanguage('zh')")
    chinese = browser.run(SEEN)
    browser.run("setLanguage('en')")
    english = browser.run(SEEN)
    assert len(CHINESE.findall(chinese)) > 50
    assert len(CHINESE.findall(english)) < 10, "what is left are the switch and the lectures' titles"
    assert browser.errors == []
    assert browser.asked == []


def test_every_kind_of_figure_in_a_browser(browser: Browser, tmp_path: Path) -> None:
    page, report = made(tmp_path)
    (tmp_path / "a.html").write_text(page, "utf-8")
    check(browser, tmp_path / "a.html")
    shown = dict(browser.run(NUMBERS))
    for i, claim in enumerate(report["claims"]):
        assert float(shown[i].replace(",", "")) == pytest.approx(claim["measured"], rel=1e-3)
    assert browser.run("document.querySelectorAll('.ranks button').length") == 4
    browser.run("document.querySelectorAll('.ranks button')[2].click()")
    assert "2 3" in browser.run(SEEN)


def test_keyboard_and_theme(browser: Browser, tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    (tmp_path / "a.html").write_text(page, "utf-8")
    browser.resize(1200, 900)
    browser.open(tmp_path / "a.html")
    reached = []
    for _ in range(30):
        browser.press("Tab")
        reached.append(browser.run("document.activeElement.id || document.activeElement.getAttribute('class')"))
        if reached[-1] == "timeline":
            break
    assert {"language", "theme", "timeline"} <= set(reached)
    told = "document.querySelector('.told').textContent"
    assert "0F0" in browser.run(told)
    browser.press("ArrowRight")
    assert "0B0, backward" in browser.run(told)
    assert "4 – 6 · waited 3 for 0F0 (rank 0)" in browser.run(told)
    assert browser.run("[...document.querySelectorAll('.bubble')].map(b => b.textContent).join()") == "bubble 3"
    paper = "getComputedStyle(document.body).backgroundColor"
    browser.prefer("dark")
    dark = browser.run(paper)
    browser.prefer("light")
    assert browser.run(paper) == "rgb(255, 255, 255)" != dark
    browser.run("document.getElementById('theme').click()")
    assert browser.run(paper) == dark
    browser.run("localStorage.clear()")


def test_nothing_is_wider_than_the_paper(browser: Browser, tmp_path: Path) -> None:
    page, _ = made(tmp_path)
    (tmp_path / "a.html").write_text(page, "utf-8")
    browser.resize(700, 900)
    browser.open(tmp_path / "a.html")
    browser.prefer("dark", "print")
    shown = "[...document.querySelectorAll('main svg, main table:not(.cases)')]"
    width = f"Math.max(...{shown}.map(e => e.getBoundingClientRect().right))"
    assert browser.run(width) <= 700
    assert browser.run("getComputedStyle(document.querySelector('.bar')).display") == "none"
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    browser.prefer("light")


def test_the_page_of_a_run(pool: Pool, browser: Browser, tmp_path: Path) -> None:
    """A pipeline lesson's: its numbers, its timeline, and what each action waited for."""
    page, report = tmp_path / "page.html", tmp_path / "report.json"
    outcome = pool.script(
        2, "pipeline/1f1b.py", "--steps", "2", "--layers", "2", "--page", str(page), "--report", str(report)
    )
    assert outcome.codes == [0, 0], outcome.err
    written, text = json.loads(report.read_text("utf-8")), page.read_text("utf-8")
    assert numbers_of(text)["report"] == written
    assert len(text.encode()) < LARGEST
    check(browser, page)
    shown = dict(browser.run(NUMBERS))
    assert sorted(shown) == list(range(len(written["claims"])))
    for i, claim in enumerate(written["claims"]):
        assert float(shown[i].replace(",", "")) == pytest.approx(claim["measured"], rel=1e-3, abs=1e-300)
    first = next(f for f in numbers_of(text)["figures"] if f["kind"] == "timeline")["timelines"][0]
    bubble = next(c for c in written["claims"] if c["claim"] == "bubble over wall time")
    assert first["bubble"][0] == pytest.approx(bubble["measured"])
    assert first["rows"][1][0] == [1, "F", 0, 1.0, 2.0, [0, "0F0"]], "rank 1 waits for rank 0's first forward"
    browser.run("setLanguage('zh')")
    chinese = browser.run("document.getElementById('evidence').innerText")
    assert all(words in chinese for words in ("气泡占总时间", "rank r 上为 min(m, p-r)", "所有步的损失与单进程一致"))
    assert "bubble over wall time" not in chinese
    browser.run("setLanguage('en')")
    assert browser.run("document.querySelectorAll('svg.timeline')[0].querySelectorAll('[data-action]').length") == 32
