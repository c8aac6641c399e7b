"""SIGINT and SIGTERM at random moments of every phase: one line, the documented code, nothing lost, nobody left.

The short form tries a moment of some phases; the long one (marked `faults`) twenty of each, with Ray too.
"""

import random
import signal
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from tests.faults import interrupted
from tests.faults.interrupted import Command, Running, Undisturbed, catches_signals, has_children, prints, writes
from tests.faults.ledger import Ledger
from tests.faults.scene import make_inputs
from tests.support.known_cohort import write_cohort, write_synthetic
from tests.support.known_run import tiny_config, write_autoencoder, write_data
from tests.support.known_study import QUICK
from tests.support.tiny_run import store_model
from tests.support.written_slides import tissue, write_tiff

MOMENTS = 20
LONG = pytest.mark.faults
ALONE = "--ray.enabled=false"
ON_CPU = ("--model.device=cpu", "--model.dtype=float32", "--model.threads=1")


def generate(folder: Path, *more: str) -> Command:
    phases = {"planning": writes("run.lock"), "sampling": writes("state.json"), "exporting": writes("*.ome.zarr")}
    return Command("generate_large", (*make_inputs(folder), *(more or (ALONE,))), "--output.folder=", phases)


def cohort(folder: Path, *more: str) -> Command:
    """Three pictures after stored vectors."""
    np.save(folder / "cells.npy", np.random.default_rng(0).normal(size=(16, 1, 1)).astype(np.float32))
    names = ("a", "b", "c")
    rows = [f"{name},{folder / 'cells.npy'},P{number}" for number, name in enumerate(names)]
    (folder / "rows.csv").write_text("\n".join(["name,embeddings,source_patient", *rows]) + "\n")
    argv = [
        *(f"--table={folder / 'rows.csv'}", f"--model.source={store_model(folder)}", *ON_CPU, *(more or (ALONE,))),
        *("--canvas.height=256", "--canvas.width=256", "--sampling.stride=250", "--sampling.weight=0"),
        *("--sampling.batch_size=2", "--decode.batch_size=1"),
    ]
    phases = {
        "start": writes("run.lock"),
        "first picture": writes("runs/*/state.json"),
        "others": writes("pictures/*.tiff"),
    }
    return Command("engine.generate_cohort", argv, "--out=", phases)


def extract(folder: Path, *more: str) -> Command:
    (folder / "slides").mkdir()
    picture = np.asarray(tissue(350, 550).crop((0, 0, 550, 60)).resize((3000, 300)))
    for name in ("a", "b"):
        write_tiff(folder / "slides" / f"{name}.tif", [picture], 0.5)
    argv = [
        *(f"--slides={folder / 'slides'}", f"--model.source={store_model(folder)}", *ON_CPU, *(more or (ALONE,))),
        *("--finder.method=everything", "--blocks.parents=1", "--features.batch=2", "--features.timestep=100"),
        "--features.blocks=[up.1]",
    ]
    phases = {
        "start": writes("run.lock"),
        "first slide": writes("features/*.blocks"),
        "second slide": writes("features/*.h5"),
    }
    return Command("engine.extract_features", argv, "--out=", phases)


def prepare(folder: Path) -> Command:
    (folder / "slides").mkdir()
    picture = np.asarray(tissue(350, 550).resize((2048, 1024)))
    for name in ("a", "b"):
        write_tiff(folder / "slides" / f"{name}.tif", [picture], 0.5)
    argv = [
        *(f"--slides={folder / 'slides'}", "--model.source=demo", *ON_CPU, ALONE, "--coarsest=10x"),
        *("--finder.method=everything", "--blocks.patches=16", "--blocks.batch=2"),
    ]
    phases = {"start": writes("run.lock"), "slides": prints("slides have something to do")}
    return Command("engine.prepare", argv, "--out=", phases)


def train(folder: Path) -> Command:
    write_data(folder / "data", write_autoencoder(folder / "vae"))
    content = yaml.safe_load(yaml.safe_dump(_plain(asdict(tiny_config(folder)))))
    (folder / "train.yaml").write_text(yaml.safe_dump(content))
    argv = [f"--config={folder / 'train.yaml'}", "--train.steps=12", "--output.folder={out}/model"]
    return Command("engine.train", argv, "--run=", {"start": writes("log.txt"), "steps": writes("log.jsonl")})


