"""导入只许向下；主干只要 torch；--help 不导入 torch。"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

APP = Path(__file__).parents[1] / "app"
CORE = "app.models.transformer"

# 模块 -> 层。没有列出的模块会让测试失败：新文件必须先想清楚自己在哪一层。
LEVELS = {
    **dict.fromkeys(("pattern", "validate"), -3),
    "atoms": -2,
    **dict.fromkeys(("pattern_text", "pattern_checks"), -1),
    **dict.fromkeys(("positions", "store"), -2),
    "slots": -1,
    **dict.fromkeys(("config", "groups"), 0),
    **dict.fromkeys(("limits", "step"), 1),
    "cache": 2,
    **dict.fromkeys(("masking", "rope", "linear", "norm"), 1),
    **dict.fromkeys(("tiles", "flex", "loss"), 2),
    **dict.fromkeys(("backends", "blocked"), 3),
    "plan": 4,
    **dict.fromkeys(("attend", "context"), 5),
    **dict.fromkeys(("attention", "mlp", "embeddings", "checks"), 6),
    "block": 7,
    "init": 8,
    "weights": 9,
    "model": 10,
    "factory": 11,
    "__init__": 12,
}
PACKAGES = {
    "app.data": 1,
    CORE: 1,
    "app.generation": 2,
    "app.training": 3,
    "app.evaluation": 3,
    "app.interop": 4,
    "app.viz": 4,
    "app.cli": 5,
}


def imports(path: Path, module: str) -> list[tuple[str, bool]]:
    """(被导入的模块, 是否在模块顶层)。TYPE_CHECKING 里的不算。"""
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                for _ in range(node.level - 1):
                    package = package.rpartition(".")[0]
                base = f"{package}.{base}".rstrip(".")
            found.append((base, top))
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


def modules() -> list[tuple[Path, str]]:
    result = []
    for path in sorted(APP.rglob("*.py")):
        parts = path.relative_to(APP.parent).with_suffix("").parts
        result.append((path, ".".join(p for p in parts if p != "__init__")))
    return result


def package_of(module: str) -> str | None:
    return next((p for p in PACKAGES if module == p or module.startswith(p + ".")), None)


def test_packages_import_downwards() -> None:
    for path, module in modules():
        mine = package_of(module)
        if mine is None:
            continue
        for target, _ in imports(path, module):
            other = package_of(target)
            if other is not None and other != mine:
                assert PACKAGES[other] < PACKAGES[mine] or (mine, other) == ("app.data", CORE), (
                    f"{module} imports {target}, which is not below it"
                )


def test_backbone_modules_import_downwards() -> None:
    for path, module in modules():
        if not module.startswith(CORE):
            continue
        mine = module[len(CORE) + 1 :] or "__init__"
        assert mine in LEVELS, f"{module} has no level: add it to LEVELS"
        for target, top in imports(path, module):
            if not target.startswith(CORE) or not top:
                continue
            other = target[len(CORE) + 1 :]
            assert LEVELS[other] < LEVELS[mine], f"{module} imports {target}, not below it"


def test_the_backbone_imports_torch_alone() -> None:
    """第三方只有 torch（及它自带的 typing_extensions）；safetensors 只在读写文件的函数里。"""
    for path, module in modules():
        if not module.startswith(CORE):
            continue
        for target, top in imports(path, module):
            root = target.split(".")[0]
            known = root in sys.stdlib_module_names or root in ("torch", "typing_extensions")
            allowed = not top and root == "safetensors"
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


@pytest.mark.parametrize(
    "command", ["", "prepare", "train", "sweep", "compare", "generate", "plan", "show", "verify"]
)
def test_help_answers_without_torch(command: str) -> None:
    done = run(
        "import sys; from app.cli.main import main\n"
        "try: main(" + repr([command, "--help"] if command else ["--help"]) + ")\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "heavy = {'torch', 'matplotlib', 'tokenizers', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
