"""The published recipe and ours on the same weights and conditions: what does each cost, and what does it draw?

    python -m benchmarks.sampling.published [--canvas 512] [--references 1] [--previews DIR] [--json FILE]

The published one is configs/brca_published.yaml's: all levels at one t, ten inexact-Newton corrections a tile and step,
tiles without overlap, then the seam removal and its dense decoding. Ours is configs/demo.yaml. Both run on the embedded
model in this process. Prints the figures of benchmarks.sampling.guidance for both, and theirs over ours.
"""

import json
from pathlib import Path

from benchmarks.sampling.guidance import RECIPES, measure, prepare_references
from benchmarks.support.arguments import figures_parser, write_json
from engine.core.runtime import pin_arithmetic

COSTS = ("unet_calls", "autoencoder_calls", "seconds")


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--canvas", type=int, default=512, help="px of the canvas")
    parser.add_argument("--references", type=int, default=1, help="held-out phantoms")
    parser.add_argument("--previews", type=Path, help="folder for the canvases")
    arguments = parser.parse_args()
    pin_arithmetic(2)
    references = prepare_references(arguments.references, arguments.canvas)
    rows = {}
    for name in ("demo", "published"):
        # A 512 px canvas gets a 5x guide, as one of 1024 px does: ratio 4 is the smallest of the published recipe.
        recipe = RECIPES[name] | {"canvas.levels": "[5x,20x]"}
        rows[name] = measure(name, recipe, references, arguments.canvas, arguments.previews)
        print(json.dumps(rows[name]), flush=True)
    times = {key: round(float(str(rows["published"][key])) / float(str(rows["demo"][key])), 1) for key in COSTS}
    print(json.dumps({"published over ours": times}))
    write_json(arguments.json, {**rows, "published over ours": times})


if __name__ == "__main__":
    main()
