"""Guards of the layout: links, packages, the direction of imports, and what the house rules forbid everywhere."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dsengine

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("kernels", "quant", "specdec")
MAX_FILE_LINES = 450
MAX_FUNCTION_LINES = 60

BASE = frozenset({"config", "kernels", "quant"})
MODEL = BASE | {"model", "parallel"}
ENGINE = MODEL | {"plan", "specdec", "memory", "engine"}
LLM = ENGINE | {"llm", "tokenizer"}
SERVER = LLM | {"server"}

# Which rooms each room may import. A new top-level module of dsengine must be given its place here.
MAY_IMPORT: dict[str, frozenset[str]] = {
    "config": frozenset(),
    "kernels": frozenset({"kernels"}),
    "quant": BASE,
    "memory": frozenset({"memory"}),
    "parallel": frozenset({"config", "parallel"}),
    "model": MODEL,
    "specdec": MODEL | {"specdec"},
    "plan": frozenset({"config", "model", "plan"}),
    "engine": ENGINE,
    "tokenizer": frozenset({"config", "tokenizer"}),
    "llm": LLM,
    "server": SERVER,
    "demo": SERVER | {"demo", "flags"},
    "progress": frozenset(),
    "simulate": ENGINE | {"simulate"},
    "flags": frozenset(),
    "cli": SERVER | {"cli", "demo", "flags", "plan", "simulate"},
    "": LLM | {"cli"},
}
# Top-level modules that belong to a room by another name.
ROOM_OF_MODULE = {
    "__init__": "",
    "__main__": "",
    "chat_client": "cli",
    "cli_flags": "flags",
    "doctor": "cli",
    "kv_drift": "cli",
    "outputs": "llm",
    "async_engine": "llm",
}
# `demo` holds only files that others find by their path; `progress` is a leaf that draws bars.
LEAVES = frozenset({"demo", "progress"})
# Plain types that several rooms speak of, whatever room they live in.
SHARED_TYPES = frozenset({"dsengine.engine.sampling_params"})

FORBIDDEN_MODULES = frozenset({"pickle", "cPickle", "cloudpickle", "dill", "marshal", "shelve", "transformers"})
FORBIDDEN_CALLS = frozenset({"eval", "exec"})


def python_files(*folders: str) -> list[Path]:
    return sorted(
        path for folder in folders for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts
    )


def sources() -> list[Path]:
    """Every source file of the package, once, by its real place."""
    return sorted(
        {path.resolve() for path in python_files("dsengine", *[name for name in LINKED if (ROOT / name).exists()])}
    )


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def module_of(path: Path) -> str:
    """Dotted name as Python imports it: kernels/x/api.py is dsengine.kernels.x.api."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] in LINKED:
        parts = ("dsengine", *parts)
    return ".".join(parts)


