"""Every claim, refusal and table head that stands in the code, found by reading it; and which have no Chinese.

    python -m tests.messages        what is missing, as entries to complete: into <topic>/texts/zh.po

What is passed to a sink (`Evidence.claim`, `ValueError`, `Rule`, ...) is followed back to the strings it is made of:
through `+`, conditions, names of the function or module, what a loop runs over, what a function returns, and
parameters, for which the calls in the file are looked at. A value in an f-string is a field, {0}, {1}, ...
"""

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from core.proof.language import Catalogue, catalogue

ROOT = Path(__file__).parent.parent
TOPICS = ("core", "zero", "megatron_tp", "sequence_parallel", "expert_parallel", "pipeline", "cluster")
# Which of its arguments are read. A rule's message is its flags, then its reason.
SINKS = {"claim": (0, 1), "each": (0, 1), "on_ranks": (0, 1), "ValueError": (0,), "Stop": (0,), "Rule": (3,),
         "ScheduleError": (0,), "error": (0,),
         "say": (0,), "tabulate": (1,), "Lesson": (2,), "say_course": (0,)}  # fmt: skip
KEYWORDS = {"claim", "formula", "reason"}
DEPTH = 6


@dataclass(frozen=True)
class Message:
    """A template, and where it is said."""

    text: str
    file: str
    line: int
    sink: str

    @property
    def shown(self) -> str:
        """As it may stand in what is printed, a value in each field."""
        return numbered(self.text, "⟦{}⟧")

    @property
    def entry(self) -> str:
        text = numbered(self.text, "{{{}}}").replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        return f'#: {self.file}:{self.line}\nmsgid "{text}"\nmsgstr ""\n'


FIELD = "\0"


def numbered(text: str, how: str) -> str:
    parts = text.split(FIELD)
    return parts[0] + "".join(how.format(i) + part for i, part in enumerate(parts[1:]))


class Reader:
    """The strings that an expression of one file may be."""

    def __init__(self, tree: ast.Module):
        self.tree = tree
        self.parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self.functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        self.calls: dict[str, list[ast.Call]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := name_of(node)):
                self.calls.setdefault(name, []).append(node)

    def scopes(self, node: ast.AST) -> Iterator[ast.AST]:
        while node in self.parents:
            node = self.parents[node]
            if isinstance(node, ast.FunctionDef | ast.Lambda | ast.Module):
                yield node

    def strings(self, node: ast.AST | None, depth: int = 0) -> Iterator[str]:
        if node is None or depth > DEPTH:
            return
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            fields = [part for part in node.values if isinstance(part, ast.FormattedValue)]
            yield "".join(FIELD if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
            for field in fields:
                yield from self.strings(field.value, depth + 1)
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            if any(isinstance(each, ast.Tuple | ast.List) for each in ast.walk(node)):
                yield from self.strings(node.left, depth + 1)
                yield from self.strings(node.right, depth + 1)
                return
            sides = [[*self.strings(side, depth + 1)] for side in (node.left, node.right)]
            for left in sides[0] or [FIELD]:
                for right in sides[1] or [FIELD]:
                    yield left + right
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):  # "words" * (whether)
            for side in (node.left, node.right):
                yield from self.strings(side, depth + 1)
        elif isinstance(node, ast.IfExp):
            yield from self.strings(node.body, depth + 1)
            yield from self.strings(node.orelse, depth + 1)
        elif isinstance(node, ast.BoolOp):
            for value in node.values:
                yield from self.strings(value, depth + 1)
        elif isinstance(node, ast.NamedExpr):
            yield from self.strings(node.value, depth + 1)
        elif isinstance(node, ast.Tuple | ast.List):
            for element in node.elts:
                yield from self.strings(element, depth + 1)
        elif isinstance(node, ast.Dict):
            for element in [*node.keys, *node.values]:
                yield from self.strings(element, depth + 1)
        elif isinstance(node, ast.Starred | ast.Subscript):
            yield from self.strings(node.value, depth + 1)
        elif isinstance(node, ast.Call):
            yield from self.of_call(node, depth)
        elif isinstance(node, ast.Name):
            yield from self.of_name(node, depth)

    def of_call(self, node: ast.Call, depth: int) -> Iterator[str]:
        name = name_of(node)
        if isinstance(node.func, ast.Attribute) and name in ("format", "format_map", "items", "removesuffix", "strip"):
            yield from self.strings(node.func.value, depth + 1)
        elif name in ("dict", "zip", "enumerate", "sorted", "fill", "tabulate"):
            for argument in node.args[: 1 if name == "fill" else None]:
                yield from self.strings(argument, depth + 1)
        elif isinstance(node.func, ast.Name) and name in self.functions:
            for each in ast.walk(self.functions[name]):
                if isinstance(each, ast.Return):
                    yield from self.strings(each.value, depth + 1)
        elif name == "join" and node.args and isinstance(node.args[0], ast.List | ast.Tuple):
            yield from self.strings(node.args[0], depth + 1)

    def of_name(self, node: ast.Name, depth: int) -> Iterator[str]:
        for scope in self.scopes(node):
            arguments = getattr(scope, "args", None)
            names = [each.arg for each in [*arguments.args, *arguments.kwonlyargs]] if arguments else []
            if node.id in names and isinstance(scope, ast.FunctionDef):
                yield from self.of_parameter(scope, names.index(node.id), node.id, depth)
                return
            found = False
            for each in ast.walk(scope):
                value = bound(each, node.id)
                if value is None and name_of_call(each) == "append" and getattr(each.func.value, "id", "") == node.id:
                    value = each.args[0]
                if value is not None:
                    found = True
                    yield from self.strings(value, depth + 1)
            if found:
                return

    def of_parameter(self, function: ast.FunctionDef, at: int, name: str, depth: int) -> Iterator[str]:
        method = bool(function.args.args) and function.args.args[0].arg == "self"
        for call in self.calls.get(function.name, ()):
            place = at - method
            if place < len(call.args) and not any(isinstance(each, ast.Starred) for each in call.args):
                yield from self.strings(call.args[place], depth + 1)
            for keyword in call.keywords:
                if keyword.arg == name:
                    yield from self.strings(keyword.value, depth + 1)


