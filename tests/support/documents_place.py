"""A folder with small inputs under the names that documents use: slides/, labels.csv, rows.csv, RUN, MODEL, DIR."""

import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import tifffile
import torch

from engine.model.cdm import CDM, CDMConfig
from engine.model.encoders.demo import DemoEncoder
from engine.model.encoders.texture import RAW_DIM
from engine.model.weights.cdm import save_cdm
from engine.model.zoomldm import ZoomLDM
from engine.slides.phantom.render import Phantom
from tests.support.known_cohort import read_table, write_cohort, write_table
from tests.support.known_prepared import FACTS, write_set
from tests.support.tiny_run import store_model

MAGNIFICATIONS = ("20x", "10x", "5x", "2.5x", "1.25x", "0.625x", "0.3125x", "0.15625x")
"""Of the published BRCA model, which configs/brca.yaml and the demo's begin from or lie within."""
PATIENTS = 24


def write_model(folder: Path) -> None:
    """Write a random tiny model, with an encoder and a CDM of its own, as folder/model."""
    model = ZoomLDM.from_pretrained(store_model(folder, encoder="demo", magnifications=MAGNIFICATIONS))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = DemoEncoder(torch.zeros(RAW_DIM), torch.randn(RAW_DIM, 16) / 10)
        cdm = CDM(CDMConfig(65, 32, len(MAGNIFICATIONS), width=16, layers=1, heads=2))
    model.extras["encoder/model"] = encoder.tensors()
    model.save_pretrained(folder / "model")
    save_cdm(folder / "model/cdm", cdm)


def write_slide(path: Path, seed: int, px: int, mpp: float = 0.5) -> None:
    """Write a TIFF of phantom tissue without glass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    resolution = {"resolution": (1e4 / mpp,) * 2, "resolutionunit": "CENTIMETER"}
    pixels = Phantom(seed, architecture=0.5).render(0, 0, px, px, mpp)
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", **resolution)


def write_study(folder: Path) -> None:
    """Write features of a known cohort, where the documents have theirs, and tables of labels for both tasks."""
    cohort = write_cohort(folder, PATIENTS)
    rows = [{**row, "subtype": "ILC" if float(row["hrd_score"]) >= 50 else "IDC"} for row in read_table(cohort.labels)]
    for name in ("labels.csv", "table.csv"):
        write_table(folder / name, rows)  # type: ignore[arg-type]
    for copy in ("runs/features/features", "runs/new/features", "new_features"):
        shutil.copytree(cohort.features, folder / copy)
    for thumbnails in ("thumbnails", "runs/features/thumbnails"):
        (folder / thumbnails).mkdir()
        PIL.Image.new("RGB", (80, 60), "white").save(folder / thumbnails / "P001-S0.jpg")


def write_place(folder: Path) -> None:
    """Write all inputs that documented commands name and that no other documented command makes."""
    write_model(folder)
    np.save(folder / "cells.npy", np.random.default_rng(0).normal(size=(16, 1, 1)).astype(np.float32))
    pixels = Phantom(0, architecture=0.5).render(0, 0, 1024, 1024, 0.5)
    for name in ("region.jpeg", "area.jpg", "my_region.jpeg"):
        PIL.Image.fromarray(pixels).save(folder / name)
    for name in ("picture_5x.png", "picture.png"):
        PIL.Image.fromarray(pixels).resize((64, 64)).save(folder / name)
    for number in range(2):
        write_slide(folder / f"slides/s{number}.tiff", number, 640)
    (folder / "rows.csv").write_text('name,reference,region,label,source_patient\na,s0,"0,0,256,256",ILC,P0\n')
    write_study(folder)
    write_set(folder / "data", FACTS)
    names = {"DIR": "slides", "SLIDES": "slides", "PICTURES": "slides", "A": "slides", "B": "slides", "MODEL": "model"}
    for name, target in (names | {"RUN": "runs/seed1"}).items():
        (folder / name).symlink_to(folder / target)