def room_of(module: str) -> str:
    parts = module.split(".")
    if len(parts) == 1 or parts[1] == "__version__":
        return ""
    if parts[1] in dsengine.__all__:
        return room_of(dsengine._HOMES[parts[1]])
    name = parts[1]
    if name in ROOM_OF_MODULE:
        return ROOM_OF_MODULE[name]
    for prefix in ("cli_", "llm_"):
        if name.startswith(prefix):
            return prefix[:-1]
    return name


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """(absolute module or module.attribute, line) of each import of a file, wherever it stands."""
    package = module_of(path).split(".")[:-1]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from dsengine import llm` may name a module as well as an attribute.
            for alias in node.names:
                yield (f"{module}.{alias.name}" if module == "dsengine" else module), node.lineno


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def test_links_resolve_to_the_rooms_at_the_top() -> None:
    assert (ROOT / "kernels").is_dir() and (ROOT / "quant").is_dir()
    for name in LINKED:
        if any((ROOT / name).glob("**/*.py")):
            link = ROOT / "dsengine" / name
            assert link.is_symlink(), f"{link} must be a symbolic link"
            assert link.readlink() == Path("..") / name
            assert link.resolve() == ROOT / name


def test_no_package_markers_where_they_shadow_others() -> None:
    found = [path for folder in (*LINKED, "tests", "benchmarks") for path in (ROOT / folder).rglob("__init__.py")]
    assert not found, f"these shadow other packages: {found}"
    assert not (ROOT / "conftest.py").exists(), "a root conftest.py puts kernels/ on the import path"


def test_packages_of_dsengine_are_packages() -> None:
    for folder in (ROOT / "dsengine").iterdir():
        if folder.is_dir() and not folder.is_symlink() and any(folder.glob("*.py")):
            assert (folder / "__init__.py").exists(), f"{folder} holds modules but no __init__.py"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    room = room_of(module_of(path))
    assert room in MAY_IMPORT, f"{room!r} has no place in MAY_IMPORT; decide what it may import"
    allowed = MAY_IMPORT[room] | {room}
    for name, line in imports(path):
        if name in SHARED_TYPES or name.split(".")[0] != "dsengine":
            continue
        target = room_of(name)
        if target == "":  # the package itself imports nothing until it is asked
            continue
        assert target in allowed | LEAVES and (target not in LEAVES or room not in ("kernels", "memory", "quant")), (
            f"{where(path, line)}: {room or 'dsengine'} may not import {name}"
        )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_dangerous_is_used(path: Path) -> None:
    for name, line in imports(path):
        assert name.split(".")[0] not in FORBIDDEN_MODULES, f"{where(path, line)}: imports {name}"
    for node in ast.walk(tree(path)):
        if not isinstance(node, ast.Call):
            continue
        if isinstance(node.func, ast.Name):
            assert node.func.id not in FORBIDDEN_CALLS, f"{where(path, node.lineno)}: calls {node.func.id}()"
        if isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            called = f"{node.func.value.id}.{node.func.attr}"
            assert called not in ("os.system", "os.popen"), f"{where(path, node.lineno)}: {called}()"
            is_safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords)
            assert called != "torch.load" or is_safe, (
                f"{where(path, node.lineno)}: torch.load without weights_only=True"
            )
        for keyword in node.keywords:
            is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
            assert not (keyword.arg in ("shell", "allow_pickle", "trust_remote_code") and is_true), (
                f"{where(path, node.lineno)}: {keyword.arg}=True"
            )


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_importing_has_no_side_effects(path: Path) -> None:
    """No environment variable, CUDA or Triton driver is touched at import, and nothing is imported by star."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ImportFrom):
            assert all(alias.name != "*" for alias in node.names), f"{where(path, node.lineno)}: star import"
        assert not isinstance(node, ast.Global), f"{where(path, node.lineno)}: global statement"
    for node in import_time_nodes(tree(path)):
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            assert not text.startswith(("os.environ", "os.getenv", "torch.cuda", "triton.runtime.driver")), (
                f"{where(path, node.lineno)}: {text} at import"
            )


def import_time_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes that run when the module is imported: all but the bodies of functions and annotations."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            for part in (*child.decorator_list, *child.args.defaults, *(d for d in child.args.kw_defaults if d)):
                yield part
                yield from ast.walk(part)
        elif isinstance(child, ast.AnnAssign):
            if child.value is not None:
                yield from ast.walk(child.value)
        elif not isinstance(child, ast.Lambda):
            yield child
            yield from import_time_nodes(child)


def test_every_operation_has_an_api_and_a_reference() -> None:
    operations = [folder for folder in (ROOT / "kernels").iterdir() if folder.is_dir() and folder.name != "__pycache__"]
    assert operations
    for folder in operations:
        for name in ("api.py", "ref.py"):
            assert (folder / name).is_file(), f"{folder.relative_to(ROOT)} has no {name}"


@pytest.mark.parametrize(
    "path", sources() + python_files("tests", "benchmarks"), ids=lambda path: str(path.relative_to(ROOT))
)
def test_files_and_functions_are_short_and_files_say_why_they_exist(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_FILE_LINES, f"{path.relative_to(ROOT)} has {lines} lines; look for the missing noun"
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
            length = node.end_lineno - code_start(node) + 1
            assert length <= MAX_FUNCTION_LINES, f"{where(path, node.lineno)}: {node.name} has {length} lines"
    if ast.get_docstring(tree(path)) is None:
        assert not tree(path).body, f"{path.relative_to(ROOT)} has no module docstring"


def code_start(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """First line after the docstring: explaining oneself must not count against a function's length."""
    body = function.body
    has_docstring = ast.get_docstring(function) is not None
    return body[1].lineno if has_docstring and len(body) > 1 else function.lineno


def test_test_files_have_unique_names() -> None:
    """Without packages under tests/, pytest imports test files by their base names."""
    fixed = ("conftest.py", "__main__.py")
    names = Counter(path.name for path in python_files("tests") if path.name not in fixed)
    assert not [name for name, count in names.items() if count > 1]


def test_checkers_see_a_planted_offence(tmp_path: Path) -> None:
    """The guards above pass vacuously if they cannot see; plant one offence of each kind."""
    module = ast.parse("import os\nx: int = os.environ['A']\ndef f():\n    return os.environ['B']\n")
    seen = [ast.unparse(node) for node in import_time_nodes(module) if isinstance(node, ast.Attribute)]
    assert seen == ["os.environ"]
    assert room_of("dsengine.kernels.mla_decode.api") == "kernels"
    assert room_of("dsengine.LLM") == "llm" and room_of("dsengine.SamplingParams") == "engine"
    assert room_of("dsengine.cli_chat") == "cli" and room_of("dsengine.doctor") == "cli"
    assert "server" not in MAY_IMPORT["engine"] and "engine" not in MAY_IMPORT["memory"]
    assert "transformers" in FORBIDDEN_MODULES
    assert "dsengine.config" in {name for name, _ in imports(ROOT / "dsengine" / "cli.py")}