def bound(node: ast.AST, name: str) -> ast.AST | None:
    """What this statement gives the name, or the whole of what it takes it from."""
    if isinstance(node, ast.Assign):
        targets, value = node.targets, node.value
    elif isinstance(node, ast.AnnAssign | ast.AugAssign | ast.NamedExpr):
        targets, value = [node.target], node.value
    elif isinstance(node, ast.For | ast.comprehension):
        targets, value = [node.target], node.iter
    else:
        return None
    for target in targets:
        if isinstance(target, ast.Name) and target.id == name:
            return value
        if isinstance(target, ast.Tuple) and any(getattr(each, "id", "") == name for each in target.elts):
            if isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts):
                return next(v for t, v in zip(target.elts, value.elts, strict=True) if getattr(t, "id", "") == name)
            return value
    return None


def name_of_call(node: ast.AST) -> str:
    return name_of(node) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else ""


def name_of(call: ast.Call) -> str:
    return call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")


def messages(source: str, file: str) -> Iterator[Message]:
    """What one file says."""
    reader = Reader(ast.parse(source))
    for name, places in SINKS.items():
        for call in reader.calls.get(name, ()):
            for argument in [*(call.args[i] for i in places if i < len(call.args)),
                             *(k.value for k in call.keywords if k.arg in KEYWORDS)]:  # fmt: skip
                for text in reader.strings(argument):
                    for part in text.split("\n\n"):
                        yield Message(fields_of_rules(part).strip("\n"), file, call.lineno, name)


def fields_of_rules(text: str) -> str:
    """A rule names its fields: "must divide --heads {heads}"."""
    import re

    return re.sub(r"\{[a-z_]\w*(\[\d\])?(![rs])?(:[^}]*)?\}", FIELD, text)


@cache
def all_messages() -> tuple[Message, ...]:
    files = (file for topic in TOPICS for file in sorted((ROOT / topic).rglob("*.py")))
    found = (each for file in files for each in messages(file.read_text("utf-8"), str(file.relative_to(ROOT))))
    return tuple({each.text: each for each in found}.values())


def missing(known: Catalogue, found: tuple[Message, ...]) -> list[Message]:
    """A block that is printed may be known as a whole, its lines joined, or line by line."""

    def lacks(shown: str, sink: str) -> bool:
        lines = [*map(str.strip, shown.split("\n"))]
        return known.missing(" ".join(lines)) and (sink != "say" or any(map(known.missing, lines)))

    return [each for each in found if lacks(each.shown, each.sink)]


if __name__ == "__main__":
    lacking = missing(catalogue("zh"), all_messages())
    print("\n".join(each.entry for each in lacking))
    sys.exit(bool(lacking))
