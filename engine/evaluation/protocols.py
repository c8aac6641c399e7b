"""The tables of two papers, drawn as they drew them, for whoever has weights and a reference set.

Invariant: a row says how its samples were drawn and against how many it was measured. It does not know pages.
Source: ZoomLDM (CVPR 2025): patches magnification by magnification, 50 DDIM steps, s = 1 + w = 2. Large-Image-Diffusion
(CVPR 2024): patch FID, crop FID (crops at random places of large pictures), CLIP FID (whole pictures, reduced) and the
similarity of embeddings to conditions; its large pictures are runs of configs/panorama.yaml.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.conditions.patch_sampler import PatchSampler
from engine.core.errors import EngineError
from engine.core.progress import Progress
from engine.core.runtime import choose_device
from engine.core.units import TILE_PX
from engine.datasets.dataset import PreparedSet
from engine.evaluation.compare import Comparison, compare
from engine.evaluation.config import QualityConfig
from engine.evaluation.measures.figures import set_figures
from engine.evaluation.samples.crops import MOST_CROPS
from engine.evaluation.samples.encoders import CLIP, NAMES, open_encoder
from engine.evaluation.samples.sets import open_pictures
from engine.evaluation.samples.vectors import VectorSet, blur, encode
from engine.generation.run import describe, stored_config
from engine.model.encoders.base import SSLEncoder
from engine.model.zoomldm import ZoomLDM
from engine.sampling.pixels import to_uint8

STEPS, SCALE = 50, 2.0
"""Of ZoomLDM's patch sampler: DDIM steps, and s = 1 + w."""


@dataclass(frozen=True)
class Row:
    """One figure of a table."""

    what: str
    value: float | None
    n_a: int
    n_b: int
    floor: float | None
    how: str


def zoomldm_table(config: QualityConfig, progress: Progress) -> Comparison:
    """Draw patches with the model A at every magnification that the prepared set B has, and compare them with B.

    Conditions are those of B's own patches, spread evenly. Raises: EngineError without a prepared set with images of
    the model's encoder; CheckpointError.
    """
    if config.b is None or not (Path(config.b) / "dataset.json").is_file():
        raise EngineError(
            f"protocol zoomldm needs a model as A and a prepared set with images as B; got {config.b}. Make one with "
            "python -m engine.prepare --keep_images true."
        )
    prepared, device = PreparedSet(config.b), choose_device(config.device)
    if not prepared.has_images:
        raise EngineError(f"{config.b} must hold images; it has none. Prepare it again with --keep_images true.")
    model = ZoomLDM.from_pretrained(config.a, config.variant).to(device)
    prepared.require(encoder=model.config.encoder, ssl_dim=model.config.ssl_dim)
    encoder = open_encoder(*config.seen_by, device)
    found = Comparison(config, {"encoder": encoder.id, "encoder_sha256": encoder.digest, "seed": config.seed})
    for level, name in enumerate(prepared.magnifications):
        available = prepared.count(level)
        if available < 4:
            found.warnings.append(f"{name}: {available} patches in {config.b}, too few for a figure.")
            continue
        progress.say(f"{name}: drawing")
        drawn = _drawn(model, prepared, level, config, encoder)
        real = _real(prepared, level, config, encoder)
        figure = set_figures(drawn, real, config)[0]
        how = f"ddim, {STEPS} steps, s = {SCALE:g}, conditions of B"
        found.table.append(Row(f"patch {figure.name}, {name}", figure.value, len(drawn), len(real), figure.floor, how))
    return found


