"""Finished bags of a folder written for another program, in the layout it reads."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engine.core.errors import BagError, EngineError
from engine.core.files import disk_error, write_atomically
from engine.features.bag_export import Layout, bag_files, write_layout
from engine.features.bag_reader import BagFile, find_bags

MANIFEST = "zoomldm_export.json"
"""Lists what this command wrote into a folder, so that it replaces its own files and nobody else's."""


@dataclass(frozen=True)
class ExportFeaturesConfig:
    """Which features to export, how and where to."""

    run: str
    """Output folder of an extraction; may be given first, without --run."""
    layout: Layout
    """trident (also read by Patho-Bench and torchmil), clam or stamp."""
    magnification: float = 20.0
    """20 or 5: the tiles of one magnification become one export."""
    features: str = "features"
    """Folder of bags in RUN; others exist when several encoders were used."""
    out: str | None = None
    """Folder to write into; None takes RUN/exports/LAYOUT."""

    def __post_init__(self) -> None:
        if not self.magnification > 0:
            raise ValueError(f"magnification must be positive, such as 20 or 5; got {self.magnification}.")
        if Path(self.features).name != self.features:
            raise ValueError(f"features must be the name of a folder in RUN; got {self.features!r}.")

    @property
    def scale(self) -> str:
        """The magnification's name in bags: 20.0 → "20x"."""
        return f"{self.magnification:g}x"


def export_features(config: ExportFeaturesConfig) -> tuple[Path, int]:
    """Write the export; return its folder and the number of slides. Raises EngineError."""
    bags = [BagFile(path) for path in find_bags(Path(config.run) / config.features)]
    if not bags:
        raise EngineError(f"{config.run}/{config.features} must hold bags (*.h5); it holds none. Extract slides first.")
    out = Path(config.run) / "exports" / config.layout if config.out is None else Path(config.out)
    check_bags(bags, config.scale)
    planned = [path for bag in bags for path in bag_files(out, config.layout, bag, config.scale)]
    claim(out, planned)
    for bag in bags:
        with bag:
            try:
                write_layout(out, config.layout, bag, config.scale)
            except OSError as error:
                raise disk_error(error, f"{out} cannot be written", out) from error
    return out, len(bags)


def check_bags(bags: Sequence[BagFile], scale: str) -> None:
    """Refuse what one export cannot hold: two slides of one name, several encoders, a missing magnification."""
    names = Counter(bag.attributes.slide for bag in bags)
    name, count = names.most_common(1)[0]
    if count > 1:
        files = [bag.path.name for bag in bags if bag.attributes.slide == name]
        raise BagError(
            f"slides must have different names, for each becomes one file; {' and '.join(files)} are both of "
            f"{name!r}. Remove one."
        )
    settings = {(b.attributes.encoder, b.attributes.weights_sha256, b.attributes.block, b.attributes.timestep): b.path
                for b in bags}  # fmt: skip
    if len(settings) > 1:
        one, other = list(settings.values())[:2]
        raise BagError(
            f"all features of an export must come from one encoder; {one.name} and {other.name} differ in encoder, "
            "weights, block or timestep. Export them from separate folders."
        )
    for bag in bags:
        bag.shape(scale)  # raises where the magnification is missing
        bag.close()


def claim(out: Path, planned: Sequence[Path]) -> None:
    """Note the files of an export before the first is written. Raises BagError if another program's is there."""
    manifest = out / MANIFEST
    try:
        ours = set(json.loads(manifest.read_text())["files"]) if manifest.is_file() else set()
        names = [path.relative_to(out).as_posix() for path in planned]
        foreign = [name for name in names if name not in ours and (out / name).exists()]
        if foreign:
            raise BagError(
                f"{out} must not hold {foreign[0]} of another program; it does, and {len(foreign) - 1} more. Choose "
                "another --out."
            )
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(manifest, json.dumps({"files": sorted(ours | set(names))}, indent=1).encode())
    except (ValueError, KeyError, TypeError) as error:
        raise BagError(f"{manifest} must list what was exported; it is damaged ({error}). Remove {out}.") from error
    except OSError as error:
        raise disk_error(error, f"{out} cannot be written", out.parent) from error
