"""What is printed, in the reader's language: a gettext catalogue of English and what it is in Chinese.

Scripts say everything in English; what leaves them, `Run.say`, the tables of claims and refusals, is translated here,
finished, with its values in it. So a msgid is a template: `{0}` is whatever stands there, translated too if it is in
the catalogue. What no msgid fits as a whole is translated part by part, between `; `, `: `, `, `, ` = `, ` / ` and
`(`. Each topic has its own catalogue, `<topic>/texts/zh.po`, read as it is: there is no build step. A msgstr that
repeats its msgid says that the word stays English.
"""

import ast
import gettext
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO

from core.proof.terminal import COLOUR, RULE, measure

LANGUAGES = ("en", "zh")
FIELD = re.compile(r"\{(\d)\}")
SEPARATORS = ((": ", "："), ("; ", "；"), (", ", "，"), (" = ", " = "), (" / ", " / "), (" · ", " · "))
AXES = r"\b[ctdpe]{1,2}p(-[ctdpe]{1,2}p)+\b"  # tp-cp
NOT_PROSE = re.compile(
    AXES + r"""|--?[\w-]+(\ (?!-)[\w./-]+)? | \S*[/_.=\\]\S* | '[^']*' | "[^"]*" | \[[^]]*\]""", re.VERBOSE
)
PROSE = re.compile(r"(?<![\w\u0370-\u03ff^([|·])[A-Za-z]?[a-z]{2,}(?![\w(\[|·])")  # a word of English, and no symbol
HEAD = re.compile(r"msgid|msgstr")


def language_of(flags: Sequence[str], environment: Mapping[str, str] = os.environ) -> str:
    """`--lang`, or what gettext's variables say; English if nothing does."""
    words = [word for flag in flags for word in (flag.split("=", 1) if flag.startswith("--lang=") else [flag])]
    given = [after for flag, after in pairwise([*words, ""]) if flag == "--lang"]
    wanted = given or [environment.get(name, "") for name in ("LC_ALL", "LC_MESSAGES", "LANG")]
    if not given and (first := next(filter(None, wanted), "")) not in ("", "C", "POSIX"):
        wanted = [environment.get("LANGUAGE", "").split(":")[0], first]  # as gettext: not where the locale is C
    return "zh" if next(filter(None, wanted), "").lower().startswith("zh") else "en"


@cache
def catalogue(language: str) -> "Catalogue":
    """All topics' together; of English an empty one."""
    if language == "en":
        return ENGLISH
    made = Catalogue()
    for file in sorted(Path(__file__).parents[2].glob("*/texts/zh.po")):
        with file.open(encoding="utf-8") as opened:
            made._parse(opened)
    return made