def _spread(available: int, wanted: int | None) -> list[int]:
    count = min(available, wanted or MOST_CROPS)
    return [i * available // count for i in range(count)]


def _drawn(model: ZoomLDM, prepared: PreparedSet, level: int, config: QualityConfig, encoder: SSLEncoder) -> VectorSet:
    sampler = PatchSampler("ddim", STEPS, SCALE, config.seed)
    index = model.config.scale.index(prepared.magnifications[level])
    # As many patches as asked for, even where B has fewer conditions: noise differs.
    available = prepared.count(level)
    rows = [i % available for i in range(config.count)] if config.count else _spread(available, None)
    vectors = []
    for first in range(0, len(rows), config.batch):
        cells = [prepared.example(level, row).grid for row in rows[first : first + config.batch]]
        vectors.append(encode(encoder, to_uint8(sampler.draw(model, cells, index, first)), config.batch))
    return _as_set("model", np.concatenate(vectors), encoder, prepared, level, None)


def _real(prepared: PreparedSet, level: int, config: QualityConfig, encoder: SSLEncoder) -> VectorSet:
    vectors, soft = [], []
    for pixels in _images(prepared, level, _spread(prepared.count(level), None), config.batch):
        vectors.append(encode(encoder, pixels, config.batch))
        soft.append(encode(encoder, blur(pixels), config.batch))
    return _as_set(str(prepared.folder), np.concatenate(vectors), encoder, prepared, level, np.concatenate(soft))


def _images(prepared: PreparedSet, level: int, rows: list[int], batch: int) -> Iterator[NDArray[np.uint8]]:
    for first in range(0, len(rows), batch):
        images = [prepared.image(level, row).transpose(2, 0, 1) for row in rows[first : first + batch]]
        yield np.ascontiguousarray(np.stack(images))


def _as_set(
    where: str, vectors: NDArray[np.float32], encoder: SSLEncoder, prepared: PreparedSet, level: int,
    soft: NDArray[np.float32] | None,
) -> VectorSet:  # fmt: skip
    mpp = prepared.facts.scale.mpp(prepared.magnifications[level])
    return VectorSet(where, vectors, encoder.id, "", mpp, {}, soft)


def large_image_table(config: QualityConfig, progress: Progress) -> Comparison:
    """Compare a folder of runs with pictures: patch FID, crop FID, CLIP FID and embedding similarity.

    Raises: EngineError for anything but runs of one size as A, or without Inception or CLIP.
    """
    runs = open_pictures(Path(config.a), config.mpp)
    sides = {min(source.size) for source in runs.sources}
    if not runs.runs or len(sides) > 1 or config.b is None or config.inception is None or config.clip is None:
        raise EngineError(
            "protocol large-image-diffusion needs runs of one size as A, pictures as B, --inception FILE and --clip "
            f"FOLDER; got {len(runs.runs)} runs of sides {sorted(sides)}. Make them with configs/panorama.yaml."
        )
    count = config.patches or 1000
    found = compare(replace(config, patches=count, protocol=None), progress)
    how = found.facts["crop_rule"]
    crop = found.figures[0]
    patch = found.patches.get("distances", {}).get("frechet", {}).get("patches")
    drawn = found.patches["drawn"]
    found.table = [
        Row("patch FID", patch, found.patches.get("cells_with_tissue", 0), crop.n_b, crop.floor, drawn),
        Row("crop FID", crop.value, crop.n_a, crop.n_b, crop.floor, how),
    ]
    whole = found.facts["mpp"] * sides.pop() / TILE_PX
    looks = replace(config, inception=None, encoder=CLIP, encoder_source=config.clip, crop_mpp=whole, patches=0)
    far = compare(replace(looks, protocol=None, min_tissue=0.0), progress)
    clip = far.figures[0]
    found.table.append(Row("CLIP FID", clip.value, clip.n_a, clip.n_b, clip.floor, far.facts["crop_rule"]))
    found.table.append(_similarity(config, runs.runs[0], progress))
    return found


def _similarity(config: QualityConfig, run: Path, progress: Progress) -> Row:
    """Compare cells of the runs with their conditions, in the encoder that the conditions are of."""
    own = describe(stored_config(run).model).encoder
    if own not in NAMES:
        how = f"not measured: the conditions are vectors of the encoder {own!r}, which this project has no network of"
        return Row("embedding similarity", None, 0, 0, None, how)
    alone = replace(config, b=None, encoder=own, inception=None, patches=0, protocol=None)
    canvases = compare(alone, progress).canvases
    similar = [c.similarity for c in canvases if c.similarity is not None]
    if not similar:
        return Row("embedding similarity", None, 0, 0, None, f"not measured: {canvases[0].note}")
    values = [s.value for s in similar if s.value is not None]
    floors = [s.floor for s in similar if s.floor is not None]
    cells = sum(s.n_a for s in similar)
    mean, floor = (float(np.mean(found)) if found else None for found in (values, floors))
    return Row("embedding similarity", mean, cells, cells, floor, f"{own}, cells and their conditions")


PROTOCOLS = {"zoomldm": zoomldm_table, "large-image-diffusion": large_image_table}


def evaluate(config: QualityConfig, progress: Progress) -> Comparison:
    """Do what the config asks for: a protocol's table, or a comparison. Raises as `compare`."""
    return compare(config, progress) if config.protocol is None else PROTOCOLS[config.protocol](config, progress)
