"""The house rules that a machine can check. Each check says how many files it looked at."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "bitbrush"
MAX_FILE_LINES, MAX_FUNCTION_LINES = 450, 80

# Who may import whom (docs/decisions.md): the package's top-level name, then what it may import besides itself.
BASE = {"errors", "prompts", "assets", "precision"}
NUMBERS = BASE | {"numbers"}
KERNELS = NUMBERS | {"kernels"}
NETWORK = KERNELS | {"network"}
ARTIFACT = NETWORK | {"artifact", "engine"}
STEPS = ARTIFACT | {"steps"}
PICTURES = NETWORK | {"artifact", "evaluation", "report"}
ALLOWED = {
    "errors": set(),
    "prompts": {"errors"},
    "assets": {"errors"},
    "numbers": BASE,
    "kernels": NUMBERS,
    "network": KERNELS,
    "engine": ARTIFACT,
    "artifact": ARTIFACT,
    "steps": STEPS,
    "evaluation": PICTURES - {"report"} | {"loading"},
    "report": PICTURES,
    "recipes": BASE,
    "precision": set(),
    "loading": NETWORK,
    "inspection": NETWORK | {"engine"},
    "sensing": STEPS | {"evaluation", "loading"},
}
WRITER = "bitbrush.engine.disk"  # the only writer; whoever saves a file calls it
FREE = {"api", "cli", "__init__"}  # the top of the house imports what it needs
PICKLES = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@cache
def trees() -> dict[str, ast.Module]:
    """Every source file, by its path inside the package."""
    files = sorted(path for path in SOURCE.rglob("*.py"))
    found = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in files}
    assert len(found) >= 20, f"only {len(found)} files in {SOURCE}"
    return found


def imports(tree: ast.AST, name: str) -> Iterator[str]:
    """Dotted names of all bitbrush modules that a file imports at run time (not under ``if TYPE_CHECKING``)."""
    for node in runtime_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.partition(".")[0] == "bitbrush")
        elif isinstance(node, ast.ImportFrom):
            module = absolute(node, name)
            if module.partition(".")[0] == "bitbrush":
                yield from (f"{module}.{alias.name}" for alias in node.names)


def absolute(node: ast.ImportFrom, name: str) -> str:
    if not node.level:
        return node.module or ""
    parts = ["bitbrush", *Path(name).parts[:-1]]
    base = parts[: len(parts) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from runtime_nodes(node)


def package(name: str) -> str:
    return Path(name).parts[0].removesuffix(".py")


def test_imports_point_one_way() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        looked += 1
        ours = package(name)
        if ours in FREE:
            continue
        assert ours in ALLOWED, f"{name}: a new package; say in this test what it may import"
        for target in imports(tree, name):
            if target.startswith((WRITER, "bitbrush.__")) or target == "bitbrush":
                continue
            other = target.split(".")[1]
            if other != ours and other not in ALLOWED[ours]:
                wrong.append(f"{name} imports {target}")
    assert looked == len(trees()) and not wrong, "\n".join(wrong)


def test_opening_an_artifact_imports_neither_steps_nor_engine() -> None:
    names = {name for name in trees() if name.startswith("artifact/") and Path(name).stem not in ("save", "__init__")}
    queue, seen = sorted(names), set(names)
    while queue:
        name = queue.pop()
        for target in imports(trees()[name], name):
            parts = target.split(".")[1:]
            options = ["/".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
            files = [f for option in options for f in (f"{option}.py", f"{option}/__init__.py") if f in trees()]
            if files and files[0] not in seen:
                seen.add(files[0])
                queue.append(files[0])
    wrong = sorted(name for name in seen - {"engine/disk.py"} if package(name) in ("steps", "engine", "api"))
    assert len(names) >= 3 and len(seen) > len(names) and not wrong, (len(seen), wrong)


def test_library_code_never_prints_or_exits() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        if package(name) == "cli":
            continue
        looked += 1
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "print",
                "exit",
                "sys.exit",
                "quit",
                "breakpoint",
            ):
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
    assert looked >= 15 and not wrong, wrong


def test_no_pickles() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        looked += 1
        for node in ast.walk(tree):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(module.partition(".")[0] in PICKLES for module in modules):
                wrong.append(f"{name}:{node.lineno}")  # type: ignore[attr-defined]
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "torch.save", "eval", "exec"):
                wrong.append(f"{name}:{node.lineno} {ast.unparse(node.func)}")
            if isinstance(node, ast.keyword) and node.arg in ("allow_pickle", "trust_remote_code"):
                assert ast.unparse(node.value) == "False", f"{name}: {node.arg}"
    assert looked == len(trees()) and not wrong, wrong


def test_exceptions_are_caught_by_name() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        looked += 1
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                caught = "" if node.type is None else ast.unparse(node.type)
                if caught in ("", "Exception", "BaseException") and name != "cli/entry.py":
                    wrong.append(f"{name}:{node.lineno} except {caught}")
    assert looked == len(trees()) and not wrong, wrong


def test_nothing_is_left_open() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        looked += 1
        text = (SOURCE / name).read_text(encoding="utf-8")
        wrong += [f"{name}: {word}" for word in ("TO" + "DO", "FIX" + "ME", "NotImplementedError") if word in text]
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
                wrong.append(f"{name}:{node.lineno} star import")
            if isinstance(node, (ast.Global, ast.Assert)):
                wrong.append(f"{name}:{node.lineno} {type(node).__name__.lower()}")
    assert looked == len(trees()) and not wrong, wrong


def test_files_and_functions_are_short() -> None:
    looked, wrong = 0, []
    for name, tree in trees().items():
        looked += 1
        lines = (SOURCE / name).read_text(encoding="utf-8").count("\n")
        if lines > MAX_FILE_LINES:
            wrong.append(f"{name} has {lines} lines")
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    wrong.append(f"{name}: {node.name} has {length} lines")
    assert looked == len(trees()) and not wrong, wrong


def test_every_module_says_what_it_is() -> None:
    silent = [name for name, tree in trees().items() if not ast.get_docstring(tree)]
    assert not silent, silent


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import bitbrush.steps", ["bitbrush.steps"]),
        ("from bitbrush import steps", ["bitbrush.steps"]),
        ("from ..steps import pack", ["bitbrush.steps.pack"]),
        ("from . import codec", ["bitbrush.numbers.codec"]),
        ("def f():\n    from bitbrush.steps.pack import x", ["bitbrush.steps.pack.x"]),
        ("if TYPE_CHECKING:\n    import bitbrush.steps", []),
        ("import torch", []),
    ],
)
def test_the_reader_of_imports(source: str, expected: list[str]) -> None:
    assert list(imports(ast.parse(source), "numbers/grid.py")) == expected
