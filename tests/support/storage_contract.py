"""What every storage of latents must do; a subclass gives the fixture `place`. Steps are written in a closed form."""

import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from engine.canvas import object_client
from engine.canvas.arrays import array_path
from engine.canvas.canvas import BAND, Canvas, Progress
from engine.canvas.storage import open_storage
from engine.canvas.view import CanvasView
from engine.core.errors import CanvasError, CanvasMismatchError

LEVELS = {"1.25x": (64, 80), "20x": (520, 300)}
KEYS: dict[str, object] = {"sampling.seed": 0, "canvas.levels": ("1.25x", "20x"), "model.source": "demo"}


def rows_of(step: int, level: str, levels: dict[str, tuple[int, int]] = LEVELS) -> np.ndarray:
    """A level's latents after a step: a closed form, so that any process can check them."""
    h, w = levels[level]
    y, x = np.mgrid[:h, :w].astype(np.float32)
    return np.stack([y + step, x - step, y * 0 + step]).astype(np.float32)


def write_step(canvas: Canvas, step: int, names: tuple[str, ...] = tuple(LEVELS)) -> None:
    for name in names:
        rows = rows_of(step, name)
        for y0 in range(0, rows.shape[1], BAND):
            canvas.write(name, y0, rows[:, y0 : y0 + BAND])


def committed(canvas: Canvas, step: int) -> None:
    write_step(canvas, step)
    canvas.commit(0, step)


def assert_holds(canvas: Canvas, step: int) -> None:
    for name, (h, _) in LEVELS.items():
        np.testing.assert_array_equal(canvas.read(name, 0, h), rows_of(step, name))


def run_of(folder: Path, steps: int) -> Path:
    with Canvas.open(folder, KEYS, LEVELS) as canvas:
        for step in range(1, steps + 1):
            committed(canvas, step)
    return folder


def chunk(folder: Path, array: str, index: str) -> Path:
    return folder / "canvas.zarr" / array / "c" / index


@dataclass
class Place:
    """Where the latents of a run lie: in its folder, or below a URL with a folder of its own on every machine."""

    root: Path
    url: str | None = None

    def folder(self, machine: str) -> Path:
        return self.root / "deep" / ("run" if self.url is None else machine)

    @property
    def where(self) -> str:
        """How messages name it."""
        return str(self.folder("")) if self.url is None else open_storage(self.url).where

    def open(self, machine: str = "first", keys: dict[str, object] = KEYS) -> Canvas:
        return Canvas.open(self.folder(machine), keys, LEVELS, None if self.url is None else open_storage(self.url))

    def made(self, steps: int) -> None:
        with self.open() as canvas:
            for step in range(1, steps + 1):
                committed(canvas, step)

    def array(self, level: str) -> str:
        """Name the array of a level that is committed."""
        buffer = CanvasView(self.folder("first")).state.buffers[level]
        assert buffer is not None
        return array_path(level, buffer)

    def get(self, name: str) -> bytes:
        if self.url is None:
            return (self.folder("") / name).read_bytes()
        return object_client.connect(self.url).get(name).bytes().to_bytes()

    def put(self, name: str, data: bytes | None) -> None:
        """Replace what is stored; None removes it."""
        if self.url is None:
            path = self.folder("") / name
            path.unlink() if data is None else path.write_bytes(data)
        elif data is None:
            object_client.connect(self.url).delete(name)
        else:
            object_client.connect(self.url).put(name, data)


WRITER = """
import sys
from pathlib import Path
sys.path[:0] = [{root!r}]
from tests.support.storage_contract import Place, committed
canvas = Place(Path({folder!r}), {url!r}).open({machine!r})
step = canvas.progress.steps
while True:
    print(step, flush=True)
    step += 1
    committed(canvas, step)
"""


