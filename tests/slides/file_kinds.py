"""Kinds of files and what becomes of them: cases of test_file_kinds.py, and a table of docs/reference/slide_files.md.

A kind's file is written here, or taken from an archive that a package publishes. The picture is always TRUE, but for
real files, whose px OpenSlide is asked for.
"""

import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from PIL import Image

from tests.support.written_slides import tissue

ARCHIVES = Path(__file__).parents[2] / ".cache" / "archives"
"""Where `make test` puts what archives.txt names."""
TRUE = np.ascontiguousarray(np.asarray(tissue(350, 550))[:192, :256])
READ, ESTIMATED, MASKED = (
    "read",
    "read, µm/px estimated from the objective",
    "read; what is damaged is masked and counted",
)


@dataclass(frozen=True)
class Kind:
    """A kind of file."""

    title: str
    name: str
    write: Callable[[Path], object]
    """Write the file at a path."""
    outcome: str
    """READ, ESTIMATED, MASKED or the code of a refusal."""
    mpp: float = 0.5
    error: float = 0.0
    """Largest mean difference of px that a lossy compression may make."""


def _tiff(pixels: np.ndarray = TRUE, mpp: float | None = 0.5, **more: Any) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        where = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
        said = {"photometric": "rgb", "tile": (64, 64), "metadata": None} | where | more
        tifffile.imwrite(path, pixels, **said)

    return write


def _aperio(description: str, **more: Any) -> Callable[[Path], object]:
    return _tiff(mpp=None, description=f"Aperio Image Library v1\n256x192 (64x64) {description}", **more)


def _ome(*pictures: tuple[np.ndarray, str, float]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        with tifffile.TiffWriter(path, ome=True) as tiff:
            for pixels, name, mpp in pictures:
                about = {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                tiff.write(pixels, photometric="rgb", tile=(64, 64), metadata=about)

    return write


def _ome_zarr(path: Path) -> None:
    root = zarr.open_group(path, mode="w", zarr_format=2)
    root.create_array("0", data=np.moveaxis(TRUE, -1, 0), chunks=(3, 64, 64))
    axes = [{"name": "c", "type": "channel"}, *({"name": a, "type": "space", "unit": "micrometer"} for a in "yx")]
    scale = [{"type": "scale", "scale": [1.0, 0.5, 0.5]}]
    levels = [{"path": "0", "coordinateTransformations": scale}]
    root.attrs["multiscales"] = [{"version": "0.4", "axes": axes, "datasets": levels}]


def _cut(write: Callable[[Path], object], keep: float) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])

    return cut


