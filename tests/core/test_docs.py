"""Documents keep up with the project: links, commands, configurations, the table of layers, length of lines."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine import __version__
from engine.slides.inspect import NOTES
from tests.test_architecture import LAYERS

ROOT = Path(__file__).resolve().parents[2]
TOP = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "configs/README.md")]
PAGES = [*TOP, *sorted(page for kind in ("md", "ipynb") for page in (ROOT / "docs").rglob(f"*.{kind}"))]
ELSEWHERE = {"pytest", "pip", "venv"}
"""Modules that documents run and that are not ours."""
PRIVATE = "crew|onlooker|pilot|by heart|looks on|whatever for|house as it stands|to be had|from wherever"
"""Words that only the authors would understand."""


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text_of(page: Path) -> str:
    """Return a page's text; of a notebook what its cells say, code fenced, without outputs."""
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".md":
        return text
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in json.loads(text)["cells"]]
    return "\n\n".join(f"```python\n{said}\n```" if kind == "code" else said for said, kind in cells)


def links(text: str) -> Iterator[str]:
    """Return the targets of Markdown links and pictures outside code, without those on the web."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:", target):
            yield target


def slugs(text: str) -> set[str]:
    """Return the ids that a page's headings have, and those that it gives itself."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\s-]", "", head.replace("`", "")).strip().lower() for head in heads)
    return {re.sub(r"[-\s]+", "-", head) for head in plain} | set(re.findall(r'<a id="([^"]+)"', text))


def broken(page: Path, text: str) -> list[str]:
    """Return the links of a page that lead nowhere."""
    said = []
    for target in links(text):
        name, _, place = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        if not file.exists() or (place and file.suffix == ".md" and place not in slugs(text_of(file))):
            said.append(target)
    return said


def unknown(text: str) -> list[str]:
    """Return what a page runs, or passes to --config, and what is not in the project."""
    said = []
    for module in re.findall(r"python(?:3(?:\.\d+)?)? -m ([\w.]+)", text):
        path = ROOT / module.rstrip(".").replace(".", "/")
        if module not in ELSEWHERE and not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
            said.append(module)
    configs = re.findall(r"--config[ =]([\w./-]+\.ya?ml)|`(configs/[\w./-]+\.ya?ml)`", text)
    names = {
        name for pair in configs for name in pair if name.startswith("configs/")
    }  # RUN/config.yaml is the reader's
    return said + sorted(name for name in names if not (ROOT / name).is_file())


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    assert broken(page, text_of(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_and_configurations_exist(page: Path) -> None:
    assert unknown(text_of(page)) == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_files_that_are_named_exist(page: Path) -> None:
    rooms = "engine|mil|actors|tests|benchmarks|configs|docs"
    paths = re.findall(rf"`((?:{rooms})/[\w./-]+\.\w+)`", text_of(page))
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_lines_are_short_and_words_are_the_fields(page: Path) -> None:
    lines = text_of(page).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []  # a table has no line breaks
    prose = "\n".join(lines)
    assert re.findall(rf"\b(?:{PRIVATE})\b", prose, flags=re.IGNORECASE) == []


def test_that_these_tests_can_fail() -> None:
    page = ROOT / "README.md"
    assert broken(page, "[a](docs/none.md), [b](docs/index.md#none), `[c](none)`") == [
        "docs/none.md",
        "docs/index.md#none",
    ]
    assert unknown("python -m engine.none --config configs/none.yaml") == ["engine.none", "configs/none.yaml"]
    assert broken(page, text_of(page)) == unknown(text_of(page)) == []


def test_make_shows_what_documents_run() -> None:
    goals = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"(?:^ {4}|`)make ([a-z-]+)", text_of(page), flags=re.MULTILINE)) <= goals, page


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 120
    assert "make demo" in text
    assert "make test" in text


def test_the_layer_table_is_the_architecture_tests() -> None:
    text = (ROOT / "docs/explanation/architecture.md").read_text()
    rows = re.findall(r"^\| `([\w.]+)` \| ([\w. ]*)\|$", text.partition("## Layers")[2], flags=re.MULTILINE)
    packages = {"engine", "mil"}  # their __init__ alone
    assert {room: may.strip() for room, may in rows} == {r: may for r, may in LAYERS.items() if r not in packages}
    assert text.count("\n") <= 150


def test_every_error_and_reason_code_is_explained() -> None:
    page = text_of(ROOT / "docs/reference/errors.md")
    sources = [path.read_text(encoding="utf-8") for room in ("engine", "mil") for path in (ROOT / room).rglob("*.py")]
    classes = {
        name for text in sources for name in re.findall(r"^class (\w+Error)\(\w*Error\)", text, flags=re.MULTILINE)
    }
    codes = {code for text in sources for code in re.findall(r'SlideError\(\s*"(\w+)"', text)}
    assert len(classes) > 10
    assert len(codes) > 10
    assert {name for name in classes | codes | NOTES if f"`{name}`" not in page} == set()


def test_the_site_lists_every_page() -> None:
    listed = set(re.findall(r"[\w/-]+\.(?:md|ipynb)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {str(page.relative_to(ROOT / "docs")) for page in PAGES if page not in TOP}


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__} " in (ROOT / "CHANGELOG.md").read_text()
