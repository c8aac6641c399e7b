"""The run that is disturbed: a tiny real model, 520x256 px in two levels, the finer one begun from its guide, then a
refinement, all exports; and what is compared: every byte it leaves, but for times and places."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from engine.canvas.view import CanvasView
from tests.faults import launcher
from tests.support.tiny_run import store_inputs

LONG_RUN = "--sampling.stride=20"
"""Makes the same picture in 50 steps, for faults that need time to show."""
LEFT_OUT = (
    "report.json",
    "config.yaml",
    "environment.json",
    "state.json",
    "run.lock",
    "canvas.zarr",
    "writers",
    "live",
)
"""Times and places, and previews, which depend on how fast a run is; the canvas is compared by its latents."""
SETTINGS = {
    "model.device": "cpu",
    "model.threads": "1",
    "canvas.height": "520",
    "canvas.width": "256",
    "sampling.stride": "500",
    "sampling.weight": "0",
    "sampling.batch_size": "2",
    "refine.start": "200",
    "refine.stride": "200",
    "refine.tile_stride": "64",
    "decode.batch_size": "1",
    "output.formats": "[tiff, ome-tiff, dzi, png]",
}


def make_inputs(folder: Path) -> list[str]:
    """Store a random tiny model with a colour map, and SSL vectors; return the flags of the run."""
    return [f"--{key}={value}" for key, value in (store_inputs(folder, 3, 1) | SETTINGS).items()]


def bytes_of_run(folder: Path) -> dict[str, str]:
    """Return the sha256 of each thing a finished run leaves, and assert that nothing half-written lies beside them."""
    assert not list(folder.rglob("*.partial"))
    view = CanvasView(folder)
    assert view.state.progress.finished
    found = {}
    for level in view.state.buffers:
        size = view.state.keys[f"plan.levels.{level}"]
        found[f"latents {level}"] = hashlib.sha256(view.read(level, 0, size[0]).tobytes()).hexdigest()  # type: ignore[index]
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_file() and name.parts[0] not in LEFT_OUT:
            found[str(name)] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


@dataclass(frozen=True)
class Scene:
    """The run every fault is tried on."""

    flags: list[str]
    expected: dict[str, str]
    """sha256 of what the undisturbed run left."""
    counts: dict[str, int]
    """How often it called the functions in launcher.COUNTED."""
    seconds: float
    """How long it took, in its process."""

    def argv(self, folder: Path, *more: str) -> list[str]:
        """Return the command line of the run in `folder`, whose last name goes into the picture's metadata."""
        assert folder.name == "run"
        return [*self.flags, "--ray.enabled=false", f"--output.folder={folder}", *more]

    def assert_resumes(self, folder: Path, log: Path, *more: str) -> None:
        """Repeat the command undisturbed; it must end well and leave the undisturbed run's bytes."""
        code, said = launcher.run(self.argv(folder, *more), log)
        assert code == 0, said
        assert "Traceback" not in said
        self.assert_same(folder)

    def assert_same(self, folder: Path) -> None:
        found = bytes_of_run(folder)
        assert found.keys() == self.expected.keys()
        differing = [name for name in found if found[name] != self.expected[name]]
        assert not differing, f"other bytes than undisturbed: {differing}"
