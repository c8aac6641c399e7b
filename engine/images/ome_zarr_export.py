"""OME-Zarr copies: 0.5 (Zarr v3) as the engine's own picture, 0.4 (Zarr v2) for QuPath and older tools.

A folder appears whole or not at all. Source: OME-NGFF 0.4 and 0.5.
"""

from pathlib import Path
from typing import Any, Literal

import numpy as np
import zarr
from zarr.storage import LocalStore

from engine.core.chunk_writes import write_region
from engine.core.files import replacing_folder
from engine.images.ome_zarr import CHUNK_PX, PROVENANCE, Image, ngff_metadata
from engine.images.pyramid import Picture, strips

Version = Literal["0.4", "0.5"]


def write_ngff(path: Path, picture: Picture, version: Version = "0.5") -> None:
    """Write the picture as a folder of OME-Zarr; replaces an OME-Zarr folder that is there.

    Raises: CanvasError if the disk refuses, the picture is damaged, or something else lies at the path.
    """
    height, width = picture.sizes[0]
    markers = (".zattrs", "zarr.json")
    with replacing_folder(path, markers, needed=4 * height * width) as partial:
        if version == "0.4":
            _write_v2(partial, path.name, picture)
            return
        rows = (part.transpose(2, 0, 1) for part in strips(picture))
        Image.of_rows(partial, rows, (height, width), picture.mpp_um, path.name, picture.provenance)


def _write_v2(folder: Path, name: str, picture: Picture) -> None:
    group = zarr.open_group(LocalStore(folder), mode="w", zarr_format=2)
    for level, (height, width) in enumerate(picture.sizes):
        array = _create_v2(group, level, height, width)
        y0 = 0
        for rows in strips(picture, level):
            write_region(array, np.s_[:, y0 : y0 + rows.shape[0]], rows.transpose(2, 0, 1))
            y0 += rows.shape[0]
    ome = ngff_metadata(name, picture.mpp_um, len(picture.sizes))
    group.attrs.update(
        {
            "multiscales": [{"version": "0.4", **scales} for scales in ome["multiscales"]],
            "omero": {"version": "0.4", **ome["omero"]},
            PROVENANCE: picture.provenance,
        }
    )


def _create_v2(group: Any, level: int, height: int, width: int) -> Any:
    array = group.create_array(
        str(level),
        shape=(3, height, width),
        chunks=(3, CHUNK_PX, CHUNK_PX),
        dtype="uint8",
        filters=None,
        # zlib, because JZarr in QuPath reads it without a native library; it also notices flipped bits.
        compressors={"id": "zlib", "level": 6},
        chunk_key_encoding={"name": "v2", "separator": "/"},
        fill_value=0,
    )
    return array.with_config({"write_empty_chunks": True})
