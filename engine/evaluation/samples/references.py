"""What else crops are set against: the same place of another picture, and the training set.

Invariant: a pair shows one field, so both pictures must have one size. It does not know figures.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.core.errors import EngineError
from engine.datasets.dataset import PreparedSet
from engine.evaluation.samples.crops import MOST_CROPS, CropRule
from engine.evaluation.samples.sets import PictureSet, open_pictures
from engine.evaluation.samples.vectors import encode, encode_set
from engine.model.encoders.base import SSLEncoder

Pixels = NDArray[np.uint8]


def pair_vectors(
    a: PictureSet, b: PictureSet, rule: CropRule, encoder: SSLEncoder, batch: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the vectors (n, D) of crops of A, and of the same places of the pictures of equal name in B.

    Two single pictures are a pair whatever their names. Raises: EngineError if there is no pair or sizes differ.
    """
    partner = _partners(a, b, rule)
    alone = PictureSet(a.where, [a.sources[i] for i in partner], [], a.mpp)
    numbers = list(partner.values())
    found: list[list[NDArray[np.float32]]] = [[], []]
    pairs = _pairs(alone, b, numbers, rule)
    while part := list(islice(pairs, batch)):
        for side in (0, 1):
            found[side].append(encode(encoder, np.stack([pair[side] for pair in part]), batch))
    return np.concatenate(found[0]), np.concatenate(found[1])


def _pairs(a: PictureSet, b: PictureSet, numbers: list[int], rule: CropRule) -> Iterator[tuple[Pixels, Pixels]]:
    # What is tissue in A must be judged in B too, even where B lost it.
    every = replace(rule, min_tissue=0.0)
    for crop in a.crops(rule):
        other = b.read(numbers[crop.source], crop.y, crop.x, every)
        if other is not None:
            yield crop.pixels, other.pixels


def _partners(a: PictureSet, b: PictureSet, rule: CropRule) -> dict[int, int]:
    """Return which picture of B belongs to which of A."""
    if len(a.sources) == len(b.sources) == 1:
        found = {0: 0}
    else:
        named = {source.name: i for i, source in enumerate(b.sources)}
        found = {i: named[source.name] for i, source in enumerate(a.sources) if source.name in named}
    if not found:
        raise EngineError(
            f"pairs need pictures of equal name; {a.where} and {b.where} share none ({a.sources[0].name}, … and "
            f"{b.sources[0].name}, …). Rename them, or leave --paired out."
        )
    for i, j in found.items():
        sizes = [[side * s.mpp / rule.mpp for side in s.size] for s in (a.sources[i], b.sources[j])]
        if any(abs(one - two) > 1 for one, two in zip(*sizes, strict=True)):
            raise EngineError(
                f"a pair must show one field; {a.sources[i].path} covers {sizes[0][1]:.0f} x {sizes[0][0]:.0f} px of "
                f"{rule.mpp:g} µm/px and {b.sources[j].path} {sizes[1][1]:.0f} x {sizes[1][0]:.0f}. Crop one of them."
            )
    return found


def training_vectors(
    path: Path, rule: CropRule, mpp: float | None, encoder: SSLEncoder, digest: str, batch: int
) -> NDArray[np.float32]:
    """Return vectors (n, D) of a training set, pictures or a prepared set with its images: at most MOST_CROPS crops.

    Raises: EngineError if it holds nothing at the rule's µm/px; PreparedError without images.
    """
    rule = replace(rule, count=None)
    if not (path / "dataset.json").is_file():
        pictures = open_pictures(path, mpp)
        pictures.drop_coarser(rule.mpp)
        return encode_set(pictures, rule, encoder, digest, batch=batch).vectors
    prepared = PreparedSet(path)
    scale = prepared.facts.scale
    levels = [i for i, name in enumerate(scale.names) if abs(scale.mpp(name) / rule.mpp - 1) <= 0.01]
    if not levels or not prepared.count(levels[0]):
        told = ", ".join(f"{scale.mpp(name):g}" for name in scale.names)
        raise EngineError(f"{path} must have patches of {rule.mpp:g} µm/px; it has {told}. Name one with --crop_mpp.")
    count = prepared.count(levels[0])
    chosen = np.sort(np.random.default_rng(rule.seed).permutation(count)[:MOST_CROPS])
    found = []
    for first in range(0, len(chosen), batch):
        images = [prepared.image(levels[0], int(i)).transpose(2, 0, 1) for i in chosen[first : first + batch]]
        found.append(encode(encoder, np.ascontiguousarray(np.stack(images)), batch))
    return np.concatenate(found)
