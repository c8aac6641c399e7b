"""Reference activations of the networks beside a ZoomLDM, replayed: an SSL encoder in UNI's form, a CDM.

They call the same functions as a run. Source: activations of the published implementations with small random weights.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from engine.core.errors import CheckpointError
from engine.model.cdm_sampler import denoise_summaries, respaced_times
from engine.model.encoders.vit import UNI, load_vit
from engine.model.weights.cdm import read_published
from engine.parity_checks.activations import PARTS_TOLERANCE, Check, Expected, relative

CDM_HEADS = 4
"""Of the small reference CDM, whose file and width do not say it."""


def replay_encoder(folder: Path, e: Expected, device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Replay an SSL encoder in UNI's form, whose sizes lie beside it. Raises CheckpointError if they do not fit."""
    name = "encoder.cls"
    if name not in e:
        return
    try:
        sizes = json.loads((folder / "config.json").read_bytes())
        width, depth, heads = (int(sizes[key]) for key in ("embed_dim", "depth", "num_heads"))
        spec = replace(UNI, width=width, depth=depth, heads=heads, patch_px=int(sizes["patch_size"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}/config.json must say the encoder's embed_dim, depth, num_heads and patch_size; got {error!r}. "
            "Fetch the folder again."
        ) from error
    network = load_vit(spec, folder, device, dtype).network
    tokens = network(pixel_values=e["encoder.image"].to(device, dtype)).last_hidden_state
    yield Check(name, relative(tokens[:, 0], e[name]), PARTS_TOLERANCE)


def replay_cdm(folder: Path, e: Expected, device: str, dtype: torch.dtype) -> Iterator[Check]:
    """Replay a CDM's forward pass and its DDIM steps; the references have channels before tokens."""
    cdm = read_published(folder / "cdm.pt", CDM_HEADS).to(device, dtype)
    labels = e["cdm.y"].long().to(device)
    if "cdm.forward" in e:
        ours = cdm(e["cdm.x"].mT.to(device, dtype), e["cdm.t"].to(device), labels)
        yield Check("cdm.forward", relative(ours.mT, e["cdm.forward"]), PARTS_TOLERANCE)
    for name in sorted(n for n in e if re.fullmatch(r"cdm\.ddim\d+\.out", n)):
        run = name.removesuffix(".out")
        times = respaced_times(int(run.removeprefix("cdm.ddim")))
        yield Check(f"{run}.timesteps", relative(torch.tensor(times), e[f"{run}.timesteps"]), PARTS_TOLERANCE)
        ours = denoise_summaries(cdm, e[f"{run}.z"].mT, labels, times)
        yield Check(name, relative(ours.mT, e[name]), PARTS_TOLERANCE)
