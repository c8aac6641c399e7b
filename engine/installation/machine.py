"""Python, packages, processor, GPU, memory and disks of this machine, and the arithmetic that `auto` chooses on it."""

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import openslide
import psutil
import torch
from huggingface_hub.constants import HF_HUB_CACHE
from packaging.requirements import Requirement

from engine.core.errors import EngineError
from engine.core.runtime import choose_device, choose_dtype, hardware_of
from engine.installation.findings import BROKEN, NOTE, Finding
from engine.model.weights import hub, ldm_import

DISTRIBUTION = "zoomldm-engine"
EXTRAS = {
    "cluster": "Ray's dashboard and `ray up`, `ray submit`",
    "cloud": "canvases and exports in buckets (s3://, gs://, az://)",
    "train": "curves of a training in TensorBoard",
}
"""Optional parts of the installation, and what they are for."""
_GB = 1e9
LEAST_FREE = 5 * _GB
"""Bytes; weights and encoder of the published model alone are 4.8 GB."""
LEAST_SHM = 1 << 30
"""Bytes: a private Ray's object store."""


def python() -> Iterator[Finding]:
    """Yield what runs the project."""
    yield Finding("Python", f"{platform.python_version()} ({sys.executable})")
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    if platform.system() == "Linux":
        yield Finding("system", system)
    else:
        yield Finding("system", system, NOTE, "Only Linux is tested; a container of configs/cluster/Dockerfile is one.")
    memory = psutil.virtual_memory()
    usable, there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(), os.cpu_count()
    yield Finding(
        "cores, memory",
        f"{usable} of {there} CPU cores; {memory.available / _GB:.1f} of {memory.total / _GB:.1f} GB are free",
    )


def packages(distribution: str = DISTRIBUTION) -> Iterator[Finding]:
    """Yield whether what the project needs is installed in the versions it asks for, and which extras are there."""
    try:
        asked = [Requirement(line) for line in metadata.requires(distribution) or []]
    except metadata.PackageNotFoundError:
        yield Finding("packages", f"{distribution} is not installed", BROKEN, "pip install -c constraints.txt -e .")
        return
    needed = [(one, _fault(one)) for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})]
    faults = [fault for _, fault in needed if fault is not None]
    if faults:
        text = f"{len(faults)} of {len(needed)} are wrong: {'; '.join(faults)}"
        yield Finding("packages", text, BROKEN, "pip install -c constraints.txt -e .")
    else:
        yield Finding("packages", f"{len(needed)} of {len(needed)} are there in versions that fit")
    for extra, use in EXTRAS.items():
        wanted = [one for one in asked if one.marker is not None and one.marker.evaluate({"extra": extra})]
        wanted = [one for one in wanted if not one.marker.evaluate({"extra": ""})]  # type: ignore[union-attr]
        lacking = [one.name for one in wanted if _fault(one) is not None]
        subject = f"extra {extra!r}"
        if lacking:
            install = f"pip install -c constraints.txt -e '.[{extra}]'"
            yield Finding(subject, f"absent ({', '.join(lacking)}); it is for {use}", NOTE, install)
        else:
            yield Finding(subject, f"present, for {use}")


def _fault(wanted: Requirement) -> str | None:
    try:
        found = metadata.version(wanted.name)
    except metadata.PackageNotFoundError:
        return f"{wanted.name} is absent"
    return None if wanted.specifier.contains(found, prereleases=True) else f"{wanted.name} {found} is not {wanted}"


def arithmetic() -> Iterator[Finding]:
    """Yield torch, its device, and what model.dtype=auto comes to there."""
    alone = f"{torch.get_num_threads()} threads of its own choice"
    yield Finding("torch", f"{torch.__version__}; each process computes with model.threads=1 unless told, not {alone}")
    hardware = hardware_of(choose_device("auto"))
    try:
        square = torch.eye(4, device=hardware.device)
        works = bool(torch.equal(square @ square, square))
    except RuntimeError as error:
        works, reason = False, str(error).splitlines()[0]
    else:
        reason = "a product of matrices was wrong"
    if works:
        yield Finding("device", f"{hardware.device}: {hardware.name}{_gpu_memory(hardware.device)}")
    else:
        remedy = "Match driver and torch build (nvidia-smi shows the driver), or use --model.device cpu."
        yield Finding("device", f"{hardware.device}: {hardware.name}; {reason}", BROKEN, remedy)
    choice = choose_dtype(hardware)
    yield Finding(
        "bfloat16", f"multiplied by {hardware.bfloat16}" if hardware.bfloat16 else "not multiplied in hardware"
    )
    yield Finding("dtype", f"model.dtype=auto will choose {choice.dtype}: {choice.reason}")


def _gpu_memory(device: str) -> str:
    if device != "cuda":
        return "; torch sees no GPU" if not torch.cuda.is_available() else ""
    free, total = torch.cuda.mem_get_info()
    return f", {free / _GB:.1f} of {total / _GB:.1f} GB free; {torch.cuda.device_count()} GPU(s)"


def readers() -> Iterator[Finding]:
    """Yield the library of scanner formats, and the embedded model."""
    yield Finding("OpenSlide", f"{openslide.__library_version__} (openslide-python {openslide.__version__})")
    try:
        scale = ldm_import.read(hub.locate("demo")).config.scale
    except EngineError as error:
        yield Finding("demo model", str(error), BROKEN, "Install the package again.")
    else:
        yield Finding("demo model", f"whole; magnifications {', '.join(scale.names)}")


def disks() -> Iterator[Finding]:
    """Yield the free space where the engine and its libraries write."""
    ray = os.environ.get("RAY_TMPDIR", "/tmp")
    places = {
        "this folder": Path.cwd(),
        "Hub's cache": Path(HF_HUB_CACHE),
        "Ray's folder": Path(ray),
        "temporary": Path(tempfile.gettempdir()),
    }
    for subject, path in places.items():
        there = next(p for p in (path, *path.parents) if p.exists())
        free = shutil.disk_usage(there).free
        text = f"{free / _GB:.1f} GB free in {path}"
        if not os.access(there, os.W_OK):
            state = BROKEN if subject in ("this folder", "temporary") else NOTE
            yield Finding(subject, f"{text}, which is not writable", state, "Choose another one, or allow writing.")
        elif free < LEAST_FREE:
            yield Finding(subject, f"{text}, less than {LEAST_FREE / _GB:g} GB", NOTE, "Free some before a long run.")
        else:
            yield Finding(subject, text)
    yield _shared_memory(Path("/dev/shm"))


def _shared_memory(path: Path) -> Finding:
    if not path.is_dir():
        return Finding("/dev/shm", "absent: Ray keeps its objects on a disk, slower", NOTE)
    total = shutil.disk_usage(path).total
    if total < LEAST_SHM:
        remedy = "Give a container more: docker run --shm-size 8g."
        return Finding("/dev/shm", f"{total / 2**30:.2f} GiB: Ray keeps its objects on a disk, slower", NOTE, remedy)
    return Finding("/dev/shm", f"{total / 2**30:.1f} GiB")
