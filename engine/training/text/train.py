"""Training of the text prior: captioned SSL grids → loss → averaged weights in a folder beside the model's.

Invariant: a batch is a pure function of (seed, step), so that a killed run goes on to the same weights. All grids of a
batch are cut to one size, so that nothing is padded. It does not know command lines or pixels.
Source: squared error of x0, cosine schedule, times drawn at random, texts dropped at random (as engine.training.cdm).
"""

import logging
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import EngineError
from engine.core.runtime import keep_freed_memory
from engine.model.cdm import TIMES
from engine.model.cdm_sampler import alpha_bars
from engine.model.encoders.base import digest_of
from engine.model.encoders.registry import describe_encoder
from engine.model.text.prior import TOKENS, WHOLE, TextPrior, TextPriorConfig
from engine.model.text.towers import WORDS, TextTower, less_their_mean, load_tower
from engine.model.text.weights import save_prior
from engine.model.text.words import WordTowerConfig, vocabulary
from engine.model.zoomldm import ZoomLDM
from engine.training.optimisation import Conduct, Optimisation, settle, step_rng
from engine.training.precision import settle_bfloat16
from engine.training.settings import settled
from engine.training.text.captions import SHOWN, CaptionedGrids
from engine.training.text.pictures import PicturedGrids, read_texts_of
from engine.training.text.settings import TextTrainingConfig

log = logging.getLogger(__name__)

Told = CaptionedGrids | PicturedGrids
TEXT_STAGE = 24
_FREE_KEYS = ("store_half", "tower_source")
"""What is written at the end, and where a tower lies; a continued run may change it."""
_HELDOUT = 256
"""Captions that are measured on."""
_BATCH = 32


