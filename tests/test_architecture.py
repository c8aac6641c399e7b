"""The house stands as docs/design.md says: layers, no Ray and no network in the engine, small rooms."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    *("generate_large", "engine.parity", "engine.train", "engine.sample", "engine.export", "engine.export_features"),
    *("engine.extract_features", "engine.phantom_slides", "engine.phantom_cohort", "engine.prepare"),
    *("engine.superres", "engine.quality"),
)
MIL_COMMANDS = ("mil.train", "mil.predict", "mil.compare", "mil.heatmap")
CHOOSES_ACTORS = ("engine.extract_features", "engine.prepare", "engine.superres", "engine.train", "mil.train")
"""Commands that run as modules; they may name `actors`, only inside functions."""
FLOORS = (
    # An import goes to the same floor or down. A name stands for a module or for all of a package.
    "errors magnification config schedule noise resize blend conditioning tiles strips state arguments "
    "interruption writers workers ray_address inversion_config devices consistency",
    "lock latents objects lease storage object_storage bag_plan",
    "bags prepared_facts",
    "bag_writer prepared prepared_writer",
    "canvas canvas_view image exports report reference model slides",
    "predict pointwise guidance decode window features summaries inversion enlarged",
    "level_step",
    "sampler",
    "environment estimate conditions pilot progress outputs run snapshot past redo replay training patches outcome "
    "replay_joint replay_networks replay_ties "
    "extraction extraction_config extraction_blocks extraction_encoders "
    "extraction_outputs extraction_report extraction_local slide_crew slide_run slide_outputs slide_report "
    "preparation preparation_config preparation_plan preparation_blocks preparation_encoders preparation_outputs "
    "preparation_report published_files evaluation",
    "parity train sample export export_features extract_features prepare phantom_slides phantom_cohort superres "
    "quality",
)
MIL_FLOORS = (
    "errors metrics calibration page",
    "tasks featurefiles models overlay plots attended slide_fields",
    "cohort dataset",
    "splits training",
    "config classifier baseline",
    "saved",
    "folds",
    "results",
    "comparison report",
    "study",
    "train predict compare heatmap",
)
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


def floor_of(module: str) -> int | None:
    """Return the floor of a module of engine or mil."""
    package, name = module.split(".")[:2]
    floors = FLOORS if package == "engine" else MIL_FLOORS
    return next((i for i, names in enumerate(floors) if name in names.split()), None)


def banned_in(module: str) -> tuple[str, ...]:
    """Return the packages that a module may not import."""
    if module.startswith("engine"):
        return ("ray", "actors", "mil")
    if module.startswith("mil"):
        return ("ray", "actors")
    return ("mil",) if module.startswith("actors") else ()


def faults(found: dict[str, str]) -> list[str]:
    """Return every breach of the rules, as a sentence."""
    said = []
    for module, source in found.items():
        used = imports(source)
        own = {name for name in used if name in found}
        said += [f"{module} imports the command {name}" for name in own if name in COMMANDS + MIL_COMMANDS]
        foreign = {n for n in used if n.split(".")[0] in banned_in(module)}
        if module in CHOOSES_ACTORS:
            foreign -= {n for n in foreign - imported_at_once(source) if n.split(".")[0] == "actors"}
        said += [f"{module} imports {n}" for n in foreign]
        package = module.split(".")[0]
        if module == package or package not in ("engine", "mil"):
            continue
        here = floor_of(module)
        if here is None:
            said.append(f"{module} has no floor; give it one in this test and in docs/design.md")
            continue
        above = [n for n in own if n.startswith(package + ".") and (floor_of(n) or 0) > here]
        said += [f"{module} imports {name}, which lies above it" for name in above]
    return said


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
        ("engine.tiles", "import ray", "engine.tiles imports ray"),
        ("engine.tiles", "def f():\n    from actors.pool import DenoiserPool", "imports actors.pool"),
        ("engine.tiles", "from engine.sampler import sample_large", "lies above it"),
        ("engine.tiles", "from engine import run", "lies above it"),
        ("engine.extract_features", "from actors.cluster import connect", "imports actors.cluster"),
        ("engine.extract_features", "def f():\n    import ray", "imports ray"),
        ("engine.superres", "from actors.crew import work_on_ray", "imports actors.crew"),
        ("engine.extraction", "def f():\n    from actors.cluster import connect", "imports actors.cluster"),
        ("actors.pool", "import generate_large", "imports the command generate_large"),
        ("engine.helpers", "", "has no floor"),
        ("engine.tiles", "from mil.metrics import auroc", "imports mil"),
        ("mil.folds", "from actors.folds import do_jobs", "mil.folds imports actors"),
        ("mil.train", "import ray", "mil.train imports ray"),
        ("mil.dataset", "from mil.study import run", "lies above it"),
        ("mil.study", "from mil.train import main", "imports the command mil.train"),
        ("actors.folds", "from mil.folds import do_fold", "actors.folds imports mil"),
    ],
)
def test_layers_can_fail(module: str, source: str, fault: str) -> None:
    assert any(fault in said for said in faults({**modules(), module: source}))


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
