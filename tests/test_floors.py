"""The house has floors: a file imports only from its own folder and from lower floors, and nothing imports in a circle.

A unit is a folder of megakrause/ or a file directly in it. Imports are read from the source, inside functions and under
`if TYPE_CHECKING` too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

FLOORS = {
    "errors": 0, "table": 0, "config": 0, "batch": 0, "ops": 0,
    "data": 1, "parallel": 1,
    "models": 2,
    "checkpoint": 3, "hf": 3,
    "training": 4, "plan": 4,
    "analyze": 5, "bench": 5,
}  # fmt: skip
TOP = 5  # the floor of every file directly in megakrause/ that the table does not name

# Pairs on one floor of which the first may import the second. The plain files of a floor lie in one folder.
NEIGHBOURS = {("config", "errors"), ("hf", "checkpoint")}

ONLY_HERE = {"deepspeed": {f"training/{name}.py" for name in ("engine", "engine_state", "extensions", "pipeline")}}


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: Path, path: Path, modules: set[str]) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a file imports; a name that is a module of the package counts as one."""
    here = module_name(package, path).split(".")
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                # One dot is the folder of the file, which for an __init__.py is the module itself.
                folder = here[: len(here) - node.level + (path.name == "__init__.py")]
                base = ".".join([*folder, *filter(None, [node.module])])
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield node.lineno, name if name in modules else base


def unit(package: Path, module: str) -> str:
    """`megakrause.ops.norm` -> `ops`; the package itself, and thus its __init__.py, -> `__init__`."""
    return module.removeprefix(package.name).strip(".").split(".")[0] or "__init__"


def is_allowed(package: Path, importer: str, imported: str) -> bool:
    floor_from, floor_to = FLOORS.get(importer, TOP), FLOORS.get(imported, TOP)
    if importer == imported or (importer, imported) in NEIGHBOURS:
        return True
    if importer == "ops":
        return False
    if floor_from != floor_to:
        return floor_to < floor_from
    # Files directly in megakrause/ share a folder; on the top floor they also hand out the work of its folders.
    plain_from, plain_to = not (package / importer).is_dir(), not (package / imported).is_dir()
    return plain_from and (plain_to or floor_from == TOP)


def circle(edges: dict[str, set[str]]) -> list[str]:
    """The first import circle found, as the modules along it, or an empty list."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for following in sorted(edges.get(module, ())):
            if found := walk(following, [*path, module]):
                return found
        done.add(module)
        return []

    return next(filter(None, (walk(module, []) for module in sorted(edges))), [])


def violations(package: Path) -> list[str]:
    files = sorted(package.rglob("*.py"))
    modules = {module_name(package, path) for path in files}
    edges: dict[str, set[str]] = {}
    found = [
        f"{folder.name}/: unknown folder; give it a floor in the table of tests/test_floors.py"
        for folder in sorted(package.iterdir())
        if folder.is_dir() and folder.name not in FLOORS and any(folder.rglob("*.py"))
    ]
    for path in files:
        here, where = module_name(package, path), path.relative_to(package).as_posix()
        for line, name in imports(package, path, modules):
            root = name.split(".")[0]
            if where not in ONLY_HERE.get(root, {where}):
                found.append(f"{where}:{line}: imports {root}, which only {', '.join(sorted(ONLY_HERE[root]))} may")
            if root != package.name:
                continue
            if not is_allowed(package, unit(package, here), unit(package, name)):
                found.append(f"{where}:{line}: imports {name}, which is not on a lower floor")
            if name != here:
                edges.setdefault(here, set()).add(name)
    if loop := circle(edges):
        found.append("circle: " + " -> ".join(loop))
    return found


def test_the_package_keeps_to_its_floors() -> None:
    package = Path(__file__).resolve().parent.parent / "megakrause"
    found = violations(package)
    assert not found, "\n" + "\n".join(found)


# The checker itself, on small made-up houses.


def house(root: Path, files: dict[str, str]) -> list[str]:
    for name, text in files.items():
        path = root / "megakrause" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return violations(root / "megakrause")


def test_a_sound_house_has_no_violations(tmp_path: Path) -> None:
    sound = {
        "__init__.py": "from megakrause.ops import attend\n",
        "errors.py": "import torch\n",
        "config.py": "from megakrause.errors import UserError\n",
        "cli.py": "from megakrause import bench, train\nfrom . import config\n",
        "train.py": "import megakrause.training.engine\n",
        "ops/__init__.py": "from megakrause.ops.attention import attend\nfrom .norm import norm\n",
        "ops/attention.py": "from . import norm\n",
        "ops/norm.py": "",
        "data/loader.py": "from ..batch import TokenBatch\n",
        "batch.py": "",
        "models/lm.py": "from megakrause.parallel.linear import Linear\nfrom megakrause.ops import attend\n",
        "parallel/linear.py": "from megakrause.ops import attend\n",
        "checkpoint/save.py": "",
        "hf/export.py": "from megakrause.checkpoint import save\n",
        "training/engine.py": "import deepspeed.comm\nfrom megakrause.checkpoint.save import save\n",
        "bench/__init__.py": "from megakrause.training import engine\n",
    }
    assert house(tmp_path, sound) == []


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("ops/a.py", "from megakrause.errors import UserError\n", 1),
        ("ops/a.py", "\nfrom ..config import RunConfig\n", 2),
        ("config.py", "from megakrause.ops import Grid\n", 1),
        ("batch.py", "import megakrause.data.shards\n", 1),
        ("data/a.py", "from megakrause.parallel import mesh\n", 1),
        ("parallel/a.py", "def f():\n    from megakrause.data import shards\n", 2),
        ("models/a.py", "if TYPE_CHECKING:\n    from megakrause.training.engine import Engine\n", 2),
        ("models/a.py", "from megakrause import krause_attention\n", 1),
        ("models/a/b.py", "from ...cli import main\n", 1),
        ("checkpoint/a.py", "from megakrause.hf import names\n", 1),
        ("training/a.py", "from .. import train\n", 1),
        ("bench/a.py", "from megakrause.analyze import plots\n", 1),
        ("bench/a.py", "from megakrause import cli\n", 1),
        ("training/loop.py", "import deepspeed\n", 1),
        ("bench/a.py", "def f():\n    from deepspeed import comm\n", 2),
    ],
)
def test_a_violation_is_found(tmp_path: Path, name: str, text: str, line: int) -> None:
    base = dict.fromkeys(["train.py", "cli.py", "ops/grid.py", "hf/names.py", "parallel/mesh.py", "data/shards.py"], "")
    (found,) = house(tmp_path, {**base, name: text})
    assert found.startswith(f"{name}:{line}: imports ")


def test_an_unknown_folder_is_found(tmp_path: Path) -> None:
    (found,) = house(tmp_path, {"helpers/tricks.py": "", "ops/norm.py": ""})
    assert found.startswith("helpers/: unknown folder")


def test_a_circle_within_a_folder_is_found(tmp_path: Path) -> None:
    files = {
        "data/a.py": "from megakrause.data.b import x\n",
        "data/b.py": "def f():\n    from . import c\n",
        "data/c.py": "from .a import y\n",
    }
    (found,) = house(tmp_path, files)
    assert found.replace("megakrause.data.", "") == "circle: a -> b -> c -> a"
