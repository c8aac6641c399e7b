"""The house stands as docs/explanation/architecture.md says: rooms, layers, no Ray and no network in the engine."""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    *("engine.__main__", "generate_large", "engine.extract_features", "engine.export", "engine.export_features"),
    *("engine.sample", "engine.superres", "engine.train", "engine.prepare", "engine.parity", "engine.quality"),
    *("engine.doctor", "engine.view", "engine.generate_cohort"),
    *("engine.phantom_slides", "engine.phantom_cohort", "engine.phantom_captions"),
    *("mil.train", "mil.predict", "mil.compare", "mil.heatmap", "mil.augment", "mil.probe"),
}
"""What users type. They import anything, actors too; nobody imports them."""
OUTSIDE = ("engine._command", "engine._backends", "engine.api")
"""What commands and the Python API share. It imports rooms; rooms do not import it, and Ray's side of it only inside
functions of `engine._backends`."""
LAYERS = {
    "engine": "",
    "engine.core": "",
    "engine.model": "core",
    "engine.slides": "core",
    "engine.images": "core",
    "engine.canvas": "core",
    "engine.sampling": "core model canvas",
    "engine.conditions": "core model slides canvas sampling",
    "engine.generation": "core model images canvas sampling conditions",
    "engine.parity_checks": "core model canvas sampling conditions",
    "engine.installation": "core model",
    "engine.pipeline": "core slides",
    "engine.features": "core model slides pipeline",
    "engine.datasets": "core model slides pipeline",
    "engine.training": "core model slides.phantom sampling.schedule conditions.reference datasets features.bag_reader",
    "engine.evaluation": "core model slides images sampling conditions generation pipeline features datasets",
    "engine.cohort": "core model slides images sampling conditions generation pipeline features evaluation",
    "engine.viewer": "core images slides canvas generation features.bag_reader",
    "actors": "engine.core engine.model engine.sampling engine.generation engine.pipeline engine.training "
    "engine.cohort",
    "mil": "engine.core",
    "mil.errors": "engine.core",
    "mil.models": "",
    "mil.data": "mil.errors engine.core engine.slides.slide engine.slides.boundary engine.features.bag_reader",
    "mil.fit": "mil.errors mil.models mil.data engine.core engine.training.optimisation engine.training.settings",
    "mil.folds": "mil.errors mil.data mil.fit engine.core",
    "mil.report": "mil.errors mil.data mil.fit mil.folds engine.core",
    "mil.study": "mil.errors mil.data mil.fit mil.folds mil.report engine.core",
    "mil.augmentation": "mil.errors mil.data mil.fit mil.folds mil.report mil.study engine.core engine.model.weights",
    "mil.tiles": "mil.errors mil.data mil.fit mil.folds mil.report engine.core engine.model engine.features",
}
"""Each room and what it may import besides itself and its package's __init__: rooms of `engine` by their short names,
others in full. A name with a second dot is one module or sub-room of another room."""
ROOM_FILES = 12
"""Modules that lie directly in a room, at most."""
MAX_FILE, MAX_FUNCTION = 400, 60

IMPORT_ALL = """
import importlib, pkgutil, socket, sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {banned}:
            raise ImportError("{package} must not import " + name)

def refuse(*_):
    raise OSError("no network here")

sys.meta_path.insert(0, NoRay())
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import {package}
{extra}
for module in pkgutil.walk_packages({package}.__path__, "{package}."):
    importlib.import_module(module.name)
import torch
assert not torch.cuda.is_initialized()
"""


def modules() -> dict[str, str]:
    """Return the source of every module, by dotted name."""
    packages = (path for name in ("engine", "actors", "mil") for path in (ROOT / name).rglob("*.py"))
    files = [ROOT / "generate_large.py", *packages]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f.read_text() for f in files}


@cache  # the same three hundred modules are looked at once for every rule that can be broken
def imports(source: str) -> frozenset[str]:
    """Return the dotted names a module imports, inside functions too."""
    return frozenset(_imports(ast.parse(source)))


