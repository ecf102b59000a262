"""What a student has to read, and how large everything may be: the budgets of the house.

Each test collects every offender and names all of them in one message.
"""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
TOPICS = ("zero", "megatron_tp", "sequence_parallel", "pipeline", "expert_parallel", "cluster")
TOOLS = (
    "cluster/explore.py",
    "cluster/plan.py",
    "cluster/rules.py",
    "pipeline/explore.py",
)  # scripts that run_all.sh does not name
READ_LINES, READ_FILES = 150, 2  # what it takes to follow the plain version of a technique
SCRIPT_LINES, MODULE_LINES, CORE_LINES = 250, 320, 800

FOLDERS = [ROOT / folder for folder in ("core", *TOPICS)]
MODULES = [path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in sorted(folder.rglob("*.py"))]
READ = re.compile(r"^ *read: (.+)$", re.MULTILINE)
RANGE = re.compile(r"([\w/.]+\.py):(\d+)-(\d+)")


@cache
def text(module: str) -> str:
    return (ROOT / module).read_text()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(text(module))


def length(module: str) -> int:
    return len(text(module).splitlines())


def is_script(module: str) -> bool:
    return 'if __name__ == "__main__":' in text(module)


def lessons() -> list[str]:
    """The scripts that run_all.sh names."""
    named = re.findall(r'^  "?(\w+/\w+\.py)', (ROOT / "run_all.sh").read_text(), re.MULTILINE)
    return list(dict.fromkeys(named))


def read_lines(module: str) -> list[str]:
    return READ.findall(ast.get_docstring(tree(module)) or "")


def resolved(name: str, script: str) -> str | None:
    """A file that a `read:` line names: relative to the script's folder, or else to the root."""
    candidates = ((ROOT / script).parent / name, ROOT / name)
    return next((p.resolve().relative_to(ROOT).as_posix() for p in candidates if p.is_file()), None)


def check(offenders: list[str]) -> None:
    assert not offenders, "\n" + "\n".join(offenders)


# ---- What is read ----------------------------------------------------------------------------------------------------


def whole(body: list[ast.stmt]) -> Iterator[tuple[int, int]]:
    """First and last line of what is not to be cut: statements outside classes, the heads of these, and methods."""
    for node in body:
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        if isinstance(node, ast.ClassDef):
            yield first, node.lineno
            yield from whole(node.body)
        else:
            yield first, node.end_lineno


def wrong_ranges(script: str, counted: str) -> Iterator[str]:
    """What is wrong with the part of a `read:` line that counts, such as `zero1.py:20-60; flat.py:1-30`."""
    files, lines = set(), 0
    for entry in counted.split(";"):
        if (found := RANGE.fullmatch(entry.strip())) is None:
            yield f"{entry.strip()!r} is not path:first-last"
            continue
        name, first, last = found[1], int(found[2]), int(found[3])
        path = resolved(name, script)
        if path is None:
            yield f"there is no {name}"
        elif not 1 <= first <= last <= length(path):
            yield f"{name} has {length(path)} lines, not {first}-{last}"
        else:
            cut = [(a, b) for a, b in whole(tree(path).body) if a < first <= b or a <= last < b]
            yield from (f"{name}:{first}-{last} cuts what stands in {a}-{b}" for a, b in cut)
        files.add(path)
        lines += last - first + 1
    if len(files) > READ_FILES:
        yield f"{len(files)} files to read, at most {READ_FILES}"
    if lines > READ_LINES:
        yield f"{lines} lines to read, at most {READ_LINES}"


def wrong_further(script: str, further: str) -> Iterator[str]:
    """What is wrong after `then`: every file that it names exists; a range may be there too."""
    for name in re.findall(r"[\w/.]+\.py", further):
        if resolved(name, script) is None:
            yield f"there is no {name}"


def test_every_script_says_what_to_read() -> None:
    offenders = []
    for script in [*lessons(), *TOOLS]:
        found = read_lines(script)
        if len(found) != 1:
            offenders.append(f"{script}: {len(found)} lines with read: in its docstring, not one")
            continue
        counted, _, further = found[0].partition("; then ")
        wrong = [*wrong_ranges(script, counted), *wrong_further(script, further)]
        offenders += [f"{script}: read: {what}" for what in wrong]
    check(offenders)


def test_the_top_of_a_topic_is_what_a_slide_shows() -> None:
    """A script, or a file that a script's `read:` line names; all else is one level down."""
    named = set()
    for script in filter(is_script, MODULES):
        for line in read_lines(script):
            named |= {resolved(name, script) for name in re.findall(r"[\w/.]+\.py", line)}
    tops = [m for m in MODULES if m.count("/") == 1 and not m.startswith("core/") and not m.endswith("/__init__.py")]
    check([f"{m}: neither a script, nor named by a read: line" for m in tops if not is_script(m) and m not in named])


def test_the_glossary_has_names_of_the_code() -> None:
    table = (ROOT / "GLOSSARY.md").read_text().split("\n## ")[0]
    code = "\n".join(map(text, MODULES))
    offenders = []
    for row in re.findall(r"^\|.*\|$", table, re.MULTILINE):
        for name in re.findall(r"`([^`]+)`", row.split("|")[-2]):
            for word in [name] if "/" in name else re.findall(r"\w[\w-]*", name):
                exists = (ROOT / word).exists() if "/" in word else re.search(rf"\b{word.replace('-', '[-_]')}\b", code)
                if not exists:
                    offenders.append(f"GLOSSARY.md: `{name}` is not in the code")
    check(offenders)


