"""The committed reference pages are what docs/generate_reference.py writes; what other pages type, commands take."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.generate_reference import BY_ARGPARSE, COMMANDS, ENTRY, described, leaves, pages, sections, split_docstring
from engine.__main__ import COMMANDS as SHORT
from tests.test_architecture import COMMANDS as TYPED

PAGES = pages()
ROOT = Path(__file__).resolve().parents[2]
OTHERS = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page not in PAGES]
ALWAYS = {"config", "help", "print_config"}
FLAG = re.compile(r"(?<=\s)--([\w.-]+)")


def keys(module: str) -> set[str]:
    """Return the flags that a command takes, of all its schemas."""
    found = set(ALWAYS)
    for command in (c for c in COMMANDS if c.module == module):
        found |= set(getattr(command.loaded, "FLAGS", {})) | {leaf.name for leaf in leaves(command.config)}
        found |= {f"{name}.{leaf.name}" for name, schema, _ in sections(command.config) for leaf in leaves(schema)}
    return found


def typed(text: str) -> Iterator[tuple[str, str]]:
    """Return the commands of ours that a page types, as module and the rest of its line."""
    text = re.sub(r"\\\n\s*", "", text)
    for line in text.splitlines():
        if not line.startswith("|"):
            for name, rest in re.findall(r"(?:python -m ((?:engine|mil)\.\w+)|generate_large\.py)([^`#]*)", line):
                yield name or "generate_large", re.sub(r"^ -- ", " ", rest)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_the_committed_page_is_what_the_script_writes(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run python -m docs.generate_reference"


def test_every_command_is_listed() -> None:
    assert {command.module for command in COMMANDS} | {BY_ARGPARSE, ENTRY} == TYPED
    assert {module for module, _ in SHORT.values()} | {ENTRY} == TYPED


def test_every_key_of_every_command_is_explained() -> None:
    known = [c.config for c in COMMANDS] + [schema for c in COMMANDS for _, schema, _ in sections(c.config)]
    assert [(s.__name__, f.name) for s in known for f in leaves(s) if not described(s, f.name)[1]] == []


def test_a_docstring_is_parted_into_calls_and_text() -> None:
    assert split_docstring("Say.\n\n    python x\n\nMore.") == ("python x", "Say.\n\nMore.")


@pytest.mark.parametrize("page", OTHERS, ids=lambda page: str(page.relative_to(ROOT)))
def test_typed_flags_are_taken(page: Path) -> None:
    """A flag that a page types is one of the command's; `engine.parity` has no dataclass."""
    for module, rest in typed(page.read_text(encoding="utf-8")):
        if module != BY_ARGPARSE:
            assert set(FLAG.findall(rest)) <= keys(module), (module, rest)


def test_a_wrong_flag_is_seen() -> None:
    [(module, rest)] = typed(
        "    .venv/bin/python -m engine.export runs/demo \\\n    --format png --colour red  # --no"
    )
    assert (module, set(FLAG.findall(rest)) - keys(module)) == ("engine.export", {"colour"})
