"""Every shell command of README, tutorials and how-tos runs here with small inputs, or is held by another test, or says
why it cannot run. A command that no row of the table knows fails."""

import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.documented import PAGES, ROOT, commands, recipe
from tests.support.documents_place import write_place


@dataclass(frozen=True)
class Small:
    """It runs here, with flags that make it small, and words in the place of the document's."""

    flags: str = ""
    words: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Held:
    """Another test runs it, or all of it that runs without what a test lacks; `test` is file::name."""

    test: str


@dataclass(frozen=True)
class Cannot:
    """No test can run it."""

    why: str


LOCAL = "--ray.enabled false "
FEW = "--sampling.stride 500 --sampling.weight 0 --sampling.batch_size 3"
STEPS = f"--model.source model {FEW} --output.formats [] {LOCAL}"
PICTURE = f"--canvas.height 256 --canvas.width 256 {STEPS}"
DEMO = f"--canvas.height 256 --canvas.width 512 --reference region.jpeg {STEPS}"
"""Two levels: a guide and a canvas of several tiles."""
BAGS = "--finder.method everything --bags.tiles 2 --bags.steps 2 --bags.encoders [texture]"
DEMO_MODEL = "--model.source demo"
"""The tiny model has no text prior."""
WORDS = "--text_steps 2"
REGIONS = (("512,256,300,300", "64,64,96,96"), ("256,256,512,512", "0,0,128,128"))
"""Regions of runs/demo, which is smaller here."""
TILES = f"--model.source model --steps 2 --count 2 --sampling.batch_size 2 --folder runs/tiles {LOCAL}"
STUDY = (
    f"--folds 2 --device cpu --training.epochs 2 --training.batch_size 8 --model.hidden 16 --model.attention 8 {LOCAL}"
)
FIGURES = "--encoder texture --directions 20 --kid_subsets 5 --stride 128"
INSTALL = Cannot("it installs from the network; `make test` and CI do")
CLUSTER = "tests/cluster/test_cluster_files.py::"
WEIGHTS = Cannot("it needs the Hub")
ROWS: dict[str, Small | Held | Cannot] = {
    r"(python3\.11 -m venv|pip install) .*": INSTALL,
    r"zoomldm --help": Small(),
    r"make test": Cannot("it is what runs this; .ci/run calls it"),
    r"make demo(-features|-mil|-cohort|-augment)?": Small(),
    r"make demo-view": Cannot("it serves a page until Ctrl-C; its two commands are `make demo`'s and engine.view's"),
    # pictures
    r"python generate_large\.py --config configs/demo\.yaml": Small(DEMO),
    r"python generate_large\.py --config configs/demo\.yaml --canvas\.height 2048 .*": Small(f"{DEMO} {PICTURE}"),
    r"python generate_large\.py --config configs/demo\.yaml --sampling\.seed 1 .*": Small(DEMO),
    r"python generate_large\.py --config configs/demo\.yaml --condition cdm .*": Held(
        "tests/conditions/test_reference_free.py::test_it_needs_no_reference_and_says_so"
    ),
    r"python generate_large\.py --config configs/demo\.yaml --model\.source runs/my_training/model .*": Small(
        f"{DEMO} {PICTURE}"
    ),
    r"python generate_large\.py --config configs/demo\.yaml --text .*": Small(f"{WORDS} {PICTURE} {DEMO_MODEL}"),
    r"(python generate_large\.py --config configs/demo\.yaml --text_map .*|make demo-text)": Held(
        "tests/conditions/test_text.py::test_a_run_in_words_says_so_and_its_resume_draws_nothing_again"
    ),
    r"python -m engine\.phantom_captions .*": Small(
        "--regions 2 --heldout 1 --cells 2 --largest 2 --captions 4 --processes 1"
    ),
    r"python -m engine\.train --config configs/train_demo_text\.yaml": Held(
        "tests/training/test_text_training.py::test_a_killed_training_ends_as_an_undisturbed_one"
    ),
    r"python -m engine\.train --config configs/train_text\.yaml": Cannot(
        "it needs captions and a GPU; tests/training/test_text_training.py trains a tiny prior"
    ),
    r"python -m engine\.train --config configs/train_text\.yaml --captions\.train .*": Held(
        "tests/training/test_pictured_training.py::test_it_learns_from_pictures_and_reads_texts"
    ),
    r"python -m engine\.extract_features .*\[quiltnet\].*": Held(
        "tests/model/test_clip_vision.py::test_open_clips_file_is_the_same_network"
    ),
    r"python generate_large\.py --redo .*": Small(LOCAL, REGIONS),
    r"python generate_large\.py --config configs/(brca|naip)\.yaml --(reference|embeddings) \S+( --plan)?": Small(
        f"{PICTURE} --model.variant null"
    ),
    r"python generate_large\.py .* --model\.source checkpoints/ZoomLDM .*": Small(
        f"{PICTURE} --model.variant null --model.encoder_source null --output.folder runs/offline"
    ),
    r"python generate_large\.py --model\.source runs/train_brca/model .*": Small(
        f"{PICTURE} --output.folder runs/my_region"
    ),
    r"python generate_large\.py .* --canvas\.store file:.*": Small(
        f"{PICTURE} --model.variant null --output.folder runs/stored", (("file:///shared", "file://{here}/shared"),)
    ),
    r"python generate_large\.py .* --canvas\.store s3:.*": Held(
        "tests/generation/test_run_elsewhere.py::test_same_bytes_as_on_a_disk"
    ),
    # cohorts
    r"python -m engine\.phantom_cohort --out runs/demo_cohort .*": Small("--width 512 --height 512 --processes 1"),
    r"python -m engine\.generate_cohort --config .*": Small(f"{PICTURE} {BAGS}"),
    r"python -m engine\.generate_cohort --table .*": Small(f"{PICTURE} {BAGS}"),
    r"python -m engine\.generate_cohort --slides .*": Small(
        f"{PICTURE} {BAGS}", (("--recipe.labels labels.csv", ""), ("--recipe.variations 100", "--recipe.variations 1"))
    ),
    r"python -m engine\.superres .*": Small(f"{STEPS} --sampling.stride 100 --model.variant null --inversion.steps 2"),
    r"python -m engine\.sample --config .*": Small(f"{TILES} --reference region.jpeg"),
    r"python -m engine\.sample --condition cdm .*": Small(f"{TILES} --cdm_steps 2"),
    r"python -m engine\.export .*": Small("", REGIONS),
    r"(ssh .*)?.*python -m engine\.view .*": Held("tests/viewer/test_server.py::test_the_command_until_ctrl_c"),
    # quality
    r"python -m engine\.quality (RUN( SLIDES)?|runs/seed1)( --patches \d+)?": Small(f"{FIGURES} --patches 0"),
    r"python -m engine\.quality PICTURES SLIDES .*": Small(f"{FIGURES} --count 8"),
    r"python -m engine\.quality A B --encoder clip .*": Held(
        "tests/evaluation/test_quality.py::test_any_clip_vision_tower"
    ),
    r"python -m engine\.quality A B --inception .*": Held(
        "tests/evaluation/test_quality.py::test_inception_takes_the_papers_names_and_reads_its_file_as_data"
    ),
    r"python -m engine\.quality A B --paired .*": Small(FIGURES),
    r"python -m engine\.quality .* --protocol zoomldm .*": Held(
        "tests/evaluation/test_quality.py::test_the_table_of_zoomldm"
    ),
    r"python -m engine\.quality .* --protocol large-image-diffusion .*": Held(
        "tests/evaluation/test_quality.py::test_the_table_of_large_images"
    ),
    # slides
    r"python -m engine\.phantom_slides .*": Small("--count 1 --width 768 --height 768"),
    r"python -m engine\.phantom_cohort .*": Small(
        "--patients 24 --positive 0.5 --width 512 --height 512 --processes 1"
    ),
    r"python -m engine\.extract_features .*": Small(
        f"--encoders [texture] --model.source model --model.variant null {LOCAL}",
        (("--out DIR", "--out runs/extracted"),),
    ),
    r"python -m engine\.export_features .*": Small("", (("RUN", "runs/features"),)),
    r"python -m engine\.prepare --slides tiles/ .*": Held(
        "tests/datasets/test_prepare_from_above.py::test_a_geotiff_is_prepared_from_1x_to_4x"
    ),
    r"python -m engine\.prepare --slides runs/my_slides .*": Small(LOCAL),
    r"python -m engine\.prepare --slides slides/ .* --keep_images true": Small(
        f"--model.source model --model.variant null --coarsest 5x --out runs/prepared_images {LOCAL}"
    ),
    r"python -m engine\.prepare --slides slides/ .*": Small(
        f"--model.source model --model.variant null --coarsest 5x --out runs/prepared {LOCAL}"
    ),
    r"python -m engine\.prepare --export_to DIR .*": Small("", (("DIR", "published"),)),
    r"python -m engine\.prepare --import_from DIR .*": Small(
        "--model.source model --coarsest 5x --out runs/imported", (("DIR", "published"),)
    ),
    # training
    r"python -m engine\.train --config configs/train_(brca|cdm)\.yaml.*(?<!--plan)": Cannot(
        "the published size needs GPUs; tests/training/test_train_command.py runs the command at a tiny size"
    ),
    r"python -m engine\.train --config configs/train_brca\.yaml .* --plan": Held(
        "tests/training/test_train_command.py::test_the_plan_builds_the_configs_at_their_published_size"
    ),
    r"python -m engine\.train --config configs/train_demo_refine\.yaml .* --plan": Small(
        "--train.magnification_weights [1,1,0,0,0]"
    ),
    r"python -m engine\.train --config '…' --run RUN --export.*": Held(
        "tests/training/test_train_command.py::test_train_continue_and_export"
    ),
    # classifiers
    r"python -m mil\.train --config configs/demo_mil\.yaml .*": Small(f"{STUDY} --training.patience 2"),
    r"python -m mil\.train --task .*": Small(STUDY),
    r"python -m mil\.augment --config .*": Small(
        "--folds 2 --fractions [0.5] --training.epochs 2 --training.patience 2 --ray.enabled false"
    ),
    r"python -m mil\.augment --task .*": Held("tests/mil/test_augment.py::test_the_command"),
    r"python -m mil\.probe --task .*": Held("tests/mil/test_probe.py::test_what_a_probe_leaves"),
    r"python -m mil\.(predict|compare) .*": Small(),
    r"python -m mil\.heatmap runs/mil/hrd .*": Small("", (("SLIDE", "P001-S0"),)),
    r"python -m mil\.heatmap runs/demo_mil/20x\+5x .*": Small("", (("P001-1", "P021-1"),)),
    # clusters
    r"ray (up|rsync-down) .*": Held(f"{CLUSTER}test_launcher_files_fit_rays_schema"),
    r"ray submit .*": Held(f"{CLUSTER}test_the_documents_commands_parse"),
    r"ray job submit .*generate_large.*": Held(f"{CLUSTER}test_the_documents_commands_parse"),
    r"ray job submit .*engine\.train.*": Cannot(
        "it needs a cluster; tests/actors/test_training_on_ray.py trains on one"
    ),
    r"sbatch .*": Held(f"{CLUSTER}test_the_documents_commands_parse"),
    r"(docker|kubectl) .*": Cannot("it needs Docker or Kubernetes; tests/cluster reads the files"),
    r"(tail|scancel|prometheus|curl) .*": Cannot("it is another program's, on a cluster"),
    r"hf download .*": WEIGHTS,
}
DOCUMENTED = sorted({command for page in PAGES for command in commands(page.read_text(encoding="utf-8"))})


