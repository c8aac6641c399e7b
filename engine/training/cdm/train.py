"""Training of the CDM: stored summaries → loss → averaged weights in a folder beside the model's.

Invariant: a batch is a pure function of (seed, step), so that a killed run goes on to the same weights. It does not
know command lines or pixels. The variance channels of the published layout are not trained: sampling has eta = 0 and
reads none of them.
Source: ZoomLDM (CVPR 2025), CDM: squared error of x0, cosine schedule, times drawn at random.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.core.errors import EngineError
from engine.core.runtime import keep_freed_memory
from engine.model.cdm import CDM, TIMES, CDMConfig
from engine.model.cdm_sampler import alpha_bars
from engine.model.summarizer import CELL_TOKENS, Summarizer
from engine.model.weights.cdm import conditioner_digest, save_cdm, write_published
from engine.model.zoomldm import ZoomLDM
from engine.training.cdm.settings import CDMOptimiserSettings, CDMTrainingConfig
from engine.training.cdm.summaries import Summaries, Windows, open_windows, store_summaries
from engine.training.checkpoints import write_atomically
from engine.training.optimisation import Conduct, Optimisation, settle, step_rng
from engine.training.precision import settle_bfloat16
from engine.training.settings import settled

log = logging.getLogger(__name__)

CDM_STAGE = 21
_FREE_KEYS = ("published", "store_half")
"""What is written at the end, and how; a continued run may change it."""
_BANDS = 4


def train_cdm(config: CDMTrainingConfig) -> None:
    """Make the summaries that are missing, train, and write the averaged weights to config.out.

    Raises: EngineError for grids that do not fit, a run folder of other settings, or losses that are not finite.
    """
    torch.set_num_threads(config.threads)
    keep_freed_memory(config.device)
    config = settle_bfloat16(config)
    run, model = Path(config.run), _open_model(config)
    sizes = cdm_config(model, config)
    sources, counts = find_windows(model, config)
    learned = {"conditioner": sizes.conditioner, "windows": [source.digest for source in sources]}
    settle(run, asdict(config) | learned, _FREE_KEYS)
    train, heldout = (
        store_summaries(model, source, wanted, config.seed, run / "summaries" / name)
        for source, wanted, name in zip(sources, counts, ("train", "heldout"), strict=True)
    )
    torch.manual_seed(config.seed)
    cdm = CDM(sizes)
    if sizes.standardised:
        standardise(cdm, train)
    cdm = cdm.to(config.device).train()
    conduct = Conduct(describe=lambda step: name_rows(train, config, model.config.magnifications, step))
    optimisation = Optimisation(cdm, config.train, run / "cdm.pt", config.checkpoint_s, conduct=conduct)

    def loss_of(step: int, _part: int) -> tuple[Tensor, dict[str, float]]:
        return x0_loss(
            cdm, *draw_batch(train, config.train, config.seed, step, config.device), settled(config.bfloat16)
        )

    def measured() -> dict[str, list[float]]:
        errors = heldout_errors(cdm, heldout, config.device)
        log.info("step %d: held-out x0 error %s", optimisation.step, errors)
        return errors

    optimisation.run_averaged(loss_of, measured)
    minutes = round(optimisation.seconds / 60, 1)
    write(cdm, config, {"steps": optimisation.step, "skipped_steps": optimisation.skipped, "minutes": minutes,
                        "heldout_x0_mse": measured(), "torch": torch.__version__})  # fmt: skip


def _open_model(config: CDMTrainingConfig) -> ZoomLDM:
    """Raises: EngineError for a model without a Summarizer."""
    model = ZoomLDM.from_pretrained(config.source, config.variant, config.device)
    if not isinstance(model.conditioner, Summarizer):
        raise EngineError(
            f"A CDM learns the summaries of a Summarizer; {config.source} has a {model.config.conditioner.kind} "
            "conditioner. Take a model with several magnifications."
        )
    return model


def standardise(cdm: CDM, train: Summaries) -> None:
    """Set a CDM's mean and spread, per magnification and entry, to those of the summaries it learns from."""
    for level, some in enumerate(train):
        rows = np.asarray(some, np.float32)
        spread = rows.std(axis=0)
        cdm.mean[level] = torch.from_numpy(rows.mean(axis=0))
        # An entry that hardly varies must not become noise of the size of the others.
        cdm.spread[level] = torch.from_numpy(np.maximum(spread, max(float(spread.mean()) / 10, 1e-4)))


def cdm_config(model: ZoomLDM, config: CDMTrainingConfig) -> CDMConfig:
    """Return the sizes of the CDM that belongs to a model."""
    return CDMConfig(
        tokens=CELL_TOKENS + 1,
        channels=model.config.conditioner.output_dim,
        magnifications=len(model.config.magnifications),
        conditioner=conditioner_digest(model.conditioner.state_dict()),
        **asdict(config.model),
    )


