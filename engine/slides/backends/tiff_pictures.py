"""The pictures of a TIFF, which of them is read, and what the file says of that very picture.

Invariant: px, µm/px, objective and channels are those of one and the same picture; what the file says of another one
is not taken. It decodes no px. Sources: TIFF 6.0, OME-XML 2016-06, Aperio's descriptions.
"""

from typing import Any
from xml.etree import ElementTree

import numpy as np
import tifffile

from engine.core.errors import SlideError
from engine.slides.backends.base import plausible_levels
from engine.slides.backends.choice import Choice, Part, choose
from engine.slides.resolution import (
    Claim,
    Claims,
    geotiff_claim,
    imagej_claim,
    ome_xml_claims,
    tiff_claim,
)
from engine.slides.samples.masks import pictures_of
from engine.slides.units import number

_MACRO, _REDUCED, _MASK = 9, 1, 4
"""NewSubfileType of Aperio's macros; its bits of a reduced copy and of a mask."""
_NAME = 40
"""A description up to this length, in one line and no XML or JSON, names its picture."""


def choose_series(tiff: tifffile.TiffFile, name: str, series: int | None) -> tuple[Any, Choice]:
    """Return tifffile's series that is read, and what is to be said of the choice.

    A page that is a smaller copy of another one, of a writer that does not mark its pyramid, counts as no picture.
    Raises: SlideError `no_such_series`, or `unsupported` if the picture lies in another file.
    """
    found = pictures_of(tiff)
    parts = [_part(one) for one in found]
    if series is None and not tiff.is_ome:
        largest = max(range(len(parts)), key=lambda i: (parts[i].size[0] * parts[i].size[1], -i))
        order = [largest, *(i for i in range(len(parts)) if i != largest)]
        by_size = sorted(order[1:], key=lambda i: -parts[i].size[0])
        kept = plausible_levels([parts[i].size for i in (largest, *by_size)])
        copies = {(largest, *by_size)[i] for i in kept[1:]}
        parts = [Part(p.name, p.size, p.aside or i in copies) for i, p in enumerate(parts)]
    choice = choose(name, parts, series)
    if first_page(found[choice.index]).parent is not tiff:
        raise SlideError(
            "unsupported",
            f"{name}: its px must lie in the file itself; they lie in another file of a set. Write the set as one "
            "file, or read the file that holds them.",
        )
    return found[choice.index], choice


def _part(series: Any) -> Part:
    page = first_page(series)
    kind = int(page.subfiletype or 0)
    words = (page.description or "").split("\n", 2)[:2]  # Aperio's second line begins with label or macro
    said = series.name or ""
    if (page.description or "").startswith("Aperio") and len(words) == 2 and words[1][:5] in ("label", "macro"):
        said = said or words[1][:5]
    elif not said and len(page.description or "") <= _NAME and not set("<{\n") & set(page.description or ""):
        said = page.description or ""  # as "macro" or "label image"
    size = series.keyframe.imagelength, series.keyframe.imagewidth
    return Part(said, size, kind == _MACRO or bool(kind & (_REDUCED | _MASK)))


def first_page(series: Any) -> Any:
    """Return the first page of a series with its own tags."""
    page = series.pages[0] if series.pages[0] is not None else series.keyframe
    return page.aspage() if isinstance(page, tifffile.TiffFrame) else page


