"""Where a model's files lie: the embedded demo, a local folder, or the Hugging Face Hub and its cache.

It reads no weights. A missing file is never waited for: one look at the Hub, then a message with the way out.
Source: huggingface_hub (HF_HUB_OFFLINE, HF_HOME and the login are honoured by the library itself).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, whichever the library uses
    RepositoryNotFoundError,
)

from engine.core.errors import CheckpointError

LDM_FILES = ("weights.ckpt", "config.yaml")
OUR_CONFIG = "config.json"
NETWORK_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "conditioner": "conditioner/model.safetensors",
}
CDM_FILES = ("cdm/config.json", "cdm/model.safetensors")
"""What a model folder holds where it carries a CDM; read only when asked for (locate_cdm)."""
TEXT_FILES = ("text/config.json", "text/model.safetensors")
"""And where it carries a text prior (locate_text)."""
OUR_FILES = (OUR_CONFIG, *NETWORK_FILES.values())
VARIANTS = {"StonyBrook-CVLab/ZoomLDM": ("brca", "naip")}
"""Hub repositories that keep several models in folders."""
DEMO = Path(__file__).parents[1] / "demo"
_OUR_PATTERNS = (OUR_CONFIG, "unet/*", "vae/*", "conditioner/*", "guidance/*", "encoder/*")
_LOOK_UP_S = 10.0


def locate(source: str | Path, variant: str | None = None, flag: str = "--model.source") -> Path:
    """Return the folder that holds a model in one of the two layouts.

    `source` is "demo", a folder, or a Hub id ("StonyBrook-CVLab/ZoomLDM"); `variant` a folder inside it ("brca"). A
    folder of that name wins over the Hub. `flag` is what messages tell the user to pass.
    Raises: CheckpointError saying what is missing and how to get it.
    """
    if str(source) == "demo":
        if not DEMO.is_dir():
            raise CheckpointError(f"The embedded demo model must lie in {DEMO}; it does not. Reinstall the package.")
        return _layout_in(DEMO, variant)
    if Path(source).is_dir():
        return _layout_in(Path(source), variant)
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise CheckpointError(
            f"{flag} must be 'demo', an existing folder or a Hub id (owner/name); got {str(source)!r}, which is none."
        )
    variant_flag = flag.rpartition(".")[0] + ".variant"
    if variant is None and str(source) in VARIANTS:
        raise CheckpointError(f"{source} holds {' and '.join(VARIANTS[str(source)])}; choose one with {variant_flag}.")
    prefix = f"{variant}/" if variant else ""
    way = _WayOut(
        repo_id=str(source),
        what=f"The model {source} (no folder of that name here)",
        files=tuple(prefix + name for name in LDM_FILES),
        flags=f"{flag} FOLDER" + (f" {variant_flag} {variant}" if variant else ""),
    )
    root = _fetch(way, [prefix + name for name in (*LDM_FILES, *_OUR_PATTERNS)])
    folder = root / variant if variant else root
    if not has_layout(folder):
        raise CheckpointError(way.message(f"the copy in {folder} lacks them"))
    return folder


def locate_cdm(source: str | Path, variant: str | None = None) -> Path | None:
    """Return the folder of the CDM that a model carries in our layout, fetched if the model is the Hub's, or None.

    Raises: CheckpointError as `locate`.
    """
    return _locate_carried(source, variant, CDM_FILES, "The CDM")


def locate_text(source: str | Path, variant: str | None = None) -> Path | None:
    """Return the folder of the text prior that a model carries, fetched if the model is the Hub's, or None.

    Raises: CheckpointError as `locate`.
    """
    return _locate_carried(source, variant, TEXT_FILES, "The text prior")


def _locate_carried(source: str | Path, variant: str | None, files: tuple[str, ...], what: str) -> Path | None:
    """Return the folder of a network that a model may carry. It is fetched apart: replicas do not need it."""
    folder = locate(source, variant)
    if not _has_all(folder, files) and str(source) != "demo" and not Path(source).is_dir():
        prefix = f"{variant}/" if variant else ""
        way = _WayOut(
            str(source), f"{what} of {source}", tuple(prefix + name for name in files), "--model.source FOLDER"
        )
        root = _fetch(way, list(way.files))
        folder = root / variant if variant else root
    return folder / Path(files[0]).parent if _has_all(folder, files) else None


def locate_files(repo_id: str, filenames: Sequence[str], what: str, flag: str) -> Path:
    """Return a folder that holds `filenames` of a Hub repository, from the cache or fetched now.

    `what` names the thing in messages ("the SSL encoder UNI"); `flag` is the option that takes a folder instead.
    Raises: CheckpointError naming the missing files, the command that fetches them and the flag.
    """
    way = _WayOut(repo_id, what, tuple(filenames), f"{flag} FOLDER")
    folder = _fetch(way, list(filenames))
    missing = [name for name in filenames if not (folder / name).is_file()]
    if missing:
        raise CheckpointError(way.message(f"the copy in {folder} lacks {', '.join(missing)}"))
    return folder


@dataclass(frozen=True)
class _WayOut:
    """What is wanted from which repository, and the flags that name a local copy ("--x FOLDER")."""

    repo_id: str
    what: str
    files: tuple[str, ...]
    flags: str

    def message(self, reason: str) -> str:
        target = Path("checkpoints") / self.repo_id.split("/")[1]
        return (
            f"{self.what} needs {' and '.join(self.files)} of the Hub's {self.repo_id}; {reason}.\n"
            f"On a machine with a network: hf download {self.repo_id} {' '.join(self.files)} --local-dir {target}\n"
            f"Then bring that folder here and pass {self.flags.replace('FOLDER', str(target))}."
        )

    def locked(self, state: str) -> str:
        return (
            f"{self.what} needs https://huggingface.co/{self.repo_id}, which {state}. Ask for access on that page, "
            "log in with `hf auth login` (or set HF_TOKEN) and run this again; or bring a folder with "
            f"{' and '.join(self.files)} here and pass {self.flags}."
        )


def _fetch(way: _WayOut, patterns: list[str]) -> Path:
    try:
        # Not hf_hub_download: without a network it retries for 23 s where this answers in 0.03 s.
        return Path(snapshot_download(way.repo_id, allow_patterns=patterns, etag_timeout=_LOOK_UP_S))
    except GatedRepoError as error:
        raise CheckpointError(way.locked("is gated")) from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(way.locked("does not exist or is private")) from error
    except (HTTPError, OSError) as error:
        if isinstance(error, HfHubHTTPError) and error.response.status_code in (401, 403):
            raise CheckpointError(way.locked("is gated")) from error
        cause = str(error).splitlines()[0].rstrip(".")
        raise CheckpointError(way.message(f"they are not in the local cache and the Hub gave {cause!r}")) from error


def _layout_in(root: Path, variant: str | None) -> Path:
    """Return the folder of a model below a local root, or say which files it lacks."""
    folder = root / variant if variant else root
    if has_layout(folder):
        return folder
    found = sorted(p.name for p in root.iterdir() if p.is_dir() and has_layout(p))
    if found:
        raise CheckpointError(f"{root} holds the variants {', '.join(found)}; choose one of them, got {variant}.")
    ours = (folder / OUR_CONFIG).is_file()
    missing = [name for name in (OUR_FILES if ours else LDM_FILES) if not (folder / name).is_file()]
    raise CheckpointError(
        f"{folder} must hold a model: {' and '.join(LDM_FILES)} (as published) or what save_pretrained wrote; "
        f"missing: {', '.join(missing)}."
    )


def has_layout(folder: Path) -> bool:
    """Say whether the folder holds all files of either layout."""
    return any(_has_all(folder, names) for names in (LDM_FILES, OUR_FILES))


def _has_all(folder: Path, names: Sequence[str]) -> bool:
    return all((folder / name).is_file() for name in names)
