"""Whose features tell the label: encoders alone and joined, at both scales and at each, on the same folds.

    python -m benchmarks.mil.encoders --labels TABLE.csv --features texture=FOLDER demo=FOLDER zoomldm=FOLDER \
        [--joins texture+demo texture+zoomldm] [--work FOLDER] [--json FILE]

FOLDERs are those of one extraction (`engine.extract_features --encoders ...`), so that rows are the same tiles. A join
puts the vectors of a tile behind each other. Settings are those of configs/demo_mil.yaml. Printed: AUROC of the tested
patients with its 95 % interval, and by how much both scales are above each one (paired). What is done already in
--work is kept.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.support.arguments import ROOT, figures_parser, write_json
from engine.core.cli import parse
from engine.core.runtime import one_by_one
from engine.features.bag_reader import BagFile, find_bags
from engine.features.bag_writer import BagWriter
from mil.folds.config import StudyConfig
from mil.report.comparison import Comparison, compare, contenders
from mil.study import prepare, run

SCALES = {"both": "20,5", "20x": "20", "5x": "5"}


def join_bags(folders: list[Path], out: Path) -> None:
    """Write bags whose tiles have the vectors of all folders behind each other; those that are there are kept."""
    for path in find_bags(folders[0]):
        if (out / path.name).is_file():
            continue
        bags = [BagFile(folder / path.name) for folder in folders]
        plan = bags[0].plan()
        for bag in bags[1:]:
            for scale in plan.scales:
                np.testing.assert_array_equal(bag.coords(scale.name), scale.coords, "tiles of one extraction")
        named = replace(plan.attributes, encoder="+".join(bag.attributes.encoder for bag in bags),
                        weights_sha256="+".join(bag.attributes.weights_sha256 for bag in bags))  # fmt: skip
        width = sum(bag.shape(plan.scales[0].name)[1] for bag in bags)
        writer = BagWriter(out / path.name, replace(plan, attributes=named, width=width))
        for scale in plan.scales:
            valid = np.logical_and.reduce([bag.valid(scale.name) for bag in bags])
            joined = np.concatenate([bag.features(scale.name) for bag in bags], axis=1)
            writer.write(scale.name, 0, joined, valid)
        writer.finish()


def judge(features: Path, labels: str, work: Path) -> Comparison:
    """Learn from both scales and from each; return their figures on the same patients."""
    folders = []
    for name, scales in SCALES.items():
        folder = work / name
        given = {"features": features, "labels": labels, "scales": scales, "output.folder": folder}
        flags = [f"--{key}={value}" for key, value in given.items()]
        config = parse(
            [f"--config={ROOT / 'configs/demo_mil.yaml'}", "--slides=null", *flags], StudyConfig, "mil", "one study"
        )
        run(prepare(config), one_by_one, lambda _: None)
        folders.append(folder)
    return compare(contenders(folders, baseline=True))


def main() -> None:
    parser = figures_parser(__file__, __doc__)
    parser.add_argument("--labels", required=True, help="table of the cohort")
    parser.add_argument("--features", nargs="+", required=True, metavar="NAME=FOLDER", help="bags of one encoder each")
    parser.add_argument("--joins", nargs="*", default=[], metavar="NAME+NAME", help="encoders to join")
    parser.add_argument("--work", type=Path, default=Path("runs/encoders"), help="where studies are kept")
    arguments = parser.parse_args()
    folders = {name: Path(folder) for name, _, folder in (text.partition("=") for text in arguments.features)}
    for join in arguments.joins:
        folders[join] = arguments.work / "bags" / join
        join_bags([folders[name] for name in join.split("+")], folders[join])
    rows = {}
    for name, folder in folders.items():
        rows[name] = judge(folder, arguments.labels, arguments.work / name).as_json()
        for scale, figures in rows[name]["figures"].items():
            print(name, scale, *(f"{figures['auroc'][key]:.3f}" for key in ("value", "low", "high")), flush=True)
        for pair in rows[name]["auroc_differences"]:
            if {pair["first"], pair["second"]} <= set(SCALES):
                print("   ", pair["first"], "-", pair["second"], *(f"{pair[k]:.3f}" for k in ("value", "low", "high")))
    write_json(arguments.json, rows)


if __name__ == "__main__":
    main()
