"""导入只许向下，从不绕圈（函数里的、TYPE_CHECKING 里的都算）；主干只要 torch。"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

from app.cli.main import COMMANDS

APP = Path(__file__).parents[1] / "app"
CORE = "app.models.transformer"

# 从下往上。没有列出的房间会让测试失败：新房间必须先想清楚自己在哪一层。
FLOORS = {
    CORE: (
        "settings", "visibility", "config", "backends cache", "layers", "embeddings attention mlp",
        "experts", "block", "weights", "model", "factory", "__init__",
    ),
    "app": (
        "models", "common native", "data inspection", "viz", "distributed",
        "generation evaluation verification quantization", "adapters", "training",
        "planning equalities", "interop serving finetuning", "cli",
    ),
    "app.training": (
        "settings", "config", "optim", "saving machine", "objectives", "step watch ranks",
        "report whole_model opened", "engine references", "sharded", "split_model",
        "engines trainer", "describe", "run", "sweep",
    ),
    "app.cli": ("shared", "commands", "main", "__main__"),
}  # fmt: skip
MOST_FILES, MOST_LINES = 15, 415


def names(path: Path) -> str:
    parts = path.relative_to(APP.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


@cache
def files() -> dict[str, Path]:
    return {names(path): path for path in sorted(APP.rglob("*.py"))}


def targets(module: str) -> Iterator[tuple[str, bool]]:
    """(被导入的模块或名字, 是否在顶层)；哪里的导入都算。"""
    path = files()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            home = parts[: len(parts) - node.level + 1] if node.level else []
            base = ".".join([*home, *([node.module] if node.module else [])])
            yield from ((f"{base}.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


@cache
def graph() -> dict[str, set[str]]:
    """模块 -> 它导入的 app 的模块。从包里取公开的名字，就是导入那个包。"""
    found: dict[str, set[str]] = {module: set() for module in files()}
    for module in found:
        for target, _ in targets(module):
            whole = target if target in found else target.rpartition(".")[0]
            if whole in found and whole != module:
                found[module].add(whole)
    return found


def room(module: str, house: str) -> str | None:
    """module 在 house 里属于哪个房间；house 自己是 __init__，不在里面是 None。"""
    if module == house:
        return "__init__"
    if not module.startswith(house + "."):
        return None
    return module[len(house) + 1 :].split(".")[0]


def test_no_import_circle() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail("a circle of imports: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("house", FLOORS)
def test_rooms_import_downwards(house: str) -> None:
    floor = {name: i for i, names in enumerate(FLOORS[house]) for name in names.split()}
    for module, wanted in graph().items():
        mine = room(module, house)
        if mine is None or (mine == "__init__" and house != CORE):
            continue
        assert mine in floor or "*" in floor, f"{house}.{mine} is in no floor of FLOORS"
        for target in wanted:
            # 主干的 __init__ 是公开的名字，从外面看它，不从里面。
            other = room(target, house)
            if other in (None, mine) or (other == "__init__" and house != CORE):
                continue
            below = floor.get(other, floor.get("*", -1)) < floor.get(mine, floor.get("*", -1))
            assert below, f"{module} imports {target}, which is not below it"


@pytest.mark.parametrize("house", [CORE, "app", "app.training"])
def test_rooms_make_no_circle(house: str) -> None:
    """同一层的房间也不绕圈。"""
    rooms: dict[str, set[str]] = {}
    for module, wanted in graph().items():
        mine = room(module, house)
        if mine not in (None, "__init__"):
            found = {room(target, house) for target in wanted} - {None, "__init__", mine}
            rooms.setdefault(mine, set()).update(found)  # type: ignore[arg-type]
    try:
        TopologicalSorter(rooms).prepare()
    except CycleError as error:
        why = [
            f"{module} -> {target}"
            for a, b in pairwise(reversed(error.args[1]))
            for module, wanted in graph().items()
            for target in wanted
            if (room(module, house), room(target, house)) == (a, b)
        ]
        pytest.fail("a circle of rooms: " + "; ".join(why))


def test_rooms_are_small() -> None:
    for folder in {path.parent for path in files().values()}:
        held = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        assert len(held) <= MOST_FILES, f"{folder} has {len(held)}"
    for path in files().values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        assert lines <= MOST_LINES, f"{path} has {lines} lines"


def test_the_top_of_the_core_is_the_eight_files() -> None:
    top = {path.stem for path in (APP / "models" / "transformer").glob("*.py")}
    assert top == {
        "config", "model", "block", "attention", "mlp", "embeddings", "factory", "__init__",
    }  # fmt: skip


def test_the_backbone_imports_torch_alone() -> None:
    """第三方只有 torch（及它自带的 typing_extensions）；写文件、取 hub 的函数里另有两个库。"""
    for module in files():
        if not module.startswith(CORE):
            continue
        for target, top in targets(module):
            root = target.split(".")[0]
            known = root in sys.stdlib_module_names or root in ("torch", "typing_extensions")
            allowed = not top and root in ("safetensors", "huggingface_hub")
            assert known or allowed or target.startswith(CORE), f"{module} imports {target}"


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=APP.parent
    )


def test_importing_the_backbone_is_silent_and_pulls_in_nothing_else() -> None:
    done = run(
        "import sys, torch; before = set(sys.modules)\n"
        "from app.models.transformer import GPT2Model, create_gpt2_model, KVCache\n"
        "roots = {m.split('.')[0] for m in set(sys.modules) - before}\n"
        "foreign = roots - set(sys.stdlib_module_names) - {'app', 'torch', 'typing_extensions'}\n"
        "sys.exit(f'pulled in {foreign}' if foreign else 0)"
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_answers_without_torch(command: str) -> None:
    done = run(
        "import sys; from app.cli.main import main\n"
        "try: main(" + repr([command, "--help"] if command else ["--help"]) + ")\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'matplotlib', 'tokenizers', 'transformers', 'fastapi', 'uvicorn'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout


READING = [
    "config", "model", "block", "attention", "mlp", "embeddings", "visibility.positions",
    "visibility.rule", "backends.attend", "layers.norm", "layers.linear",
]  # fmt: skip


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, path in files().items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def test_the_forward_is_on_one_screen_and_the_way_to_it_short() -> None:
    found = dict(functions())
    forward = found[f"{CORE}.model.forward"]
    assert forward.end_lineno is not None and forward.end_lineno - forward.lineno + 1 < 60
    paths = [files()[f"{CORE}.{name}"] for name in READING]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) < 1300


def test_functions_take_few_parameters() -> None:
    """GPT2Model.forward 是约定，transformers 的 forward 是它的约定，旧名 generate 再留一个版本。"""
    allowed = {f"{CORE}.model.forward", "app.generation.generate.generate"}
    for name, node in functions():
        given = node.args
        names = [a.arg for a in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
        count = len([n for n in names if n not in ("self", "cls")])
        outside = name in allowed or ".transformers." in name
        assert count <= 8 or outside, f"{name} takes {count} parameters"
