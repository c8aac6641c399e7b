"""Write docs/reference/cli.md and config.md from the dataclasses that the commands parse, and in slide_files.md what
becomes of kinds of files, from the cases that tests/slides tries.

    python -m docs.generate_reference            # writes both pages
    python -m docs.generate_reference --check    # says which page is out of date; exit code 1

Invariant: a page depends on the source alone. Names, types, defaults and texts are those of the dataclass fields, so
`--help` and the pages cannot differ. A test compares the committed pages with what this script returns.
"""

import ast
import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

FOLDER = Path(__file__).resolve().parent / "reference"
WIDTH = 120
NOTE = "<!-- Written by `python -m docs.generate_reference`; edit the dataclasses, not this page. -->"


@dataclass(frozen=True)
class Command:
    """One command, the dataclass that it parses, and the module that says what it does."""

    module: str
    schema: str
    about: str = ""
    """Which part of the command the schema belongs to, where it has several."""

    @property
    def call(self) -> str:
        return "python generate_large.py" if self.module == "generate_large" else f"python -m {self.module}"

    @property
    def title(self) -> str:
        name = "generate_large.py" if self.module == "generate_large" else self.module
        return f"{name} ({self.about})" if self.about else name

    @property
    def loaded(self) -> ModuleType:
        return importlib.import_module(self.module)

    @property
    def config(self) -> type:
        module, _, name = self.schema.rpartition(".")
        return getattr(importlib.import_module(module), name)


COMMANDS = (
    Command("generate_large", "engine.sampling.config.RunConfig"),
    Command("generate_large", "engine.generation.inpaint.InpaintConfig", "`--redo`"),
    Command("engine.generate_cohort", "engine.cohort.config.CohortConfig"),
    Command("engine.view", "engine.viewer.config.ViewConfig"),
    Command("engine.superres", "engine.superres.SuperresConfig"),
    Command("engine.sample", "engine.sample.SampleConfig"),
    Command("engine.export", "engine.export.ExportConfig"),
    Command("engine.quality", "engine.evaluation.config.QualityConfig"),
    Command("engine.extract_features", "engine.features.config.ExtractConfig"),
    Command("engine.export_features", "engine.export_features.ExportFeaturesConfig"),
    Command("mil.train", "mil.folds.config.StudyConfig"),
    Command("mil.predict", "mil.predict.PredictConfig"),
    Command("mil.compare", "mil.compare.CompareConfig"),
    Command("mil.augment", "mil.augmentation.config.AugmentConfig"),
    Command("mil.probe", "mil.tiles.study.ProbeConfig"),
    Command("mil.heatmap", "mil.heatmap.HeatmapConfig"),
    Command("engine.prepare", "engine.datasets.config.PrepareConfig"),
    Command("engine.train", "engine.training.denoiser.settings.JointConfig", "`task: denoiser`"),
    Command("engine.train", "engine.training.autoencoder.settings.VQConfig", "`task: autoencoder`"),
    Command("engine.train", "engine.training.cdm.settings.CDMTrainingConfig", "`task: cdm`"),
    Command("engine.train", "engine.training.text.settings.TextTrainingConfig", "`task: text`"),
    Command("engine.train", "engine.training.demo.run.DemoConfig", "`task: demo`"),
    Command("engine.doctor", "engine.doctor.DoctorConfig"),
    Command("engine.phantom_slides", "engine.phantom_slides.PhantomSlidesConfig"),
    Command("engine.phantom_cohort", "engine.phantom_cohort.PhantomCohortConfig"),
    Command("engine.phantom_captions", "engine.training.demo.captioned.CaptionedConfig"),
)
BY_ARGPARSE = "engine.parity"
"""The one command whose flags are no dataclass: its docstring has them."""
ENTRY = "engine.__main__"
"""The command that runs the others by a short name."""