def row_of(command: str) -> Small | Held | Cannot:
    """Return what the table says of a command. Raises: AssertionError for one that no row knows."""
    for pattern, row in ROWS.items():
        if re.fullmatch(pattern, command):
            return row
    raise AssertionError(f"no row of the table knows `{command}`; add one that runs it small, or says why not")


def run(command: str) -> None:
    """Run a command of ours in this process, with what its row adds. Raises: AssertionError unless it ends with 0."""
    row = row_of(command)
    assert isinstance(row, Small)
    if command.startswith("make "):
        for line in recipe(command.split()[1]):
            run(line)
        return
    for word, instead in row.words:
        command = command.replace(word, instead.format(here=Path.cwd()))
    words = shlex.split(command)
    module = {"zoomldm": "engine.__main__", "generate_large.py": "generate_large"}
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[words[0] == "python"], words[1:])
    if words[:2] == ["python", "generate_large.py"]:
        rest = words[2:]
    flags = shlex.split(row.flags)
    # The run to inpaint is named last.
    argv = [*rest[:-1], *flags, rest[-1]] if "--redo" in rest else [*rest, *flags]
    main = importlib.import_module(module.get(name, name)).main
    assert main(argv) == 0, shlex.join([name, *argv])


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with inputs, and with the runs that documents begin from, which their own commands make."""
    folder = tmp_path_factory.mktemp("documents")
    write_place(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in FIRST:
            run(command)
    return folder


FIRST = (
    "make demo",
    "python generate_large.py --config configs/demo.yaml --sampling.seed 1 --output.folder runs/seed1",
    "python -m mil.train --task hrd --features runs/features/features --labels labels.csv",
    "python -m mil.train --task subtyping --features features --labels table.csv --scales 20 --output.folder runs/fine",
    "python -m engine.prepare --export_to DIR --out data/",
    "python -m engine.phantom_slides --out runs/my_slides --count 2 --width 5120 --height 5120 "
    "--varied true --pen_every 0",
    "python -m engine.prepare --slides runs/my_slides --out runs/my_set --coarsest 1.25x --synthetic true",
    "make demo-mil",
    "python -m engine.generate_cohort --table rows.csv --slides slides/ --out runs/cohort",
)
"""What others begin from."""


@pytest.mark.parametrize("command", [c for c in DOCUMENTED if isinstance(row_of(c), Small)])
def test_a_documented_command_runs(command: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run(command)


def test_every_documented_command_is_in_a_row_and_every_row_is_needed() -> None:
    known = [
        *DOCUMENTED,
        *(
            line
            for target in ("demo", "demo-features", "demo-mil", "demo-cohort", "demo-augment")
            for line in recipe(target)
        ),
    ]
    needed = {next(pattern for pattern in ROWS if re.fullmatch(pattern, command)) for command in known}
    assert set(ROWS) - needed == set()
    assert set(FIRST) <= set(DOCUMENTED)


def test_the_tests_that_hold_commands_exist() -> None:
    for row in ROWS.values():
        if isinstance(row, Held):
            file, _, name = row.test.partition("::")
            assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8"), row.test


def test_a_command_that_no_row_knows_fails() -> None:
    text = (
        "Say:\n\n    python -m engine.sing \\\n        --loud  # aloud\n\n    import engine\n\n```sh\nmake sing\n```\n"
    )
    assert commands(text) == ["python -m engine.sing --loud", "make sing"]
    with pytest.raises(AssertionError, match="no row of the table knows `make sing`"):
        row_of("make sing")