FILE = re.compile(r"[\w/.-]*\w\.(?:py|md|sh|toml)\b")
FOREIGN = {  # of Megatron-LM, whose name stands beside each
    "pretrain_gpt.py",
    "tensor_parallel/layers.py",
    "examples/sc21/run_table_1.sh",
}


def missing(name: str, module: str) -> bool:
    """Whether a file is neither beside the module, nor at the top of its topic, nor at the root."""
    folders = (ROOT / module).parent, ROOT / module.split("/")[0], ROOT
    return not any((folder / name).is_file() for folder in folders)


def test_every_file_that_a_docstring_names_exists() -> None:
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef
    offenders = []
    for module in MODULES:
        documented = [ast.get_docstring(node) or "" for node in ast.walk(tree(module)) if isinstance(node, kinds)]
        named = {name for docstring in documented for name in FILE.findall(docstring)} - FOREIGN
        offenders += [f"{module}: there is no {name}" for name in sorted(named) if missing(name, module)]
    check(offenders)


def test_a_file_that_does_not_exist_is_found() -> None:
    assert FILE.findall("the loss (`engine/loss.py`), see run_all.sh, and 3.py-like numbers 1.5") == [
        "engine/loss.py", "run_all.sh", "3.py"
    ]  # fmt: skip
    assert missing("engine/cross_entropy.py", "megatron_tp/tensor_parallel.py")
    assert not missing("engine/loss.py", "megatron_tp/tensor_parallel.py")
    assert not missing("tensor_parallel.py", "megatron_tp/engine/layers.py")


# ---- Budgets ---------------------------------------------------------------------------------------------------------


def test_no_file_is_too_long() -> None:
    offenders = []
    for module in MODULES:
        most = SCRIPT_LINES if is_script(module) else MODULE_LINES
        if length(module) > most:
            offenders.append(f"{module}: {length(module)} lines, at most {most}")
    core = sum(length(m) for m in MODULES if re.fullmatch(r"core/\w+\.py", m))
    if core > CORE_LINES:
        offenders.append(f"core/*.py: {core} lines, at most {CORE_LINES}")
    check(offenders)


# ---- Imports, conditions, state --------------------------------------------------------------------------------------


def imported(node: ast.AST) -> Iterator[str]:
    """The files of the project that an import statement names."""
    names = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom) and node.module:
        # `from topic import name` is either a module of the package or what its __init__ has.
        names = [f"{node.module}.{alias.name}" for alias in node.names] + [node.module]
    files = set(MODULES)
    for name in names:
        path = name.replace(".", "/")
        yield from {f"{path}.py", f"{path}/__init__.py"} & files


def test_no_import_inside_a_function() -> None:
    """Of our own modules: it would hide a cycle."""
    offenders = []
    for module in MODULES:
        functions = [n for n in ast.walk(tree(module)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
        inner = {(n.lineno, f) for function in functions for n in ast.walk(function) for f in imported(n)}
        offenders += [f"{module}:{line}: imports {name} inside a function" for line, name in sorted(inner)]
    check(offenders)


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycles that a depth-first search meets, each once."""
    found, done = [], set()

    def visit(module: str, path: list[str]) -> None:
        if module in path:
            found.append([*path[path.index(module) :], module])
        elif module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])
    return found


def test_no_import_cycles() -> None:
    graph = {
        module: {f for node in tree(module).body for f in imported(node) if not f.endswith("__init__.py")} - {module}
        for module in MODULES
    }
    check([" imports ".join(cycle) for cycle in cycles(graph)])


def test_a_cycle_is_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c", "b"]]
    assert cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_condition_is_a_string() -> None:
    """Nothing is evaluated: a condition is Python."""
    offenders = []
    for module in MODULES:
        for node in ast.walk(tree(module)):
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            if called in ("eval", "exec", "compile"):
                offenders.append(f"{module}:{node.lineno}: {called}(...)")
    check(offenders)


# Of torchrun, torch, NCCL and gloo, of the system, and https://no-color.org.
KNOWN_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_(ADDR|PORT)|TORCHELASTIC_\w+"
    r"|(TORCH|NCCL|GLOO|CUDA|PYTORCH|CUBLAS)_\w+|OMP_NUM_THREADS|PATH|NO_COLOR"
)


def variables(module: str) -> Iterator[tuple[int, str]]:
    """(line, name) of each environment variable that is read or set by a literal name."""
    for node in ast.walk(tree(module)):
        name = None
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "os.environ":
            name = node.slice
        elif isinstance(node, ast.Compare) and ast.unparse(node.comparators[0]) == "os.environ":
            name = node.left
        elif isinstance(node, ast.Call) and re.match(r"os\.(environ\.|getenv)", ast.unparse(node.func)) and node.args:
            name = node.args[0]
        if isinstance(name, ast.Constant):
            yield node.lineno, name.value


def test_no_environment_variable_of_our_own() -> None:
    offenders = []
    for module in MODULES:
        unknown = [(line, name) for line, name in variables(module) if not KNOWN_VARIABLES.fullmatch(name)]
        offenders += [f"{module}:{line}: environment variable {name}" for line, name in unknown]
    check(offenders)