def train_mil(folder: Path) -> Command:
    known = write_cohort(folder, 32)
    argv = ["--task=hrd", f"--features={known.features}", f"--labels={known.labels}", *QUICK]
    phases = {"start": writes("config.yaml"), "first fold": writes("folds/*"), "second fold": writes("folds/*", 2)}
    return Command("mil.train", argv, "--output.folder=", phases)


def phantom_slides(folder: Path) -> Command:
    argv = ["--count=3", "--width=1024", "--height=1024"]
    return Command("engine.phantom_slides", argv, "--out=", {"first": writes("*"), "others": writes("*.tif*")})


def superres(folder: Path) -> Command:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)).save(folder / "low.png")
    argv = [
        *(str(folder / "low.png"), f"--model.source={store_model(folder)}", "--inversion.steps=2", *ON_CPU, ALONE),
        *("--scale=4", "--sampling.stride=100", "--sampling.weight=0", "--sampling.batch_size=2"),
    ]
    phases = {"start": writes("run.lock"), "sampling": writes("state.json")}
    return Command("engine.superres", argv, "--output.folder=", phases)


def sample(folder: Path) -> Command:
    np.save(folder / "cells.npy", np.random.default_rng(0).normal(size=(16, 1, 1)).astype(np.float32))
    argv = [
        *(f"--model.source={store_model(folder)}", f"--embeddings={folder / 'cells.npy'}", *ON_CPU),
        *("--magnification=20x", "--count=6", "--steps=4", "--sampling.batch_size=1"),
    ]
    return Command("engine.sample", argv, "--folder=", {"first": writes("*.png"), "others": writes("*.png", 2)})


def augment(folder: Path) -> Command:
    known = write_cohort(folder)
    argv = [
        *("--task=hrd", f"--features={known.features}", f"--labels={known.labels}", *QUICK),
        *(f"--synthetic={write_synthetic(folder / 'made', known)}", "--fractions=[1.0]"),
    ]
    phases = {"start": writes("config.yaml"), "first": writes("folds/*"), "others": writes("folds/*", 4)}
    return Command("mil.augment", argv, "--output.folder=", phases)