def claims_of(tiff: tifffile.TiffFile, series: Any) -> Claims:
    """Return what the file says of the µm/px and the objective of a series."""
    page = first_page(series)
    claims: list[Claim | None] = []
    objective, passed = None, ()
    if (page.description or "").startswith("Aperio"):
        said = dict(part.split("=", 1) for part in page.description.split("|") if "=" in part)
        said = {key.strip(): value.strip() for key, value in said.items()}
        mpp, objective = number(said.get("MPP")), number(said.get("AppMag"))
        claims += [Claim("aperio.MPP", mpp, mpp)] if mpp else []
    if tiff.ome_metadata:
        image = ome_image(tiff.ome_metadata, series)
        if image is None:
            passed = ("its OME-XML describes no picture of this size at this place",)
        else:
            ome = ome_xml_claims(tiff.ome_metadata, image)
            claims += ome.mpp
            objective = objective or ome.objective
    tags = [page.tags.get(key) for key in ("XResolution", "YResolution", "ResolutionUnit")]
    x, y, unit = (tag.value if tag is not None else None for tag in tags)
    claims.append(imagej_claim(x, y, tiff.imagej_metadata if tiff.is_imagej else None))
    claims += [geotiff_claim(page.geotiff_tags), tiff_claim(x, y, unit)]
    return Claims(tuple(c for c in claims if c is not None), objective, passed)


def channels_of(tiff: tifffile.TiffFile, series: Any) -> list[str]:
    """Return what the file says of three channels of a series: dyes or names, else the colours they are shown in."""
    image = ome_image(tiff.ome_metadata, series) if tiff.ome_metadata else None
    found: list[str] = []
    names, colours = [], []
    for channel in [] if image is None else image.iter():
        if channel.tag.rpartition("}")[2] != "Channel":
            continue
        names.append(channel.attrib.get("Fluor") or channel.attrib.get("Name") or "")
        colour = channel.attrib.get("Color")
        # A signed 32-bit number, RGBA.
        signed = colour is not None and colour.lstrip("-").isdigit()
        colours.append(f"{int(colour) >> 8 & 0xFFFFFF:06x}" if signed else "")  # type: ignore[arg-type]
    imagej: Any = (tiff.imagej_metadata if tiff.is_imagej else None) or {}
    labels = [str(label) for label in imagej.get("Labels") or []]
    shown = [bytes(np.asarray(table)[:, -1]).hex() for table in imagej.get("LUTs") or []]
    for said in (names, colours, labels, shown):
        found = found or (said if len(said) == 3 and any(said) else [])
    return found


def ome_image(text: str, series: Any) -> ElementTree.Element | None:
    """Return the Image of OME-XML that describes a series: by its size, and by its page where sizes are alike.

    None if none does, or if several that differ in what they say could.
    """
    try:
        root = ElementTree.fromstring(text)
    except ElementTree.ParseError:
        return None
    size = str(series.keyframe.imagewidth), str(series.keyframe.imagelength)
    images = [node for node in root.iter() if node.tag.rpartition("}")[2] == "Image"]
    pixels = {id(image): _pixels(image) for image in images}
    fitting = [
        image for image in images
        if (found := pixels[id(image)]) is not None and (found.get("SizeX"), found.get("SizeY")) == size
    ]  # fmt: skip
    index = first_page(series).index
    here = [image for image in fitting if isinstance(index, int) and index in _pages(pixels[id(image)])]
    if len(here or fitting) == 1:
        return (here or fitting)[0]
    scales = {tuple(_scale(pixels[id(image)])) for image in here or fitting}
    return (here or fitting)[0] if len(scales) == 1 else None


def _pixels(image: ElementTree.Element) -> ElementTree.Element | None:
    return next((node for node in image if node.tag.rpartition("}")[2] == "Pixels"), None)


def _scale(pixels: Any) -> list[str | None]:
    return [pixels.get(f"PhysicalSize{axis}{what}") for axis in "XY" for what in ("", "Unit")]


def _pages(pixels: Any) -> set[int]:
    """Return the pages that TiffData elements name."""
    found: set[int] = set()
    for node in pixels:
        if node.tag.rpartition("}")[2] == "TiffData" and "IFD" in node.attrib:
            first, count = node.attrib["IFD"], node.attrib.get("PlaneCount", "1")
            if first.isdigit() and count.isdigit():
                found.update(range(int(first), int(first) + max(1, int(count))))
    return found