def _imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "absolute imports only"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@cache
def imported_at_once(source: str) -> frozenset[str]:
    """Return the dotted names that are imported when a module is, so not those inside its functions."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return frozenset(_imports(tree))


def banned_in(module: str) -> tuple[str, ...]:
    """Return the packages that no module of a package may import at once."""
    return ("ray", "actors", "mil") if module.startswith("engine") else ("ray", "actors")


def room_of(module: str) -> str | None:
    """Return the room a module lies in; None for a command, and for what has no room."""
    if module in COMMANDS or _outside(module):
        return None
    names = module.split(".")
    room = names[0] if names[0] == "actors" else ".".join(names[:2])
    return room if room in LAYERS else None


def _outside(module: str) -> bool:
    return any(module == name or module.startswith(name + ".") for name in OUTSIDE)


def allowed(room: str, name: str) -> bool:
    """Say whether a room may import a module of ours."""
    package = room.split(".")[0]
    if name in (package, room) or name.startswith(room + "."):
        return True
    full = [w if w.split(".")[0] in ("engine", "mil") else f"engine.{w}" for w in LAYERS[room].split()]
    return any(name == other or name.startswith(other + ".") for other in full)


def faults(found: dict[str, str]) -> list[str]:
    """Return every breach of the rules, as a sentence."""
    said = []
    for module, source in found.items():
        used = imports(source)
        own = {name for name in used if name in found}
        said += [f"{module} imports the command {name}" for name in own if name in COMMANDS]
        said += [f"{module} imports ray" for n in used if n.split(".")[0] == "ray" and not module.startswith("actors")]
        if module in COMMANDS or _outside(module):
            named = {n for n in used if n.split(".")[0] == "actors"}
            at_once = {n for n in imported_at_once(source) if n.split(".")[0] == "actors"}
            said += [f"{module} imports {n} before Ray is wanted" for n in at_once]
            if module.startswith("engine") and not module.startswith("engine._backends."):
                said += [f"{module} imports {n}; engine._backends does that" for n in named]
        elif (room := room_of(module)) is None:
            said.append(f"{module} lies in no room; give it one in this test and in docs/explanation/architecture.md")
        else:
            said += [f"{room} may not import {name} ({module})" for name in own if not _covered(room, name, own)]
    return said


def _covered(room: str, name: str, own: set[str]) -> bool:
    """Say whether an import is allowed; a package counts only where nothing inside it is named beside it."""
    return allowed(room, name) or any(other.startswith(name + ".") for other in own)


def circles(found: dict[str, str]) -> list[str]:
    """Return modules that import themselves through others."""
    graph = {m: {n for n in imports(s) if n in found and n != m} for m, s in found.items()}
    # A package's __init__ is loaded for each of its modules anyway.
    graph = {m: {n for n in used if not m.startswith(n + ".")} for m, used in graph.items()}
    reach = {m: set(used) for m, used in graph.items()}
    for _ in graph:
        grown = {m: used | {x for n in used for x in reach[n]} for m, used in reach.items()}
        if grown == reach:
            break
        reach = grown
    return sorted(m for m, used in reach.items() if m in used)


@pytest.mark.parametrize("package", ["engine", "mil"])
def test_a_package_imports_without_ray_and_network(package: str) -> None:
    script = IMPORT_ALL.format(extra="", package=package, banned=banned_in(package))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("package", ["engine", "mil"])
def test_that_test_can_fail(package: str) -> None:
    script = IMPORT_ALL.format(extra="import actors.cluster", package=package, banned=banned_in(package))
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode
    assert f"{package} must not import actors" in done.stderr


def test_layers() -> None:
    assert faults(modules()) == []
    assert circles(modules()) == []


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("engine.sampling.plan", "import ray", "engine.sampling.plan imports ray"),
        ("engine.sampling.plan", "def f():\n    from actors.pool import DenoiserPool", "may not import actors.pool"),
        ("engine.sampling.plan", "from engine.generation.run import run", "may not import engine.generation.run"),
        ("engine.sampling.plan", "from engine.generation import run", "may not import engine.generation.run"),
        ("engine.features.blocks", "from engine.datasets.plan import SetPlan", "may not import engine.datasets.plan"),
        ("engine.training.tasks", "from engine.sampling.plan import Plan", "may not import engine.sampling.plan"),
        ("mil.train", "from actors.cluster import connect", "before Ray is wanted"),
        ("engine.extract_features", "def f():\n    import ray", "imports ray"),
        ("engine._command", "def f():\n    from actors.cluster import connect", "engine._backends does that"),
        ("engine.api.runs", "def f():\n    from actors.cluster import connect", "engine._backends does that"),
        ("engine._backends.slides", "from actors.cluster import connect", "before Ray is wanted"),
        ("engine.generation.run", "from engine.api.runs import Run", "may not import engine.api.runs"),
        ("engine.core.files", "from engine._command import finish", "may not import engine._command"),
        ("actors.pool", "import generate_large", "imports the command generate_large"),
        ("engine.helpers", "", "lies in no room"),
        ("engine.sampling.plan", "from mil.fit.metrics import auroc", "may not import mil.fit.metrics"),
        ("mil.folds.folds", "from actors.backend import do_jobs", "may not import actors.backend"),
        ("mil.data.dataset", "from mil.study import run", "may not import mil.study"),
        ("mil.data.dataset", "from engine.features.bag_writer import BagWriter", "may not import engine.features"),
        ("mil.study", "from mil.train import main", "imports the command mil.train"),
        ("actors.backend", "from mil.folds.folds import do_fold", "may not import mil.folds.folds"),
    ],
)
def test_layers_can_fail(module: str, source: str, fault: str) -> None:
    assert any(fault in said for said in faults({**modules(), module: source}))


def test_the_table_runs_one_way() -> None:
    """A room can be built when those that it names are; nothing waits for itself."""
    needs = {room: {r for r in LAYERS if r != room and allowed(room, r)} - {"engine", "mil"} for room in LAYERS}
    done = {"engine", "mil"}
    while ready := {room for room in LAYERS if room not in done and needs[room] <= done}:
        done |= ready
    assert done == set(LAYERS)


def test_circles_are_seen() -> None:
    found = {"engine.a": "from engine.b import x", "engine.b": "import engine.c", "engine.c": "from engine import a"}
    assert circles(found) == ["engine.a", "engine.b", "engine.c"]


def test_rooms_stay_small() -> None:
    too_long = []
    for module, source in modules().items():
        lines = source.count("\n")
        if lines >= MAX_FILE:
            too_long.append(f"{module}: {lines} lines")
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length >= MAX_FUNCTION:
                    too_long.append(f"{module}.{node.name}: {length} lines")
    assert too_long == []


def test_rooms_hold_few_modules() -> None:
    found = modules().keys() - COMMANDS
    found = {m for m in found if not (ROOT / m.replace(".", "/")).is_dir()}
    counts = Counter(module.rpartition(".")[0] for module in found if module.count(".") > 1)
    counts["actors"] = sum(module.startswith("actors.") for module in found)
    assert {room: count for room, count in counts.items() if count > ROOM_FILES} == {}