@cache
def _declared(schema: type) -> dict[str, tuple[str, str, str]]:
    """Return annotation, default and text of the fields that a class itself declares, from its source."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(schema)))
    body = tree.body[0].body if isinstance(tree.body[0], ast.ClassDef) else []
    found = {}
    for node, after in zip(body, [*body[1:], ast.Pass()], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else ""
            default = ast.unparse(node.value) if node.value else ""
            found[node.target.id] = (ast.unparse(node.annotation), default, inspect.cleandoc(str(text)))
    return found


def described(schema: type, name: str) -> tuple[str, str]:
    """Return annotation and text of a field; a subclass that is silent says what its base says."""
    texts = [_declared(base)[name] for base in schema.__mro__ if is_dataclass(base) and name in _declared(base)]
    return texts[0][0], next((text for _, _, text in texts if text), "")


def default_of(field: Field[Any]) -> object:
    """Return the default of a field, MISSING where it must be given."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def type_of(schema: type, name: str) -> str:
    """Return a field's type for people: the values of a Literal, the name of anything else."""
    hint = get_type_hints(schema)[name]
    shown = getattr(hint, "__name__", None) if isinstance(hint, type) else None
    text = shown or str(hint)
    text = re.sub(r"typing\.Literal\[([^\]]*)\]", lambda m: m[1].replace("'", "").replace(", ", " or "), text)
    return re.sub(r"(?:\w+\.)+(\w+)", r"\1", text)


def wrapped(text: str, indent: str = "", first: str = "") -> str:
    """Return a paragraph in lines of at most WIDTH characters."""
    flat = " ".join(text.split())
    wrapper = textwrap.TextWrapper(WIDTH, initial_indent=first, subsequent_indent=indent)
    wrapper.break_long_words = wrapper.break_on_hyphens = False
    return wrapper.fill(flat)


def key_line(schema: type, field: Field[Any], prefix: str) -> str:
    """Return what a page says of a key."""
    default = default_of(field)
    says = "required" if default is MISSING else f"default `{plain(default)}`"
    text = described(schema, field.name)[1].replace("<", "&lt;")
    return wrapped(f"**`{prefix}{field.name}`** (`{type_of(schema, field.name)}`, {says}). {text}", "  ", "- ")


def plain(value: object) -> str:
    """Return a default as YAML has it."""
    if isinstance(value, tuple):
        return "[" + ", ".join(plain(v) for v in value) + "]"
    if value is None or value == "":
        return "null" if value is None else '""'
    return str(value).lower() if isinstance(value, bool) else str(value)


def leaves(schema: type) -> list[Field[Any]]:
    """Return the fields that are no section."""
    return [f for f in fields(schema) if not is_dataclass(get_type_hints(schema)[f.name])]


