"""BigTIFF pyramids in tiles of 256 px, as top-level IFDs or as OME-TIFF.

Top-level IFDs marked as reduced are what OpenSlide's generic-tiff, QuPath and tifffile agree on; SubIFDs with OME-XML
are what Bio-Formats and its tools read (OpenSlide sees only the full resolution there). It computes no pixel.
"""

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tifffile

from engine.core.files import replacing
from engine.images.pyramid import Picture, label, labelled, resolution, strips

TIFF_TILE_PX = 256
Compression = Literal["deflate", "jpeg"]
_BUFFER_NBYTES = 16 << 20
"""Tiles compressed in one go by several threads; tifffile's own 512 MB would hold most pictures whole."""
_SOFTWARE = "zoomldm-engine"
_NAMESPACE = "zoomldm-engine/provenance"
"""Names the OME annotation that holds the provenance."""


def write_tiff(path: Path, picture: Picture, compression: Compression = "deflate", jpeg_quality: int = 90) -> None:
    """Write a tiled pyramidal BigTIFF with all levels of the picture; deflate keeps the pixels.

    The first level's ImageDescription is the provenance as JSON; the resolution is in px per cm.
    Raises: CanvasError if the disk refuses or the picture is damaged; a file that was there then still stands.
    """
    with (
        replacing(path, needed=_needed(picture)) as partial,
        tifffile.TiffWriter(partial, bigtiff=True) as tiff,
    ):
        for level in range(len(picture.sizes)):
            tiff.write(
                _tiles(picture, level),
                **_options(picture, level, compression, jpeg_quality),
                description=None if level else label(picture),
                metadata=None,
                software=_SOFTWARE,
            )


def write_ome_tiff(path: Path, picture: Picture, compression: Compression = "deflate", jpeg_quality: int = 90) -> None:
    """Write a tiled BigTIFF with OME-XML and the smaller levels as SubIFDs; deflate keeps the pixels.

    OME-XML has µm/px, and the provenance as a map annotation (values are JSON) and as the image's description.
    Raises: as write_tiff. Source: OME-TIFF specification, "sub-resolutions".
    """
    with (
        replacing(path, needed=_needed(picture)) as partial,
        tifffile.TiffWriter(partial, bigtiff=True, ome=True) as tiff,
    ):
        first, *others = range(len(picture.sizes))
        tiff.write(
            _tiles(picture, first),
            **_options(picture, first, compression, jpeg_quality),
            subifds=len(others),
            metadata=_ome_metadata(path.name, picture),
            software=_SOFTWARE,
        )
        for level in others:
            tiff.write(_tiles(picture, level), **_options(picture, level, compression, jpeg_quality), metadata=None)


def _ome_metadata(name: str, picture: Picture) -> dict[str, Any]:
    values = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for key, value in labelled(picture).items()
    }
    return {
        # tifffile's own is of the clock and this machine's network card: other bytes every time
        "UUID": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{_NAMESPACE}/{name}/{picture.sizes}/{label(picture)}")),
        "axes": "YXS",
        "Name": name,
        "Description": label(picture),
        "PhysicalSizeX": picture.mpp_um,
        "PhysicalSizeXUnit": "µm",
        "PhysicalSizeY": picture.mpp_um,
        "PhysicalSizeYUnit": "µm",
        "MapAnnotation": {"Namespace": _NAMESPACE, "Value": values},
    }


def _options(picture: Picture, level: int, compression: Compression, jpeg_quality: int) -> dict[str, Any]:
    per_cm = resolution(picture.mpp_um * 2**level)
    found: dict[str, Any] = {
        "shape": (*picture.sizes[level], 3),
        "dtype": np.uint8,
        "tile": (TIFF_TILE_PX, TIFF_TILE_PX),
        "photometric": "rgb",  # of the tiles; tifffile stores JPEG as YCbCr by itself
        "subfiletype": 1 if level else 0,  # OpenSlide takes a further IFD for a level only when it says so
        "resolution": (per_cm, per_cm),
        "resolutionunit": "CENTIMETER",
        "buffersize": _BUFFER_NBYTES,
    }
    if compression == "jpeg":
        return {**found, "compression": "jpeg", "subsampling": (2, 2), "compressionargs": {"level": jpeg_quality}}
    return {**found, "compression": "deflate", "predictor": True}


def _tiles(picture: Picture, level: int) -> Iterator[np.ndarray]:
    """Yield the tiles row by row, uint8 (256, 256, 3); memory holds one row of chunks."""
    width = picture.sizes[level][1]
    for rows in strips(picture, level):
        for y in range(0, rows.shape[0], TIFF_TILE_PX):
            for x in range(0, width, TIFF_TILE_PX):
                tile = rows[y : y + TIFF_TILE_PX, x : x + TIFF_TILE_PX]
                missing = [(0, TIFF_TILE_PX - tile.shape[0]), (0, TIFF_TILE_PX - tile.shape[1]), (0, 0)]
                # repeated borders: black ones would ring into the picture under JPEG
                yield np.ascontiguousarray(np.pad(tile, missing, mode="edge"))


def _needed(picture: Picture) -> int:
    """Return the bytes of the pyramid, uncompressed."""
    height, width = picture.sizes[0]
    return 4 * height * width
