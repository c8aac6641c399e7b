"""The formats a picture is exported in: their names, file endings and writers."""

from pathlib import Path
from typing import Literal

from engine.images.dzi import write_dzi
from engine.images.jpeg import write_jpeg
from engine.images.ome_zarr_export import Version, write_ngff
from engine.images.png import write_png
from engine.images.pyramid import Picture
from engine.images.tiff import Compression, write_ome_tiff, write_tiff

Format = Literal["tiff", "ome-tiff", "ome-zarr", "dzi", "png", "jpeg"]
ENDINGS: dict[Format, tuple[str, ...]] = {
    "tiff": (".tiff", ".tif"),
    "ome-tiff": (".ome.tiff", ".ome.tif"),
    "ome-zarr": (".ome.zarr", ".zarr"),
    "dzi": (".dzi",),
    "png": (".png",),
    "jpeg": (".jpeg", ".jpg"),
}
"""What the name of an export ends in; the first is ours."""
COMPRESSED: tuple[Format, ...] = ("tiff", "ome-tiff", "dzi")
"""Formats with a choice of compression."""


def check_ending(path: Path, name: Format) -> None:
    """Hold a path to its format, by which viewers choose a reader. Raises ValueError."""
    if not path.name.endswith(ENDINGS[name]):
        raise ValueError(f"the name of a {name} must end in {' or '.join(ENDINGS[name])}; got {path.name}.")


def write_export(
    path: Path,
    picture: Picture,
    name: Format,
    compression: Compression | None = None,
    jpeg_quality: int = 90,
    ngff: Version = "0.5",
) -> None:
    """Write the picture in a format; compression None takes the format's own: deflate, for dzi jpeg.

    Raises: ValueError when the picture is too large for it; CanvasError if the disk refuses or the picture is damaged.
    """
    if name == "tiff":
        write_tiff(path, picture, compression or "deflate", jpeg_quality)
    elif name == "ome-tiff":
        write_ome_tiff(path, picture, compression or "deflate", jpeg_quality)
    elif name == "ome-zarr":
        write_ngff(path, picture, ngff)
    elif name == "dzi":
        write_dzi(path, picture, compression or "jpeg", jpeg_quality)
    elif name == "png":
        write_png(path, picture)
    else:
        write_jpeg(path, picture, jpeg_quality)