class StorageTests:
    """The contract."""

    def test_another_machine_continues(self, place: Place) -> None:
        with place.open() as canvas:
            assert canvas.fresh
            committed(canvas, 1)
            committed(canvas, 2)
            digest = canvas.digest
        assert (place.folder("first") / "canvas.zarr").exists() == (place.url is None)
        with place.open("second") as canvas:
            assert not canvas.fresh
            assert (canvas.digest, canvas.progress) == (digest, Progress(pass_index=0, steps=2))
            assert_holds(canvas, 2)
            np.testing.assert_array_equal(canvas.read("20x", 250, 270), rows_of(2, "20x")[:, 250:270])

    def test_a_level_left_out_of_a_step_keeps_its_buffer(self, place: Place) -> None:
        with place.open() as canvas:
            committed(canvas, 1)
            write_step(canvas, 2, ("20x",))
            canvas.commit(1, 0)
        with place.open("second") as canvas:
            assert canvas.progress == Progress(1, 0)
            np.testing.assert_array_equal(canvas.read("1.25x", 0, 64), rows_of(1, "1.25x"))
            np.testing.assert_array_equal(canvas.read("20x", 0, 520), rows_of(2, "20x"))

    def test_written_rows_count_only_after_commit(self, place: Place) -> None:
        with place.open() as canvas:
            write_step(canvas, 1)
            with pytest.raises(ValueError, match="must be committed before"):
                canvas.read("20x", 0, 1)
            canvas.commit(0, 1)
            write_step(canvas, 2)
            np.testing.assert_array_equal(canvas.read("20x", 0, 520, ahead=True), rows_of(2, "20x"))
            assert_holds(canvas, 1)
            canvas.commit(0, 2)
            assert_holds(canvas, 2)

    def test_what_is_decoded_is_recorded_and_forgotten_by_the_next_commit(self, place: Place) -> None:
        place.made(1)
        with place.open() as canvas:
            canvas.record(decoded_px=1024)
            canvas.record(finished=True)
        with place.open() as canvas:
            assert canvas.progress == Progress(0, 1, decoded_px=1024, finished=True)
            committed(canvas, 2)
            assert canvas.progress == Progress(0, 2)

    def test_what_a_resume_must_not_make_anew_travels(self, place: Place) -> None:
        for machine, made in (("first", b"first"), ("second", b"second")):
            with place.open(machine) as canvas:
                with canvas.shared("conditions.npy") as path:
                    if not path.exists():
                        path.write_bytes(made)
                assert (place.folder(machine) / "conditions.npy").read_bytes() == b"first"

    def test_a_view_sees_commits_without_the_lock(self, place: Place) -> None:
        with place.open() as canvas:
            with pytest.raises(CanvasError, match="none yet"):
                CanvasView(place.folder("first")).read("20x", 0, BAND)
            committed(canvas, 1)
            view = CanvasView(place.folder("first"))
            np.testing.assert_array_equal(view.read("20x", 100, 400), rows_of(1, "20x")[:, 100:400])
            assert not view.moved()
            committed(canvas, 2)
            assert view.moved()

    def test_another_plan_is_refused_on_every_machine(self, place: Place) -> None:
        place.open().close()
        for machine in ("first", "second"):
            with pytest.raises(CanvasMismatchError, match=r"sampling\.seed was 0, now 7"):
                place.open(machine, KEYS | {"sampling.seed": 7})
            place.open(machine).close()

    @pytest.mark.parametrize(("harm", "says"), [("flip", "damaged"), ("cut", "damaged"), ("delete", "missing")])
    def test_a_lost_chunk_is_named(self, place: Place, harm: str, says: str) -> None:
        place.made(2)
        array = place.array("20x")
        name = f"canvas.zarr/{array}/c/0/1/1"
        data = bytearray(place.get(name))
        data[12345] ^= 1
        place.put(name, {"flip": bytes(data), "cut": bytes(data[:999]), "delete": None}[harm])
        with place.open() as canvas:
            canvas.read("20x", 0, BAND)  # the other bands are still good
            with pytest.raises(
                CanvasError, match=rf"{place.where}.*chunk c/0/1/1 of {array} is {says}.*pass 0, step 2"
            ):
                canvas.read("20x", 0, 520)

    def test_a_lost_array_is_named(self, place: Place) -> None:
        place.made(1)
        array = place.array("20x")
        place.put(f"canvas.zarr/{array}/zarr.json", b"{")
        with pytest.raises(CanvasError, match=f"array {array} must be there"):
            place.open()

    def test_sigkill_at_any_instant_leaves_a_committed_step(self, place: Place) -> None:
        for number, delay in enumerate((0.0, 0.019, 0.11)):
            root, machine = str(Path(__file__).parents[2]), f"machine-{number}"
            code = WRITER.format(root=root, folder=str(place.root), url=place.url, machine=machine)
            process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
            assert process.stdout is not None
            promised = max(int(process.stdout.readline()) for _ in range(2))
            time.sleep(delay)
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
            with place.open("last") as canvas:  # at once: the dead process's lock or lease does not block
                assert canvas.progress.steps >= promised > 0
                assert_holds(canvas, canvas.progress.steps)
