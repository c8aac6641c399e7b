"""The SSL grid of a text, drawn by the model's text prior.

Invariant: the grid is a function of the prior, its tower, the texts and where they hold, the shape, steps, weight and
seed; the digest is of all these. It does not know canvases or files of runs.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from engine.conditions.text_map import read_text_map, whole
from engine.core.errors import CheckpointError, EngineError
from engine.core.progress import Progress
from engine.model.encoders.base import digest_of
from engine.model.text.sampler import TextRegions, sample_grid
from engine.model.text.towers import TextTower, load_tower
from engine.model.text.weights import load_prior
from engine.model.zoomldm import ZoomLDM
from engine.sampling.config import RunConfig
from engine.sampling.plan import Plan

_NAMED = 8
"""Unknown words that a message names."""


@dataclass(frozen=True)
class TextSource:
    """A grid that is asked for in words."""

    decides: bytes
    """What decides it."""
    draw: Callable[[], np.ndarray]
    """Returns it, float32 (D, H, W)."""
    said: tuple[str, str, list[str]]
    """Name of the tower, digest of the prior, and the texts."""


def text_source(config: RunConfig, model: ZoomLDM, plan: Plan, device: str, progress: Progress) -> TextSource:
    """Return the source of the grid that config.text and config.text_map ask for.

    Raises: EngineError for texts or regions that cannot be meant; CheckpointError without a prior or its tower.
    """
    section = config.model
    prior = load_prior(section.source, section.variant, section.text_source, model.config, device)
    tower = load_tower(prior.config.tower, prior, section.text_tower_source, device)
    if tower.digest != prior.config.tower_digest or tower.dim != prior.config.text_dim:
        raise CheckpointError(
            f"the text prior was trained with the tower {prior.config.tower!r} of {prior.config.text_dim} channels "
            f"(weights {str(prior.config.tower_digest)[:12]}); this one has {tower.dim} ({str(tower.digest)[:12]}). "
            "Pass the right one with --model.text_tower_source."
        )
    if config.text_map is None:
        assert config.text is not None
        found = whole(config.text, plan.grid_shape)
    else:
        found = read_text_map(config.text_map, config.text, plan.size_px, model.config.base_mpp)
    for text in (*found.texts, *([config.negative_text] if config.negative_text else [])):
        check_text(text, tower, progress)
    facts = (found.texts, config.negative_text, config.text_steps, config.text_weight, plan.grid_shape)
    digest = digest_of(prior.state_dict())
    decides = digest.encode() + repr(facts).encode() + found.masks.tobytes()

    def draw() -> np.ndarray:
        progress.say(f"drawing the grid of {len(found.texts)} text(s): the prior takes {config.text_steps} steps")
        with torch.no_grad():
            texts = prior.read(*tower.encode(found.texts))
            negative = config.negative_text and prior.read(*tower.encode([config.negative_text]))
        regions = TextRegions(texts, found.masks, negative or None)
        grid = sample_grid(prior, regions, config.text_steps, config.text_weight, config.sampling.seed)
        return grid.cpu().numpy()

    return TextSource(decides, draw, (tower.id, digest, list(found.texts)))


def check_text(text: str, tower: TextTower, progress: Progress) -> None:
    """Refuse a text of which nothing can be read, and say what of it is not. Raises: EngineError."""
    length, most = tower.length(text)
    unknown = tower.unknown(text)
    if not text.strip() or length == 0:
        raise EngineError(
            f"the text must have words that the tower {tower.id!r} knows; {text!r} has none. {_known(tower)}"
        )
    if unknown:
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        progress.say(f"the text tower does not know {', '.join(unknown[:_NAMED])}{more}: left out. {_known(tower)}")
    if length > most:
        progress.say(f"a text counts up to {most} words; {text[:40]!r}… has {length}: the rest is left out.")


def _known(tower: TextTower) -> str:
    return f"It knows: {', '.join(tower.vocabulary)}." if tower.vocabulary else ""
