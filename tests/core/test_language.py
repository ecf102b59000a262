"""What is printed has its Chinese: every claim and every refusal that stands in the code, finished with its values."""

import gettext
import json
import re
from pathlib import Path

import pytest

from core.proof.evidence import Evidence
from core.proof.language import FIELD, Catalogue, catalogue, entries, laid_out, language_of, split, words_of
from core.proof.terminal import columns, fit, measure
from tests.messages import TOPICS, Message, all_messages, messages, missing
from tests.pool import ROOT, Pool

ZH = catalogue("zh")
FILES = [ROOT / topic / "texts" / "zh.po" for topic in TOPICS]
CHINESE = re.compile(r"[\u4e00-\u9fff]")


def test_no_claim_and_no_refusal_lacks_its_chinese() -> None:
    lacking = missing(ZH, all_messages())
    assert not lacking, (
        "these have no Chinese; complete the entries in <topic>/texts/zh.po, a part between commas is enough "
        "(python -m tests.messages prints them again):\n\n" + "\n".join(each.entry for each in lacking)
    )


def test_what_is_read_from_the_code_is_nearly_all_that_is_said() -> None:
    found = all_messages()
    sinks = {sink: sum(each.sink == sink for each in found) for sink in ("claim", "each", "ValueError", "Rule", "say")}
    assert len(found) > 900
    assert min(sinks.values()) > 50


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ('run.evidence.claim("a claim that nobody knows", "1", 1, 1)', "a claim that nobody knows"),
        ('run.evidence.on_ranks(f"pigs flown on {name}", "1", 1, [1])', "pigs flown on \0"),
        ('raise ValueError(f"--pigs {n}: must have wings; use --pigs 0")', "--pigs \0: must have wings; use --pigs 0"),
        ('Rule("pigs", "--pigs {pigs}", holds, "must have {wings} wings")', "must have \0 wings"),
        ('what = "wings" if many else "one wing"\n    run.evidence.claim(what, "1", 1, 1)', "one wing"),
        ('for name, n in {"left wing": 1, "right wing": 2}.items():\n        each(name, "1", [])', "right wing"),
        ('rows.append(("of pigs", "1"))\n    run.say_course(rows)', "of pigs"),
    ],
)
def test_a_new_one_without_chinese_is_found(said: str, text: str) -> None:
    found = tuple(messages(f"def teach(run, many):\n    {said}\n", "zero/pigs.py"))
    lacking = missing(ZH, found)
    assert text in [each.text for each in lacking]
    assert "zero/pigs.py:" in lacking[0].entry
    assert 'msgstr ""' in lacking[0].entry


def test_one_from_a_parameter_is_followed_to_the_call() -> None:
    source = 'def claim_it(run, what):\n    run.evidence.claim(what, "1", 1, 1)\nclaim_it(run, "flying pigs")\n'
    assert "flying pigs" in [each.text for each in messages(source, "x.py")]


def test_removing_an_entry_fails_the_check() -> None:
    poorer = Catalogue()
    poorer.messages = {given: made for given, made in ZH.messages.items() if given != "must not be negative"}
    assert [each.text for each in missing(poorer, all_messages())] == ["must not be negative"]


@pytest.mark.parametrize("file", FILES, ids=TOPICS)
def test_catalogues_are_well_formed(file: Path) -> None:
    found = [pair for pair in entries(iter(file.read_text("utf-8").splitlines())) if pair[0]]
    assert len({given for given, _ in found}) == len(found)
    for given, made in found:
        assert made, given
        assert {*FIELD.findall(given)} == {*FIELD.findall(made)}, given
        assert not re.search(r"[\u4e00-\u9fff] ?[,;](?!\w)", made), f"ASCII punctuation in Chinese: {made}"


def test_what_has_no_chinese_character_is_a_name() -> None:
    same = [given for given, made in ZH.messages.items() if not CHINESE.search(made) and words_of(given) > 4]
    assert not same