def _bad_tile(path: Path) -> None:
    _tiff(compression="jpeg")(path)
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[0], tiff.pages[0].databytecounts[0]
    with path.open("r+b") as file:
        file.seek(offset + count // 2)
        file.write(b"\xff\xd9" * (count // 4))


def _grey(path: Path) -> None:
    _tiff(TRUE[..., 0], photometric="minisblack")(path)


def _png(path: Path) -> None:
    Image.fromarray(TRUE).save(path)


KINDS = (
    Kind("generic TIFF, RGB, with a resolution", "a.tif", _tiff(), READ),
    Kind("the same in JPEG", "a.tif", _tiff(compression="jpeg"), READ, error=6),
    Kind("BigTIFF, LZW", "a.tif", _tiff(compression="lzw", bigtiff=True), READ),
    Kind("generic TIFF that states no µm/px", "a.tif", _tiff(mpp=None), "no_mpp"),
    Kind("TIFF whose resolution cannot be a scanner's", "a.tif", _tiff(mpp=352.8), "absurd_mpp"),
    Kind("SVS with MPP", "a.svs", _aperio("|AppMag = 20|MPP = 0.5"), READ),
    Kind("SVS with its objective alone", "a.svs", _aperio("|AppMag = 20"), ESTIMATED),
    Kind("OME-TIFF", "a.ome.tiff", _ome((TRUE, "scan", 0.5)), READ),
    Kind(
        "OME-TIFF with its label first",
        "a.ome.tiff",
        _ome((TRUE[:64, :64], "label", 8.0), (TRUE, "scan", 0.5)),
        READ,
    ),
    Kind("OME-Zarr", "a.ome.zarr", _ome_zarr, READ),
    Kind("PNG or JPEG without --mpp", "a.png", _png, "no_mpp"),
    Kind("one channel", "a.tif", _grey, "not_rgb"),
    Kind("16 bits", "a.tif", _tiff(TRUE.astype(np.uint16) * 257), "not_8_bit"),
    Kind("CMYK", "a.tif", _tiff(np.dstack([TRUE, TRUE[..., :1]]), photometric="separated"), "not_rgb"),
    Kind("a compression that nobody knows", "a.tif", lambda path: _unknown(path), "unsupported"),
    Kind("a tile that does not decode", "a.tif", _bad_tile, MASKED, error=255),
    Kind("a file of which the beginning alone is there", "a.tif", _cut(_tiff(), 0.01), "truncated"),
    Kind("0 bytes", "a.svs", lambda path: path.write_bytes(b""), "empty_file"),
    Kind("text with a slide's name", "a.svs", lambda path: path.write_text("no slide"), "not_a_slide"),
    Kind("no such file", "a.svs", lambda path: None, "missing"),
)


def _unknown(path: Path) -> None:
    _tiff()(path)
    with tifffile.TiffFile(path, mode="r+") as tiff:
        tiff.pages[0].tags["Compression"].overwrite(52479)


@dataclass(frozen=True)
class RealFile:
    """A file in a package's source archive."""

    title: str
    package: str
    """As in archives.txt."""
    member: str
    beside: tuple[str, ...]
    """Other files of the same slide."""
    outcome: str
    mpp: float | None = None

    @property
    def archive(self) -> Path:
        name, _, version = self.package.rpartition("-")
        return ARCHIVES / f"{name.replace('-', '_')}-{version}.tar.gz"

    def extract(self, folder: Path) -> Path:
        """Put the file and those beside it into a folder."""
        with tarfile.open(self.archive) as archive:
            for member in (self.member, *self.beside):
                inside = f"{self.archive.name.removesuffix('.tar.gz')}/{member}"
                file = archive.extractfile(inside)
                assert file is not None
                (folder / Path(member).name).write_bytes(file.read())
        return folder / Path(self.member).name


OPENSLIDE, FIXTURES = "openslide-python-1.4.7", "tests/fixtures"
REAL_FILES = (
    RealFile("Aperio SVS of openslide-python", OPENSLIDE, f"{FIXTURES}/small.svs", (), READ, 0.499),
    RealFile(
        "DICOM slide of openslide-python, two files",
        OPENSLIDE,
        f"{FIXTURES}/boxes_0.dcm",
        (f"{FIXTURES}/boxes_1.dcm",),
        READ,
        0.499,
    ),
    RealFile("generic TIFF of openslide-python", OPENSLIDE, f"{FIXTURES}/boxes.tiff", (), "absurd_mpp"),
    RealFile("Aperio SVS whose only tile is broken", OPENSLIDE, f"{FIXTURES}/unreadable.svs", (), MASKED, 0.499),
    RealFile("TIFF in a compression nobody knows", OPENSLIDE, f"{FIXTURES}/unopenable.tiff", (), "unsupported"),
)


def table() -> str:
    """Return both tables as the page has them."""
    rows = [f"| {kind.title} | {_said(kind.outcome)} |" for kind in (*KINDS, *REAL_FILES)]
    return "\n".join(["| file | what we do |", "|---|---|", *rows])


def _said(outcome: str) -> str:
    return outcome if outcome in (READ, ESTIMATED, MASKED) else f"refused (`{outcome}`)"