def entries(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
    """(msgid, msgstr) of a .po file."""
    pair: dict[str, str] = {}
    at = ""
    for line in map(str.strip, lines):
        if line.startswith("#") or not line:
            continue
        if found := HEAD.match(line):
            at, line = found[0], line[found.end() :].strip()
            if at == "msgid" and pair:
                yield pair["msgid"], pair["msgstr"]
                pair = {}
            pair[at] = ""
        pair[at] += ast.literal_eval(line)
    if pair:
        yield pair["msgid"], pair["msgstr"]


class Catalogue(gettext.NullTranslations):
    """What is finished English, in the language; itself where nothing is known."""

    def __init__(self) -> None:
        self.messages: dict[str, str] = {}
        self._known: dict[str, tuple[str, int]] = {}
        super().__init__()

    def _parse(self, fp: IO[str]) -> None:
        self.messages |= {given: made for given, made in entries(iter(fp)) if given and made}

    @cached_property
    def templates(self) -> list[tuple[str, list[str], str]]:
        """Those with fields, the one with most words first: (msgid, what stands between its fields, msgstr)."""
        found = [(given, FIELD.split(given)[::2], made) for given, made in self.messages.items() if "{0}" in given]
        return sorted(found, key=lambda each: -sum(map(len, each[1])))

    def gettext(self, message: str) -> str:
        """In the language, or as it is where much of it is unknown."""
        made, left = self._best(message) if self.messages else (message, 0)
        return message if left * 3 > words_of(message) else made

    def missing(self, message: str) -> bool:
        """Whether English words are left."""
        return self._best(message)[1] > 0

    def _best(self, text: str) -> tuple[str, int]:
        """The translation that leaves fewest words of English, and how many."""
        if text not in self._known:
            self._known[text] = text, words_of(text)  # while it is looked for, and if nothing is better
            if text in self.messages:
                self._known[text] = self.messages[text], 0
            elif text.strip() != text:
                inner, left = self._best(text.strip())
                self._known[text] = text.replace(text.strip(), inner, 1), left
            elif words_of(text):
                found = min(self._candidates(text), key=lambda each: each[1], default=(text, 1000))
                if found[1] <= self._known[text][1]:
                    self._known[text] = found
        return self._known[text]

    def _candidates(self, text: str) -> Iterator[tuple[str, int]]:
        yield from self._in_parts(text, SEPARATORS[:3])
        for given, between, made in self.templates:
            at = 0  # a quick look first
            for part in between:
                at = text.find(part, at)
                if at < 0:
                    break
                at += len(part)
            if at < 0 or not (found := _pattern(given).fullmatch(text)):
                continue
            fields = {name[1:]: self._best(value) for name, value in found.groupdict().items()}
            left = sum(words for _, words in fields.values())
            yield FIELD.sub(lambda match, f=fields: f[match[1]][0], made), left
            if not left:
                return
        yield from self._in_parts(text, SEPARATORS[3:])
        if text.endswith(")") and len(parts := split(text[:-1], " (", nested=False)) == 2:
            (head, some), (inner, more) = map(self._best, parts)
            yield f"{head}（{inner}）", some + more
        if text.endswith("."):
            inner, left = self._best(text[:-1])
            yield f"{inner}。", left

    def _in_parts(self, text: str, separators: Sequence[tuple[str, str]]) -> Iterator[tuple[str, int]]:
        """In two, wherever that can be: "a token, bias, no loss" is "a token" and "bias, no loss"."""
        for english, chinese in separators:
            parts = split(text, english)
            for cut in range(1, len(parts)):
                (head, some), (tail, more) = (self._best(english.join(each)) for each in (parts[:cut], parts[cut:]))
                yield f"{head}{chinese}{tail}", some + more

    def printed(self, text: str) -> str:
        """What is about to be printed: lines of prose, and tables, which are laid out again."""
        if not self.messages:
            return text
        return "\n\n".join(self._block(block) for block in text.split("\n\n"))

    def _block(self, block: str) -> str:
        lines = block.split("\n")
        if {*lines[0]} & {*"┌"}:
            return "\n".join(map(self._framed, lines))
        rule = next((i for i, line in enumerate(lines) if RULE.fullmatch(line.rstrip())), None)
        if rule is not None:
            return "\n".join(self._table(lines, rule))
        whole = " ".join(map(str.strip, lines))
        if len(lines) > 1 and whole in self.messages:
            return self.messages[whole]
        return "\n".join(self._line(line) for line in lines)

    def _line(self, line: str) -> str:
        if COLOUR.search(line) or {*line} & {*"│─"}:
            return line
        return self.gettext(line)

    def _framed(self, line: str) -> str:
        """A line of a table in a frame; a cell whose translation does not fit stays as it is."""
        cells = []
        for cell in line.split("│"):
            made = f" {self.gettext(cell.strip())} "
            cells.append(made + " " * (len(cell) - measure(made)) if measure(made) <= len(cell) else cell)
        return "│".join(cells) if len(cells) > 1 else line

    def _table(self, lines: list[str], rule: int) -> list[str]:
        """Heads and cells translated; columns as wide as they must be."""
        spans = [match.span() for match in re.finditer("-+", lines[rule])]
        spans[-1] = spans[-1][0], max(map(len, lines))

        def is_row(line: str) -> bool:
            return not any(line[end:start].strip() for (_, end), (start, _) in pairwise(spans))

        first = next(i for i in range(rule, -1, -1) if i == 0 or not is_row(lines[i - 1]))
        last = next((i for i in range(rule + 1, len(lines)) if not is_row(lines[i])), len(lines))
        heads = [" ".join(filter(None, (line[a:b].strip() for line in lines[first:rule]))) for a, b in spans]
        rows = [[line[a:b].strip() for a, b in spans] for line in lines[rule + 1 : last]]
        right = [any(line[a:b].strip() and line[a] == " " for line in lines[rule + 1 : last]) for a, b in spans]
        made = laid_out([*map(self.gettext, heads)], [[*map(self.gettext, row)] for row in rows], right)
        return [*map(self._line, lines[:first]), *made, *map(self._line, lines[last:])]


ENGLISH = Catalogue()


def laid_out(heads: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool] = ()) -> list[str]:
    """A table as tabulate's "simple" one, where a Chinese character takes two columns; cells may have several lines.

    Args:
        right: columns that end at one edge.
    """
    right = right or [False] * len(heads)
    cells = [[cell.split("\n") for cell in row] for row in [heads, *rows]]
    widths = [max(measure(line) for cell in column for line in cell) for column in zip(*cells, strict=True)]

    def pad(text: str, width: int, at_right: bool) -> str:
        blanks = " " * (width - measure(text))
        return blanks + text if at_right else text + blanks

    made = []
    for row in cells:
        for i in range(max(map(len, row))):
            texts = [cell[i] if i < len(cell) else "" for cell in row]
            made.append("  ".join(map(pad, texts, widths, right)).rstrip())
        if row is cells[0]:
            made.append("  ".join("-" * width for width in widths))
    return made


def split(text: str, separator: str, nested: bool = True) -> list[str]:
    """Where it stands outside of brackets and quotes; `nested=False`: at the first one alone."""
    parts, depth, start, at, quoted = [], 0, 0, 0, False
    while at < len(text):
        if not depth and not quoted and text.startswith(separator, at):
            parts.append(text[start:at])
            at = start = at + len(separator)
            if not nested:
                break
            continue
        quoted ^= text[at] == '"'
        depth = max(0, depth + (text[at] in "([{") - (text[at] in ")]}"))
        at += 1
    return [*parts, text[start:]]


@cache
def _pattern(template: str) -> re.Pattern[str]:
    parts = FIELD.split(template)
    loose = not parts[0] and words_of(" ".join(parts[::2])) < 2  # "{0} is {1}": a word, or any sentence would do
    seen: set[str] = set()
    made = ""
    for i, part in enumerate(parts):
        if i % 2 == 0:
            made += re.escape(part)
        else:
            any_text = r"\S+?" if loose and i == 1 else ".+?"
            made += f"(?P=_{part})" if part in seen else f"(?P<_{part}>{any_text})"
            seen.add(part)
    return re.compile(made, re.DOTALL)


def words_of(text: str) -> int:
    """Words of English; not names from the code, flags, symbols or what is quoted."""
    return len(PROSE.findall(NOT_PROSE.sub(" ", text)))
