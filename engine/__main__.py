"""The command `zoomldm`: one name for all commands, each of which has a module of its own, too.

    zoomldm generate --config configs/demo.yaml
    zoomldm generate --redo 512,256,300,300 --seed 1 runs/demo
    zoomldm train-mil --task hrd --features runs/features/features --labels labels.csv

It imports the command that is asked for, and nothing before. Exit codes are the command's; 2 for an unknown one.
"""

import sys
from collections.abc import Sequence
from importlib import import_module

from engine.core.exits import print_anywhere

COMMANDS = {
    "generate": ("generate_large", "one large, coherent picture; with --redo a region of it again"),
    "cohort": ("engine.generate_cohort", "many pictures or bags as one job, with labels"),
    "superres": ("engine.superres", "a picture enlarged"),
    "sample": ("engine.sample", "single tiles at one magnification"),
    "export": ("engine.export", "the picture of a run for another program"),
    "view": ("engine.view", "runs, slides and folders of them in a browser"),
    "quality": ("engine.quality", "how good pictures are"),
    "extract": ("engine.extract_features", "features of a folder of slides"),
    "export-features": ("engine.export_features", "features for other programs"),
    "prepare": ("engine.prepare", "a training set from a folder of slides"),
    "train": ("engine.train", "a ZoomLDM, its autoencoder, a CDM or a text prior"),
    "train-mil": ("mil.train", "a classifier of slides from features"),
    "predict-mil": ("mil.predict", "a trained classifier's probabilities"),
    "compare-mil": ("mil.compare", "two studies on one page"),
    "augment-mil": ("mil.augment", "whether synthetic bags help, beside controls"),
    "probe": ("mil.probe", "plain classifiers on vectors of pictures"),
    "heatmap-mil": ("mil.heatmap", "where a classifier looks"),
    "doctor": ("engine.doctor", "what this machine offers, and what is broken"),
    "parity": ("engine.parity", "reference activations of a checkpoint, replayed"),
    "phantom-slides": ("engine.phantom_slides", "synthetic slides"),
    "phantom-cohort": ("engine.phantom_cohort", "synthetic slides of patients with labels"),
    "phantom-captions": ("engine.phantom_captions", "synthetic regions that say what they show"),
}
"""Name → its module, which has `main(argv)`, and what it makes."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that the first word names; return its exit code. None takes this process's words."""
    print_anywhere()
    name, *rest = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        sys.stdout.write(usage())
        return 0
    if name == "--version":
        from engine import __version__

        sys.stdout.write(f"zoomldm-engine {__version__}\n")
        return 0
    if name not in COMMANDS:
        sys.stderr.write(f"zoomldm: the command must be one of {', '.join(COMMANDS)}; got {name!r}.\n")
        return 2
    return int(import_module(COMMANDS[name][0]).main(rest))


def usage() -> str:
    """Return what --help prints: every command with what it makes."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (_, what) in COMMANDS.items()]
    return "\n".join(["usage: zoomldm COMMAND ...", "", *lines, "", "zoomldm COMMAND --help explains its keys.", ""])


if __name__ == "__main__":
    sys.exit(main())