def train_text(config: TextTrainingConfig) -> None:
    """Train, and write the averaged weights to config.out.

    Raises: EngineError for captions or grids that do not fit, a run folder of other settings, or losses that are not
    finite; CheckpointError for a tower that cannot be had.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory(config.device)
    config = settle_bfloat16(config)
    model = ZoomLDM.from_pretrained(config.source, config.variant)
    data, heldout = open_regions(config, model)
    torch.manual_seed(config.seed)
    prior, tower = _build(config, model, data)
    told_by = [] if prior.config.reads == TOKENS else [digest_of({"text_mean": prior.text_mean})]
    settle(Path(config.run), asdict(config) | {"captions": [data.digest, heldout.digest, *told_by]}, _FREE_KEYS)
    between = standardise(prior, data)
    prior = prior.to(config.device).train()
    learner = _Learner(config, prior, tower, data, between)
    conduct = Conduct(describe=learner.describe, keys={"seed": config.seed})
    optimisation = Optimisation(prior, config.train, Path(config.run) / "text.pt", config.checkpoint_s, conduct=conduct)

    def measured() -> dict[str, float]:
        error = heldout_error(prior, tower, heldout, config, between)
        log.info("step %d: held-out loss %s", optimisation.step, error)
        return error

    optimisation.run_averaged(learner.loss, measured)
    figures = {"config": asdict(config), "steps": optimisation.step, "skipped_steps": optimisation.skipped,
               "minutes": round(optimisation.seconds / 60, 1), "captions": len(data), "left_out": len(data.left_out),
               "heldout_loss": measured(), "torch": torch.__version__}  # fmt: skip
    save_prior(Path(config.out), prior, torch.float16 if config.store_half else None, figures)


def open_regions(config: TextTrainingConfig, model: ZoomLDM) -> tuple[Told, Told]:
    """Return the regions that are learned and those that are only measured on. Raises: EngineError, BagError."""
    where = config.captions
    pictured = [Path(there).is_dir() for there in (where.train, where.heldout)]
    if pictured[0] != pictured[1] or (pictured[0] and config.tower == WORDS):
        raise EngineError(
            "captions.train and captions.heldout must both be tables, or both folders of bags of a CLIP's vision side; "
            f"got {where.train} and {where.heldout} with the tower {config.tower!r}."
        )
    facts = model.config.encoder, model.config.ssl_dim, model.config.base_mpp

    def opened(table: str, grids: str) -> Told:
        if pictured[0]:
            return PicturedGrids(table, grids, config.tower, config.model.window, *facts)
        return CaptionedGrids(table, grids, *facts)

    found = opened(where.train, where.train_grids), opened(where.heldout, where.heldout_grids)
    if isinstance(found[0], PicturedGrids) and isinstance(found[1], PicturedGrids):
        found[1].centre(found[0].mean)
    for table, captions in zip((where.train, where.heldout), found, strict=True):
        for row in captions.left_out[:SHOWN]:
            log.warning("%s, %s is left out: %s", table, row.where, row.reason)
        if len(captions.left_out) > SHOWN:
            log.warning("%s: %d are left out in all", table, len(captions.left_out))
        log.info("%s: %d regions", table, len(captions))
    return found


def _build(config: TextTrainingConfig, model: ZoomLDM, data: Told) -> tuple[TextPrior, TextTower]:
    """Return a new prior and the tower that reads its texts."""
    sizes = config.model
    words, tower, mean = None, None, None
    if isinstance(data, CaptionedGrids) and config.tower == WORDS:
        known = vocabulary(caption.text for caption in data.captions)
        if not known:
            raise EngineError(f"{config.captions.train} must repeat words to learn them; no word occurs twice.")
        words = WordTowerConfig(known, sizes.width, sizes.word_layers)
    else:
        tower = load_tower(config.tower, None, config.tower_source, config.device)
        if isinstance(data, PicturedGrids):
            tower, mean = less_their_mean(tower, read_texts_of(config.captions.texts))
            if len(mean) != len(data.mean):
                raise EngineError(
                    f"the bags must be of the tower's own vision side, {len(mean)} channels; they have "
                    f"{len(data.mean)}. Extract with --encoders [{config.tower}]."
                )
    encoder = None
    if model.config.encoder == "demo":  # others are not loaded for their digest alone
        encoder = describe_encoder("demo", None, model.extras).digest
    prior = TextPrior(
        TextPriorConfig(
            ssl_dim=model.config.ssl_dim, encoder=model.config.encoder, encoder_digest=encoder, tower=config.tower,
            tower_digest=None if tower is None else tower.digest, text_dim=sizes.width if tower is None else tower.dim,
            reads=TOKENS if mean is None else WHOLE, window=sizes.window, width=sizes.width, layers=sizes.layers,
            heads=sizes.heads,
        ),
        words,
    )  # fmt: skip
    if mean is not None:
        prior.text_mean.copy_(mean)
    return prior, load_tower(WORDS, prior) if tower is None else tower


def standardise(prior: TextPrior, data: Told) -> Tensor:
    """Set a prior's mean and spread to those of the described cells.

    Returns how much regions differ in each channel, (D,): the variance of their mean vectors, over its mean.
    """
    rng = step_rng(0, TEXT_STAGE, 0)
    chosen = rng.choice(len(data), size=min(len(data), 2000), replace=False)
    regions = [data.grid(int(i)).reshape(prior.config.ssl_dim, -1) for i in chosen]
    vectors = np.concatenate(regions, axis=1)
    spread = vectors.std(axis=1)
    prior.mean.copy_(torch.from_numpy(vectors.mean(axis=1)))
    prior.spread.copy_(torch.from_numpy(np.maximum(spread, max(float(spread.mean()) / 10, 1e-4))))
    means = np.stack([region.mean(axis=1) for region in regions], axis=1) / prior.spread.numpy()[:, None]
    between = means.var(axis=1)
    return torch.from_numpy((between / max(float(between.mean()), 1e-9)).astype(np.float32))


class _Learner:
    """The loss of a step."""

    def __init__(
        self, config: TextTrainingConfig, prior: TextPrior, tower: TextTower, data: Told, between: Tensor
    ) -> None:
        self.config, self.prior, self.tower, self.data = config, prior, tower, data
        largest = config.model.window
        # By size, the described regions; a larger one is cut to the window at a place of its own in every step.
        self.sizes: dict[tuple[int, int], list[int]] = {}
        for number, caption in enumerate(data.captions):
            size = min(caption.height, largest), min(caption.width, largest)
            self.sizes.setdefault(size, []).append(number)
        self._kinds = sorted(self.sizes)
        shares = np.array([len(self.sizes[size]) for size in self._kinds], float)
        self._shares = shares / shares.sum()
        self._between = between.to(config.device)
        self._alpha_bars = torch.from_numpy(alpha_bars()).float()

    def draw(self, step: int) -> tuple[tuple[int, int], list[int], np.random.Generator]:
        """Return a step's size of grids and its captions; a pure function of the seed and the step."""
        rng = step_rng(self.config.seed, TEXT_STAGE, step + 1)
        size = self._kinds[int(rng.choice(len(self._kinds), p=self._shares))]
        numbers = self.sizes[size]
        return size, [numbers[int(i)] for i in rng.integers(len(numbers), size=self.config.train.batch_size)], rng

    def loss(self, step: int, _part: int) -> tuple[Tensor, dict[str, float]]:
        """Return the mean squared error of the predicted clean grids, standardised."""
        (height, width), numbers, rng = self.draw(step)
        grids = np.stack([_cut(self.data.grid(n), height, width, rng) for n in numbers])
        if rng.random() < 0.5:
            grids = grids[..., ::-1]
        if rng.random() < 0.5:
            grids = grids[..., ::-1, :]
        count, device = len(numbers), self.config.device
        u = (rng.permutation(count) + rng.random(count)) / count
        times = torch.from_numpy((u**self.config.train.time_power * TIMES).astype(np.int64))
        noise = torch.from_numpy(rng.standard_normal(grids.shape, dtype=np.float32))
        dropped = torch.from_numpy(rng.random(count) < self.config.train.drop_text)
        # A copy: of an axis of length one, ascontiguousarray keeps the negative stride.
        x0 = self.prior.standard(torch.from_numpy(grids.copy()).to(device))
        blur = None
        if isinstance(self.data, PicturedGrids):
            blur = rng.standard_normal((count, self.data.told.shape[1]), dtype=np.float32)
            blur *= self.data.spread * self.config.captions.noise
        return self.error(x0, noise.to(device), times.to(device), numbers, dropped.to(device), blur), {}

    def error(
        self,
        x0: Tensor,
        noise: Tensor,
        times: Tensor,
        numbers: list[int],
        dropped: Tensor,
        blur: np.ndarray | None = None,
    ) -> Tensor:
        """Return the loss of regions `numbers`; `blur` is added to the vectors of pictures."""
        alpha_bar = self._alpha_bars.to(x0)[times][:, None, None, None]
        noisy = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
        with torch.autocast(x0.device.type, torch.bfloat16, enabled=settled(self.config.bfloat16)):
            tokens, counts = self._tell(numbers, blur)
            predicted = self.prior(noisy, times, self.prior.read(tokens, counts, dropped))
        missed = predicted.float() - x0
        region = (missed.mean(dim=(2, 3)).square() * self._between).mean()
        return missed.square().mean() + self.config.train.region_weight * region

    def describe(self, step: int) -> str:
        """Name what a step learns, for messages."""
        first = self.data.captions[self.draw(step)[1][0]]
        return f"captions such as {first.text!r} of {first.slide}" if first.text else f"regions such as {first}"

    def _tell(self, numbers: list[int], blur: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Return what regions are told by, as tokens and which of them count."""
        if isinstance(self.data, CaptionedGrids):
            return read_texts(self.prior, self.tower, [self.data.captions[n].text for n in numbers])
        vectors = self.data.told[numbers] + (0 if blur is None else blur)
        tokens = torch.from_numpy(vectors)[:, None].to(self.prior.mean.device)
        return tokens, torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)


def read_texts(prior: TextPrior, tower: TextTower, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return a tower's tokens of texts; gradients flow into the prior's own."""
    if prior.words is None:
        return tower.encode(texts)
    return prior.words(prior.words.numbers(texts).to(prior.mean.device))


def _cut(grid: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Return a part (D, height, width) of a grid at a random place."""
    y, x = (int(rng.integers(have - want + 1)) for have, want in zip(grid.shape[1:], (height, width), strict=True))
    return grid[:, y : y + height, x : x + width]


@torch.no_grad()
def heldout_error(
    prior: TextPrior, tower: TextTower, heldout: Told, config: TextTrainingConfig, between: Tensor
) -> dict[str, float]:
    """Return the loss on held-out captions, with their texts and without: what the text tells."""
    learner = _Learner(config, prior, tower, heldout, between)
    found = {"text": 0.0, "none": 0.0}
    batches = 0
    for step in range(-(-_HELDOUT // _BATCH)):
        (height, width), numbers, rng = learner.draw(step)
        numbers = numbers[:_BATCH]
        grids = np.stack([_cut(heldout.grid(n), height, width, rng) for n in numbers])
        x0 = prior.standard(torch.from_numpy(np.ascontiguousarray(grids)).to(config.device))
        noise = torch.from_numpy(rng.standard_normal(grids.shape, dtype=np.float32)).to(config.device)
        times = torch.from_numpy(((np.arange(len(x0)) + 0.5) / len(x0) * TIMES).astype(np.int64)).to(config.device)
        for name, drop in (("text", False), ("none", True)):
            dropped = torch.full((len(x0),), drop, device=config.device)
            found[name] += float(learner.error(x0, noise, times, numbers, dropped))
        batches += 1
    return {name: round(value / batches, 5) for name, value in found.items()}