def sections(schema: type) -> Iterator[tuple[str, type, Field[Any]]]:
    """Return the sections of a schema by their dotted name, those inside sections too."""
    for field in fields(schema):
        hint = get_type_hints(schema)[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield field.name, hint, field
            yield from ((f"{field.name}.{name}", inner, own) for name, inner, own in sections(hint))


def anchor(name: str) -> str:
    """Return the id of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def heading(marks: str, text: str, place: str) -> list[str]:
    """Return a heading with an id of its own: `model` is a section of several commands."""
    return [f'<a id="{place}"></a>', "", f"{marks} {text}", ""]


def split_docstring(text: str) -> tuple[str, str]:
    """Return the commands of a module's docstring (its indented lines) and its paragraphs without them."""
    lines = inspect.cleandoc(text).splitlines()
    shown = [line[4:] for line in lines if line.startswith("    ")]
    said = "\n".join(line for line in lines if not line.startswith("    "))
    return "\n".join(shown), re.sub(r"\n{3,}", "\n\n", said).strip()


def about(module: ModuleType) -> list[str]:
    """Return the first sentence of a command, its calls, and its exit codes."""
    shown, said = split_docstring(module.__doc__ or "")
    codes = re.search(r"Exit codes?:?.*?(?:\.|$)(?=\s|$)", " ".join(said.split()))
    first = re.sub(r"^Command \d+: (\w)", lambda m: m[1].upper(), said.split("\n\n")[0])
    lines = [wrapped(first), ""]
    lines += ["```sh", shown, "```", ""] if shown else []
    return [*lines, wrapped(codes[0]), ""] if codes else lines


def cli_page() -> str:
    """Return the page of the commands."""
    lines = [NOTE, "", "# Commands", ""]
    lines += [
        wrapped(
            "Every command takes `--config FILE` (YAML) and one flag per key: `--section.key VALUE`. Later flags "
            "override earlier ones and the file. A mistyped key stops the command with exit code 2 and names the "
            "nearest one. `--help` prints the keys, `--print_config` the resolved configuration. "
            "[Configuration](config.md) lists the sections."
        ),
        "",
        wrapped(
            "An installed package has all of them as one command, `zoomldm NAME`: "
            + ", ".join(f"`{name}` ({module})" for name, (module, _) in importlib.import_module(ENTRY).COMMANDS.items())
            + "."
        ),
        "",
    ]
    done = set()
    for command in COMMANDS:
        lines += heading("##", command.title, anchor(command.title))
        if command.module not in done:
            lines += about(command.loaded)
            switches = getattr(command.loaded, "FLAGS", {})
            lines += [wrapped(f"**`--{name}`**: {text}.", "  ", "- ") for name, text in switches.items()]
            lines += [""] if switches else []
            done.add(command.module)
        schema, base = command.config, COMMANDS[0].config
        also = schema is not base and issubclass(schema, base)
        shared = {f.name for f in leaves(base)} if also else set()
        retired = {} if also else getattr(schema, "RETIRED", {})
        more = f", besides those of [{COMMANDS[0].title}](#{anchor(COMMANDS[0].title)})" if also else ""
        lines += [wrapped(f"Keys of `{schema.__name__}`{more}:"), ""]
        lines += [key_line(schema, field, "--") for field in leaves(schema) if field.name not in shared]
        lines += [wrapped(f"**`--{name}`**: retired; {why}.", "  ", "- ") for name, why in retired.items()]
        names = [f"[`{name}`](config.md#{anchor(command.title)}-{anchor(name)})" for name, *_ in sections(schema)]
        lines += ["", wrapped("Sections: " + ", ".join(names) + "."), ""] if names else [""]
    shown = [*heading("##", BY_ARGPARSE, anchor(BY_ARGPARSE)), *about(importlib.import_module(BY_ARGPARSE))]
    return "\n".join([*lines, *shown]).rstrip() + "\n"


def config_page() -> str:
    """Return the page of the sections."""
    lines = [NOTE, "", "# Configuration", ""]
    lines += [
        wrapped(
            "The sections of each command's configuration, as YAML has them and as flags name them. A section that "
            "another command shares is described once. [Commands](cli.md) lists the keys outside sections."
        ),
        "",
    ]
    seen: dict[tuple[str, type], str] = {}
    for command in COMMANDS:
        found = list(sections(command.config))
        if not found:
            continue
        lines += heading("##", command.title, anchor(command.title))
        for name, schema, field in found:
            place = f"{anchor(command.title)}-{anchor(name)}"
            lines += heading("###", f"`{name}`", place)
            if (name, schema) in seen:
                lines += [wrapped(f"As [above](#{seen[name, schema]})" + changed(schema, field) + "."), ""]
                continue
            seen[name, schema] = place
            text = " ".join(inspect.cleandoc(schema.__doc__ or "").split())
            lines += [wrapped(text), "", *(key_line(schema, leaf, f"{name}.") for leaf in leaves(schema)), ""]
    return "\n".join(lines).rstrip() + "\n"


def changed(schema: type, field: Field[Any]) -> str:
    """Return the defaults that a command sets differently, as the end of a sentence."""
    own = default_of(field)
    if own is MISSING:
        return ""
    usual = {f.name: default_of(f) for f in leaves(schema)}
    other = [f"`{n}: {plain(getattr(own, n))}`" for n, value in usual.items() if getattr(own, n) != value]
    return ", with the defaults " + ", ".join(other) if other else ""


def pages() -> dict[Path, str]:
    """Return every generated page by its path."""
    kinds = FOLDER / "slide_files.md"
    return {FOLDER / "cli.md": cli_page(), FOLDER / "config.md": config_page(), kinds: with_kinds(kinds)}


def with_kinds(page: Path) -> str:
    """Return the page of slide files with the table of the kinds that tests try, one row per case."""
    from tests.slides.file_kinds import table

    before, mark, rest = page.read_text(encoding="utf-8").partition("<!-- kinds -->\n")
    _, end, after = rest.partition("<!-- /kinds -->")
    return f"{before}{mark}{table()}\n{end}{after}"


def main(argv: Sequence[str]) -> int:
    """Write the pages, or check them; return the exit code."""
    stale = [(path, text) for path, text in pages().items() if not path.is_file() or path.read_text() != text]
    for path, text in stale:
        if "--check" not in argv:
            path.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{path.name}: {'out of date' if '--check' in argv else 'written'}\n")
    return int(bool(stale) and "--check" in argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