def test_it_is_gettexts_own_format(tmp_path: Path) -> None:
    """Python's own reader of compiled catalogues says the same of every entry."""
    messages = {"": "Content-Type: text/plain; charset=UTF-8\n"} | ZH.messages
    keys = sorted(messages)
    ids, strings = ([text.encode() for text in some] for some in (keys, [messages[key] for key in keys]))
    start, offsets = 28 + 16 * len(keys), []
    blob = b""
    for each in [*ids, *strings]:
        offsets.append((len(each), start + len(blob)))
        blob += each + b"\0"
    header = [0x950412DE, 0, len(keys), 28, 28 + 8 * len(keys), 0, 0]
    numbers = header + [n for pair in offsets for n in pair]
    path = tmp_path / "lessons.mo"
    path.write_bytes(b"".join(n.to_bytes(4, "little") for n in numbers) + blob)
    with path.open("rb") as file:
        theirs = gettext.GNUTranslations(file)
    assert all(theirs.gettext(given) == made for given, made in ZH.messages.items())


@pytest.mark.parametrize(
    ("flags", "environment", "language"),
    [
        ([], {}, "en"),
        (["--lang", "zh"], {}, "zh"),
        (["--lang=zh"], {"LANG": "en_US.UTF-8"}, "zh"),
        (["--lang", "en"], {"LANG": "zh_CN.UTF-8"}, "en"),
        ([], {"LANG": "zh_CN.UTF-8"}, "zh"),
        ([], {"LC_MESSAGES": "zh_CN.UTF-8", "LANG": "en_US.UTF-8"}, "zh"),
        ([], {"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, "en"),
        ([], {"LC_ALL": "zh_TW.UTF-8", "LC_MESSAGES": "en_US"}, "zh"),
        ([], {"LANGUAGE": "zh:en", "LANG": "en_US.UTF-8"}, "zh"),
        ([], {"LANGUAGE": "zh", "LANG": "C"}, "en"),
    ],
)
def test_the_language_is_as_gettext_finds_it(flags: list[str], environment: dict[str, str], language: str) -> None:
    assert language_of(flags, environment) == language


@pytest.mark.parametrize(
    ("english", "chinese"),
    [
        ("bubble over wall time", "气泡占总时间"),
        ("elements sent a step, engine, rank 3", "每步发送的元素数，引擎版，rank 3"),
        ("the weights of a token, bias, no loss (plain)", "一个 token 的权重，偏置，无辅助损失（朴素版）"),
        ("(p-1)/m = 7/8, in virtual time", "(p-1)/m = 7/8，虚拟时间"),
        ("--steps 0: at least 1 step; use --steps 20", "--steps 0：至少 1 步；请改用 --steps 20"),
        ("min(m, p-r) on rank r", "rank r 上为 min(m, p-r)"),
        ("0 = 0 where F = I = W = 1, in virtual time", "F = I = W = 1 时 0 = 0，虚拟时间"),
        ("2bs(a+k)d/c (c-1)/c = 1,280; counted", "2bs(a+k)d/c (c-1)/c = 1,280；计数"),
        ("0 = 0, where F = I = W = 1, in virtual time", "0 = 0，其中 F = I = W = 1，虚拟时间"),
        (
            "rank 3 is in all-gather 4 over dp while its three peers are in all-reduce 4 over dp (gradients, step 2)",
            "rank 3 处于 dp 上的 all-gather 4，而其余 3 个 rank 处于 dp 上的 all-reduce 4（梯度，第 2 步）",
        ),
        (
            "rank 3 is slow: it has not reached all-reduce 4 over dp, but moves on: "
            "it is in forward of micro-batch 1, layer 0, step 2 (for 0.2 s)",
            "rank 3 太慢：它还没有到达 dp 上的 all-reduce 4，但仍在前进："
            "它处于微批次 1 的前向，层 0，第 2 步（已 0.2 秒）",
        ),
        ("no word of this is known to anybody", "no word of this is known to anybody"),
    ],
)
def test_what_is_finished_is_translated_with_its_values(english: str, chinese: str) -> None:
    assert ZH.gettext(english) == chinese
    assert catalogue("en").gettext(english) == english


def test_brackets_and_quotes_are_not_split() -> None:
    assert split('a, f(b, c), "d, e"', ", ") == ["a", "f(b, c)", '"d, e"']


def test_a_message_names_its_fields_by_number() -> None:
    message = Message("--tp \0: \0 of them", "zero/x.py", 7, "ValueError")
    assert 'msgid "--tp {0}: {1} of them"' in message.entry
    assert message.shown == "--tp ⟦0⟧: ⟦1⟧ of them"


@pytest.mark.parametrize("width", [40, 80, 120])
def test_chinese_tables_are_aligned_and_fit(width: int) -> None:
    evidence = Evidence()
    evidence.on_ranks("most microbatches in flight per rank", "min(m, p-r) on rank r", 1, [1.0] * 16)
    evidence.claim("bubble over wall time", "(p-1)/m = 7/8, in virtual time", 0, 1)
    table = evidence.tables(width, ZH)
    assert max(map(measure, fit(table, width).split("\n"))) <= width
    assert "讲义" in table
    lines = evidence.tables(80, ZH).split("\n")
    holds = measure(lines[0][: lines[0].index("成立")])
    for line in lines[2:]:
        if line.endswith(("是", "否")):
            assert measure(line[:-1]) == holds


@pytest.mark.parametrize("width", [30, 60])
def test_a_wide_chinese_table_goes_on_below(width: int) -> None:
    rows = [[f"第 {r} 行", *(str(100 * r + i) for i in range(9))] for r in range(3)]
    text = fit("\n".join(laid_out(["", *(f"第 {i} 列" for i in range(9))], rows)), width)
    assert max(map(measure, text.split("\n"))) <= width
    assert {cell for row in rows for cell in row[1:]} <= {*text.split()}
    assert text.count("第 2 行") > 1
    assert "\0" not in text


def test_printed_tables_are_laid_out_again() -> None:
    said = "rank    in flight  peak\n------  ---------  -----\nrank 0          8   1.25\nrank 1          7  10.50"
    lines = ZH.printed(said).split("\n")
    assert lines[0].split() == ["rank", "在途", "峰值"]
    assert len({measure(line) for line in lines}) == 1


def test_no_line_begins_with_a_comma() -> None:
    text = fit("相对误差 0，至多 1e-10（朴素版，引擎版）" * 4, 40)
    assert not [line for line in text.split("\n") if line[0] in "，。；：、）"]


@pytest.mark.parametrize("script", ["pipeline/1f1b.py", "zero/zero3.py"])
def test_a_lesson_in_chinese(pool: Pool, script: str, tmp_path: Path) -> None:
    reports = {}
    for language in ("en", "zh"):
        report = tmp_path / f"{language}.json"
        outcome = pool.script(4, script, "--steps", "1", "--lang", language, "--report", str(report))
        assert outcome.codes == [0] * 4, outcome.err
        reports[language] = json.loads(report.read_text("utf-8"))
        said = [line for line in outcome.out.split("\n") if words_of(line) > 2]
        if language == "zh":
            assert not [line for line in said if not CHINESE.search(line)], outcome.out
            assert "条断言中" in outcome.out
            assert max(map(measure, outcome.out.split("\n"))) <= columns()
    english, chinese = ([(c["claim"], c["formula"]) for c in reports[name]["claims"]] for name in ("en", "zh"))
    assert english == chinese  # the report stays English


def test_a_refusal_in_chinese(pool: Pool) -> None:
    outcome = pool.script(2, "zero/zero1.py", "--steps", "0", "--lang", "zh")
    assert outcome.codes == [2, 2]
    assert outcome.err.strip() == "zero/zero1.py: --steps 0：至少 1 步；请改用 --steps 20"
    assert not outcome.out