def find_windows(model: ZoomLDM, config: CDMTrainingConfig) -> tuple[list[Windows], list[tuple[float, ...]]]:
    """Return the windows to learn from and those to measure on, and how many of each magnification are wanted.

    Raises: EngineError for a magnification without windows, and for lists of another length than the magnifications.
    """
    levels, settings = len(model.config.magnifications), config.summaries
    per_magnification("train.magnification_weights", config.train.magnification_weights, levels)
    counts = [
        per_magnification("summaries.per_magnification", settings.per_magnification, levels),
        (settings.heldout_per_magnification,) * levels,
    ]
    found: list[Windows] = []
    for pattern in (settings.train, settings.heldout):
        windows = open_windows(pattern, model.config.encoder, model.config.ssl_dim, model.config.scale)
        for level, name in enumerate(model.config.magnifications):
            if not windows.count(level):
                k = model.config.scale.factor(name)
                raise EngineError(
                    f"at {name} a window covers {k} x {k} cells; nothing in {pattern} is as large. Encode larger "
                    "regions, or train on a model without that magnification."
                )
        found.append(windows)
    return found, counts


def per_magnification(key: str, values: tuple[float, ...], levels: int) -> tuple[float, ...]:
    """Return one value per magnification. Raises EngineError unless there is one, or one for each."""
    if len(values) not in (1, levels):
        raise EngineError(f"{key} must have one number, or {levels}: one per magnification; got {len(values)}.")
    return values * levels if len(values) == 1 else values


def draw_batch(
    data: Summaries, settings: CDMOptimiserSettings, seed: int, step: int, device: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw a step's clean summaries (B, T, C), noise, times (B,) and magnifications (B,).

    Times are stratified (one u per 1/B wide stratum, shuffled), which removes most of the loss's noise.
    """
    rng, size = step_rng(seed, CDM_STAGE, step), settings.batch_size
    levels, rows = draw_rows(data, settings, rng)
    x0 = np.stack([data[level][row] for level, row in zip(levels, rows, strict=True)]).astype(np.float32)
    u = (rng.permutation(size) + rng.random(size)) / size
    noise = rng.standard_normal(x0.shape, dtype=np.float32)
    times = (u**settings.time_power * TIMES).astype(np.int64)
    arrays = (x0, noise, times, levels)
    return tuple(torch.from_numpy(a).to(device) for a in arrays)  # type: ignore[return-value]


def draw_rows(
    data: Summaries, settings: CDMOptimiserSettings, rng: np.random.Generator
) -> tuple[np.ndarray, list[int]]:
    """Draw which summaries a step learns: magnifications (B,), and numbers within them."""
    shares = np.array(per_magnification("train.magnification_weights", settings.magnification_weights, len(data)))
    levels = rng.choice(len(data), size=settings.batch_size, p=shares / shares.sum())
    return levels, [int(rng.integers(len(data[level]))) for level in levels]


def name_rows(data: Summaries, config: CDMTrainingConfig, names: Sequence[str], step: int) -> str:
    """Say which summaries a step learns, for messages: rows of the files in the run's folder."""
    levels, rows = draw_rows(data, config.train, step_rng(config.seed, CDM_STAGE, step))
    drawn = ", ".join(f"{names[level]} row {row}" for level, row in zip(levels, rows, strict=True))
    return f"{drawn} of {config.run}/summaries/train"


def noisy(x0: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    """Return x_t (B, T, C) of the cosine schedule at times (B,)."""
    alpha_bar = torch.from_numpy(alpha_bars()).to(x0)[times][:, None, None]
    return alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise


def x0_loss(
    cdm: CDM, x0: Tensor, noise: Tensor, times: Tensor, magnifications: Tensor, bfloat16: bool
) -> tuple[Tensor, dict[str, float]]:
    """Return the mean squared error of the predicted clean summaries, standardised as the CDM sees them."""
    x0 = cdm.standard(x0, magnifications)
    with torch.autocast(x0.device.type, torch.bfloat16, enabled=bfloat16):
        predicted = cdm.predict_x0(noisy(x0, noise, times), times, magnifications)
    return (predicted.float() - x0).square().mean(), {}


@torch.no_grad()
def heldout_errors(cdm: CDM, heldout: Summaries, device: str, count: int = 64) -> dict[str, list[float]]:
    """Return the held-out squared error of x0, one number per quarter of the times, by magnification index."""
    found = {}
    for level, some in enumerate(heldout):
        rng = step_rng(0, CDM_STAGE + 1, level)
        x0 = torch.from_numpy(np.asarray(some[:count], np.float32)).to(device)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, dtype=np.float32)).to(device)
        errors = []
        for band in range(_BANDS):
            times = torch.from_numpy((band + (np.arange(len(x0)) + 0.5) / len(x0)) * TIMES / _BANDS).long().to(device)
            loss, _ = x0_loss(cdm, x0, noise, times, torch.full_like(times, level), bfloat16=False)
            errors.append(round(float(loss), 6))
        found[str(level)] = errors
    return found


def write(cdm: CDM, config: CDMTrainingConfig, figures: dict[str, object]) -> None:
    """Write what users load: our layout with training.json, and the published file if one is asked for."""
    dtype = torch.float16 if config.store_half else None
    save_cdm(config.out, cdm, dtype, {"config": asdict(config), **figures})
    if config.published is not None:
        write_atomically(Path(config.published), lambda partial: write_published(partial, cdm))