def probe(folder: Path) -> Command:
    rng = np.random.default_rng(0)
    for kind, bright in (("dark", 80), ("pale", 200)):
        (folder / "data" / kind).mkdir(parents=True)
        for number in range(12):
            picture = rng.normal(bright, 20, (256, 256, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(picture).save(folder / "data" / kind / f"p{number}.png")
    (folder / "task.yaml").write_text("name: tones\nclasses: [dark, pale]\nmpp: 0.5\nfolds: 2\npatient: '^(\\w+)'\n")
    argv = [f"--task={folder / 'task.yaml'}", f"--data={folder / 'data'}", "--encoder=texture", "--hidden=8"]
    phases = {"start": writes("config.yaml"), "vectors": writes("vectors/*")}
    return Command("mil.probe", argv, "--out=", phases)


COMMANDS: dict[str, Callable[[Path], Command]] = {
    "generate": generate,
    "cohort": cohort,
    "extract": extract,
    "prepare": prepare,
    "train": train,
    "train-mil": train_mil,
    "phantom-slides": phantom_slides,
    "superres": superres,
    "sample": sample,
    "augment": augment,
    "probe": probe,
}
PHASES = {
    "generate": ("planning", "sampling", "exporting"),
    "cohort": ("start", "first picture", "others"),
    "extract": ("start", "first slide", "second slide"),
    "prepare": ("start", "slides"),
    "train": ("start", "steps"),
    "train-mil": ("start", "first fold", "second fold"),
    "phantom-slides": ("first", "others"),
    "superres": ("start", "sampling"),
    "sample": ("first", "others"),
    "augment": ("start", "first", "others"),
    "probe": ("start", "vectors"),
}
SHORT = {
    ("generate", "sampling"),
    ("cohort", "others"),
    ("extract", "first slide"),
    ("train-mil", "first fold"),
    ("train", "steps"),
}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return list(value) if isinstance(value, tuple) else value


Scene = tuple[Command, Undisturbed]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Scene]:
    """Return a command and what it does undisturbed; each is made once."""
    made: dict[str, Scene] = {}

    def scene(name: str) -> Scene:
        if name not in made:
            folder = tmp_path_factory.mktemp(name.replace(" ", "_"))
            command = (COMMANDS | FRESH)[name](folder)
            made[name] = command, interrupted.undisturbed(command, folder / "undisturbed")
            assert made[name][1].files, "nothing of it is the same twice"
        return made[name]

    return scene


def assert_survives(scene: Scene, name: str, phase: str, moment: int, folder: Path, ledger: Ledger) -> None:
    """Interrupt a command once, assert how it ends, let it resume, and assert that nothing was lost."""
    (command, wanted), draw = scene, random.Random(f"2026/{name}/{phase}/{moment}")
    with ledger.trial("signals", f"SIGINT or SIGTERM, {name}, {phase}") as trial:
        number = draw.choice((signal.SIGINT, signal.SIGTERM))
        running = Running(command, folder)
        if running.wait_for(command.phases[phase]):
            time.sleep(draw.uniform(0, wanted.lasts[phase]))
            running.send(number)
        caught = interrupted.assert_ended_well(running.end(), number)
        interrupted.assert_resumes(command, folder, wanted)
        trial.outcome = f"{number.name}, {'interrupted; resumed' if caught else 'done before'} to the same bytes"


MOMENTS_OF = [
    pytest.param(name, phase, moment, marks=() if (name, phase) in SHORT and moment == 0 else LONG)
    for name, phases in PHASES.items()
    for phase in phases
    for moment in range(MOMENTS)
]


@pytest.mark.parametrize(("name", "phase", "moment"), MOMENTS_OF)
def test_a_signal_at_a_random_moment(
    scenes: Callable[[str], Scene], ledger: Ledger, tmp_path: Path, name: str, phase: str, moment: int
) -> None:
    assert_survives(scenes(name), name, phase, moment, tmp_path, ledger)


def importing(folder: Path) -> Command:
    """A command in a process of its own, from its first lines on."""
    argv = ["--count=1", "--width=512", "--height=512"]
    phases = {"imports": catches_signals, "work": writes("*")}
    return Command("engine.phantom_slides", argv, "--out=", phases, fresh=True)


def importing_mil(folder: Path) -> Command:
    argv = (made := train_mil(folder)).argv
    return Command(made.module, argv, made.out, {"imports": catches_signals, "work": writes("config.yaml")}, fresh=True)


def on_ray(make: Callable[..., Command]) -> Callable[[Path], Command]:
    """The command with a private Ray: while that starts, while it is used, and while it ends."""

    def made(folder: Path) -> Command:
        command = make(folder, "--ray.enabled=true", "--ray.replicas=1")
        first = next(iter(command.phases.items()))
        work = list(command.phases.items())[1:]
        return Command(
            command.module, command.argv, command.out, dict([first, ("Ray starts", has_children), *work]), fresh=True
        )

    return made


FRESH: dict[str, Callable[[Path], Command]] = {
    "imports": importing,
    "imports of mil": importing_mil,
    "generate on Ray": on_ray(generate),
    "cohort on Ray": on_ray(cohort),
    "extract on Ray": on_ray(extract),
}
FRESH_PHASES = {
    "imports": ("imports", "work"),
    "imports of mil": ("imports",),
    "generate on Ray": ("Ray starts", "sampling", "exporting"),
    "cohort on Ray": ("Ray starts", "first picture", "others"),
    "extract on Ray": ("Ray starts", "first slide", "second slide"),
}
FRESH_MOMENTS = [
    pytest.param(
        name,
        phase,
        moment,
        marks=[
            *([pytest.mark.ray] if "Ray" in name else []),
            *([] if (name, phase, moment) == ("imports", "imports", 0) else [LONG]),
        ],
    )
    for name, phases in FRESH_PHASES.items()
    for phase in phases
    for moment in range(MOMENTS)
]


@pytest.mark.parametrize(("name", "phase", "moment"), FRESH_MOMENTS)
def test_a_signal_to_a_fresh_process(
    scenes: Callable[[str], Scene], ledger: Ledger, tmp_path: Path, name: str, phase: str, moment: int
) -> None:
    assert_survives(scenes(name), name, phase, moment, tmp_path, ledger)
