"""The published per-file form of a training set, read and written: three small files per patch.

BRCA: MAG/⌊i / 10⁶⌋/i_vae.npy (3, 64, 64), i_uni_grid.npy (D, h·h) and i_img.npy, the bytes of a PNG or JPEG as uint8.
NAIP: MAG/i_vae.npy, i_dino_grid.npy (h·h, D) and i.jpg; folders of a million are read there too.
The form says neither which networks made it nor which slide a patch is of: the first is taken from the model that the
caller names, and numbers stand for places. Source: the data loaders published with ZoomLDM.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engine.core.errors import UNREADABLE, PreparedError, PreparedMismatchError
from engine.core.files import LOCK, RunLock, disk_error, write_atomically
from engine.datasets.dataset import PreparedSet
from engine.datasets.schema import IMAGE_SHAPE, LATENT_SHAPE, SLIDE, SetFacts, SlideFacts, read_slide_facts
from engine.datasets.writer import PatchPlan, PreparedWriter, open_set, slide_folder

PER_FOLDER = 1_000_000
PER_PART = 2**16
"""Patches of one part of an imported set, which stands where a slide would."""
PER_BLOCK = 64
WORST_SHARE = 0.25
"""A part with a larger share of unusable latents is refused."""
EXPORT = "export.json"
VAE = "_vae.npy"
GRIDS = {"brca": "_uni_grid.npy", "naip": "_dino_grid.npy"}


def import_set(source: Path, out: Path, shared: SetFacts) -> dict[str, int]:
    """Take over a set in the per-file form; return the patches that are there by magnification.

    Run again to continue. A latent that is not finite float (3, 64, 64) is left out and counted as dropped, as the
    published loader does.
    Raises: PreparedMismatchError if the SSL grids are not `shared.ssl_dim` wide; PreparedError if nothing is there, a
    grid is missing or of another size, some pictures are missing, too many latents are unusable, or what was imported
    before is not what lies there now; CanvasError if the disk refuses.
    """
    found = {name: _numbers(source / name) for name in shared.magnifications}
    if not any(found.values()):
        raise PreparedError(
            f"{source} must hold folders {', '.join(shared.magnifications)} with files such as 0{VAE}; it has none. "
            "Check the path and --domain."
        )
    with RunLock(out, "out"):
        open_set(out, shared)
        counts = {}
        for name, stems in found.items():
            numbers = sorted(stems)
            parts = [numbers[i : i + PER_PART] for i in range(0, len(numbers), PER_PART)]
            counts[name] = sum(_import_part(out, shared, name, i, [stems[n] for n in p]) for i, p in enumerate(parts))
    return counts


def _numbers(folder: Path) -> dict[int, Path]:
    """Return the patches of a magnification: number → path without its ending."""
    files = [*folder.glob(f"*{VAE}"), *folder.glob(f"*/*{VAE}")]
    stems = [(file.name.removesuffix(VAE), file) for file in files]
    return {int(stem): file.with_name(stem) for stem, file in stems if stem.isdecimal()}


def _import_part(out: Path, shared: SetFacts, name: str, number: int, stems: Sequence[Path]) -> int:
    """Import some patches as if they were a slide; return how many are there."""
    slide = f"published_{name}_{number:05d}"
    digest = _digest(stems)
    if (slide_folder(out, slide) / SLIDE).is_file():
        known = read_slide_facts(out, slide)
        if known.source_digest != digest:
            raise PreparedError(
                f"{stems[0].parent} must hold the patches that {slide} was imported of; they are others now, "
                f"{len(stems)} from {stems[0].name} to {stems[-1].name}. Remove {slide_folder(out, slide)} to import "
                "them again, or name another --out."
            )
        return known.counts[name]
    side = _read_grid(stems[0], shared).shape[-1]
    if side > shared.scale.factor(name):
        raise PreparedError(
            f"{stems[0]}{GRIDS[shared.domain]} must cover at most {shared.scale.factor(name)} cells on each axis at "
            f"{name}; it has {side}. Check that the folder is of this magnification."
        )
    images = _has_pictures(stems, shared.domain)
    facts = SlideFacts(
        slide=slide, path=str(stems[0].parent), size=(0, 0), mpp=(shared.base_mpp, shared.base_mpp),
        mpp_source="imported", source_digest=digest, cells=None, counts={}, images=images,
        grid_sides={name: side}, reader="files",
    )  # fmt: skip
    places = np.array([(int(stem.name), 0) for stem in stems], np.int32)
    plan = PatchPlan(np.zeros((0, 0), np.bool_), {name: places}, {name: np.ones(len(stems), np.float32)})
    writer = PreparedWriter(out, shared, facts, plan)
    for block, first in enumerate(range(0, len(stems), PER_BLOCK)):
        if block not in writer.done:
            some = stems[first : first + PER_BLOCK]
            arrays: dict[str, NDArray[Any]] = {"latents": np.stack([_read_latent(stem) for stem in some])}
            arrays["grids"] = np.stack([_read_grid(stem, shared, side) for stem in some])
            if images:
                arrays["images"] = np.stack([_read_picture(_picture(stem, shared.domain)) for stem in some])
            writer.write(block, patches=(name, first, arrays))
    bad = writer.damaged()[name]
    if bad.mean() > WORST_SHARE:
        raise PreparedError(
            f"{stems[0].parent}: at most {WORST_SHARE:.0%} of the latents may be unusable; {bad.mean():.0%} are not "
            f"finite float {LATENT_SHAPE}, the first {stems[int(bad.argmax())]}{VAE}. Check the folder, then remove "
            f"{slide_folder(out, slide)}."
        )
    return writer.finish().counts[name]


def _digest(stems: Sequence[Path]) -> str:
    """Return the SHA-256 of the patches' names and the first and the last latent, wherever their folder lies.

    It tells that patches came, went or are of another set without reading them all.
    """
    sha = hashlib.sha256("\n".join(stem.name for stem in stems).encode())
    for stem in (stems[0], stems[-1]):
        sha.update(_read_latent(stem).tobytes())
    return sha.hexdigest()


def _has_pictures(stems: Sequence[Path], domain: str) -> bool:
    """Raises: PreparedError if only some patches have theirs: a set without images cannot train an autoencoder, and
    nobody would learn why."""
    missing = [stem for stem in stems if not _picture(stem, domain).is_file()]
    if 0 < len(missing) < len(stems):
        raise PreparedError(
            f"all patches of a part must have their picture, or none; {len(missing)} of {len(stems)} have none, the "
            f"first {_picture(missing[0], domain)}. Restore it, or remove the patch."
        )
    return not missing


def _read_latent(stem: Path) -> NDArray[np.float16]:
    """Return a latent, or NaN throughout if it is not usable."""
    bad = np.full(LATENT_SHAPE, np.nan, np.float16)
    try:
        latent = np.load(f"{stem}{VAE}", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return bad
    if latent.shape != LATENT_SHAPE or latent.dtype.kind != "f":
        return bad
    with np.errstate(over="ignore"):
        narrow = latent.astype(np.float16)
    return narrow if np.isfinite(narrow).all() else bad


def _read_grid(stem: Path, shared: SetFacts, side: int | None = None) -> NDArray[np.float16]:
    """Return the SSL grid (D, h, h). Raises: PreparedError, PreparedMismatchError."""
    path = f"{stem}{GRIDS[shared.domain]}"
    try:
        grid = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise PreparedError(
            f"{path} must be a readable .npy file; {error}. Restore it, or remove the patch."
        ) from error
    if shared.domain == "naip" and grid.ndim == 2:
        grid = grid.T
    grid = grid.reshape(len(grid), -1)  # (D,) is one cell
    h = round(grid.shape[1] ** 0.5)
    if len(grid) != shared.ssl_dim:
        raise PreparedMismatchError(
            f"{path} must hold vectors of {shared.encoder!r}, {shared.ssl_dim} wide; they are {len(grid)} wide. Name "
            "the model that they were made for (--model.source, --model.variant)."
        )
    if h * h != grid.shape[1] or (side is not None and h != side) or not np.isfinite(grid).all():
        wanted = "a square of cells" if side is None else f"{side}x{side} cells, as the first grid does"
        raise PreparedError(f"{path} must hold {wanted}, finite; it holds {grid.shape[1]}. Remove the patch.")
    return grid.reshape(-1, h, h).astype(np.float16)


def _picture(stem: Path, domain: str) -> Path:
    return stem.with_name(f"{stem.name}_img.npy" if domain == "brca" else f"{stem.name}.jpg")


def _read_picture(path: Path) -> NDArray[np.uint8]:
    try:
        data = np.load(path, allow_pickle=False).tobytes() if path.suffix == ".npy" else path.read_bytes()
        with Image.open(io.BytesIO(data)) as picture:
            pixels = np.asarray(picture.convert("RGB"))
    except UNREADABLE as error:
        raise PreparedError(f"{path} must hold a PNG or JPEG; {error}. Restore it, or remove the patch.") from error
    if pixels.shape != IMAGE_SHAPE:
        raise PreparedError(f"{path} must be {IMAGE_SHAPE}; it is {pixels.shape}. Remove the patch.")
    return pixels


def export_set(folder: Path, out: Path) -> dict[str, int]:
    """Write a prepared set in the per-file form of its domain; return the patches by magnification.

    Run again to continue. Latents and grids are the same float16 numbers; pictures are PNG (BRCA) or JPEG (NAIP).
    Raises: PreparedError if the set is damaged, or `out` holds another one; CanvasError if the disk refuses.
    """
    prepared = PreparedSet(folder)
    domain = prepared.facts.domain
    try:
        out.mkdir(parents=True, exist_ok=True)
        with RunLock(out, "export_to"):
            _claim(out, prepared)
            for level, name in enumerate(prepared.magnifications):
                for i in range(prepared.count(level)):
                    stem = out / name / str(i) if domain == "naip" else out / name / str(i // PER_FOLDER) / str(i)
                    if not Path(f"{stem}{VAE}").exists():  # the last of a patch's files
                        stem.parent.mkdir(parents=True, exist_ok=True)
                        _export_patch(prepared, level, i, stem)
    except OSError as error:
        raise disk_error(error, f"{out} cannot be written", out.parent) from error
    return {name: prepared.count(level) for level, name in enumerate(prepared.magnifications)}


def _claim(out: Path, prepared: PreparedSet) -> None:
    """Note what is exported here, so that a resume cannot mix two sets. Raises PreparedError."""
    record, path = {"set": prepared.digest, "folder": str(prepared.folder)}, out / EXPORT
    others = [p.name for p in out.iterdir() if not p.name.startswith(".") and p.name != LOCK]
    try:
        known = json.loads(path.read_bytes()).get("set") if path.is_file() else None
    except (ValueError, AttributeError):
        known = None
    if others and known != prepared.digest:
        raise PreparedError(f"{out} must be empty or hold an export of the same set; it holds {', '.join(others[:5])}.")
    write_atomically(path, json.dumps(record).encode())


def _export_patch(prepared: PreparedSet, level: int, index: int, stem: Path) -> None:
    domain, example = prepared.facts.domain, prepared.example(level, index)
    grid = example.grid.reshape(len(example.grid), -1).astype(np.float16)
    if prepared.has_images:
        pixels, file = Image.fromarray(prepared.image(level, index)), io.BytesIO()
        pixels.save(file, "PNG" if domain == "brca" else "JPEG", **({} if domain == "brca" else {"quality": 95}))
        data = np.frombuffer(file.getvalue(), np.uint8)
        _write(_picture(stem, domain), lambda p: np.save(p, data) if domain == "brca" else p.write(data.tobytes()))
    _write(Path(f"{stem}{GRIDS[domain]}"), lambda p: np.save(p, grid if domain == "brca" else grid.T))
    _write(Path(f"{stem}{VAE}"), lambda p: np.save(p, example.latent.astype(np.float16)))


def _write(path: Path, save: Callable[[Any], object]) -> None:
    """Write a file that appears whole. Not durably: an fsync for each of millions of files would take days."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        save(file)
    os.replace(partial, path)
