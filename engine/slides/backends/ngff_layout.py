"""Where the picture lies in an OME-Zarr folder: at its root, or in the numbered groups of bioformats2raw.

Invariant: of several pictures the largest is taken, as in other files of several, and `choice` says it; one that is
listed and cannot be read refuses the folder, because it may be the scan. Source: OME-NGFF 0.4 and 0.5
(bioformats2raw.layout, plate, image-label).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import zarr
import zarr.errors

from engine.core.errors import UNREADABLE, SlideError
from engine.slides.backends.choice import ONLY, Choice, Part, choose
from engine.slides.resolution import Claims, ome_xml_claims

_NO_PICTURE = {
    "plate": "a plate of wells; name the picture of one well, such as PLATE/A/1/0, with a name that ends in .zarr",
    "well": "a well of several fields; name one of its pictures, with a name that ends in .zarr",
    "image-label": "labels of another picture; leave it out",
}
"""What else an OME-Zarr group may be."""
RGB_COLOURS = ("FF0000", "00FF00", "0000FF")


@dataclass(frozen=True)
class Picture:
    """One picture of an OME-Zarr folder."""

    group: Any
    """The zarr group that holds the levels."""
    scales: Any
    """Its multiscales metadata."""
    is_rgb: bool
    """Whether its first three channels are said to be red, green and blue."""
    channels: tuple[list[str], ...] = ()
    """Labels and colours of its three channels, each where they are given."""
    number: int = 0
    """Place in the list of pictures."""
    choice: Choice = ONLY
    """Which of several pictures it is."""

    @property
    def arrays(self) -> list[Any]:
        """The levels, finest first."""
        return [self.group[dataset["path"]] for dataset in self.scales["datasets"]]

    @property
    def axes(self) -> list[str]:
        """Names of the axes of the levels."""
        return [str(axis["name"]).lower() for axis in self.scales["axes"]]

    @property
    def size(self) -> tuple[int, int]:
        """Px (h, w) of the finest level."""
        shape = dict(zip(self.axes, self.arrays[0].shape, strict=True))
        return shape["y"], shape["x"]


def find_picture(root: Any, name: str, path: Path, series: int | None = None) -> Picture:
    """Return the picture at the root or below it: number `series`, else the largest.

    Raises: SlideError `not_a_slide`, `unsupported` or `no_such_series`; whatever zarr raises for a damaged folder.
    """
    said = _said_of(root)
    if "multiscales" in said:
        found = [_picture(root, number, at) for at, number in enumerate([0] * len(said["multiscales"]))]
        return _chosen(name, found, [str(scales.get("name") or "") for scales in said["multiscales"]], series)
    for key, what in _NO_PICTURE.items():
        if key in said:
            raise SlideError("unsupported", f"{name}: {path} must be one picture; it is {what}.")
    pictures = []
    for number, place in enumerate(_places(root)):
        try:
            found = _picture(root[place], number)
            _ = found.size  # its arrays are there
        except (*UNREADABLE, zarr.errors.BaseZarrError) as error:
            raise SlideError(
                "not_a_slide",
                f"{name}: all pictures of {path} must be readable, one of them is the scan; {place} is not "
                f"({error!r}). Copy the folder again, or convert it again (bioformats2raw).",
            ) from error
        pictures.append((place, found))
    if not pictures:
        raise SlideError(
            "not_a_slide",
            f"{name}: {path} must be an OME-Zarr folder of version 0.4 or 0.5, with multiscales at its root or in "
            f"groups of it; it has none ({', '.join(sorted(said)) or 'no attributes'}). Is it copied whole?",
        )
    return _chosen(name, [found for _, found in pictures], [place for place, _ in pictures], series)


def _chosen(name: str, pictures: Sequence[Picture], names: Sequence[str], series: int | None) -> Picture:
    parts = [Part(said, picture.size) for said, picture in zip(names, pictures, strict=True)]
    choice = choose(name, parts, series)
    return replace(pictures[choice.index], choice=choice)


def _picture(group: Any, number: int = 0, at: int = 0) -> Picture:
    """Return picture `at` of a group; `omero` describes the first."""
    said = _said_of(group)
    omero = said.get("omero") if at == 0 else None
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list) or not all(isinstance(c, dict) for c in channels):
        channels = []
    colours = tuple(str(channel.get("color", "")).upper() for channel in channels[:3])
    told = tuple([str(c.get(key) or "") for c in channels] for key in ("label", "color")) if len(channels) == 3 else ()
    return Picture(group, said["multiscales"][at], colours == RGB_COLOURS, told, number)


def _said_of(group: Any) -> dict[str, Any]:
    """Return the attributes of a group; version 0.5 has them under `ome`."""
    attributes: dict[str, Any] = group.attrs.asdict()
    return attributes.get("ome", attributes)


def _places(root: Any) -> list[str]:
    """Return the pictures that the folder lists; if it lists none, its groups that are pictures."""
    groups = dict(root.groups())
    listed = _said_of(groups["OME"]).get("series") if "OME" in groups else None
    if listed:
        return [str(place) for place in listed]
    numbered = sorted((key for key in groups if key.isdecimal()), key=int)
    return numbered or sorted(key for key, group in groups.items() if "multiscales" in _said_of(group))


def claims_beside(path: Path, picture: Picture) -> Claims:
    """Return what OME/METADATA.ome.xml claims of this picture; nothing if it is not there or tells of another."""
    file = path / "OME" / "METADATA.ome.xml"
    try:
        root = ElementTree.fromstring(file.read_bytes())
    except (OSError, ElementTree.ParseError):
        return Claims()
    images = [node for node in root if node.tag.rpartition("}")[2] == "Image"]
    if picture.number >= len(images):
        return Claims()
    image = images[picture.number]
    pixels = next((node for node in image if node.tag.rpartition("}")[2] == "Pixels"), None)
    height, width = picture.size
    if pixels is None or (pixels.get("SizeY"), pixels.get("SizeX")) != (str(height), str(width)):
        return Claims()
    return ome_xml_claims(ElementTree.tostring(image, encoding="unicode"))
