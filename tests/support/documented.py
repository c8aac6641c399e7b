"""Shell commands of documents: fenced blocks marked as shell, and indented blocks that are no Python."""

import ast
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs/tutorial").glob("*.md")),
    *sorted((ROOT / "docs/how-to").glob("*.md")),
]
SHELL = ("sh", "bash")


def blocks(text: str) -> Iterator[str]:
    """Yield the blocks of a Markdown page that a shell would take."""
    fence, inside, before = "", list[str](), ""
    for line in [*text.splitlines(), ""]:
        if mark := re.match(r"\s*```(\w*)", line):
            if fence and fence[1:] in SHELL:
                yield textwrap.dedent("\n".join(inside))
            fence, inside = "" if fence else "`" + mark[1], []
        elif fence or (line.startswith("    ") and (inside or not before)):
            inside.append(line)
        elif inside and (line.strip() or not line):
            block, inside = textwrap.dedent("\n".join(inside)), []
            if not is_python(block):
                yield block
        before = line.strip()


def is_python(block: str) -> bool:
    """Say whether a block is Python: `make demo` is none, `import engine` is."""
    try:
        ast.parse(block)
    except SyntaxError:
        return False
    return True


def commands(text: str) -> list[str]:
    """Return the commands of a page, each on one line, without comments and without the folder of an environment."""
    joined = (re.sub(r"\s*\\\n\s*", " ", block) for block in blocks(text))
    lines = (shlex.split(line, comments=True) for block in joined for line in block.splitlines())
    return [shlex.join(words).replace(".venv/bin/", "") for words in lines if words]


def recipe(target: str) -> list[str]:
    """Return the commands of ours that a target of the Makefile runs."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Makefile").read_text(encoding="utf-8"))  # lines that go on are one
    block = re.search(rf"^{re.escape(target)}:.*\n((?:\t.*\n)*)", text, flags=re.MULTILINE)
    lines = block[1].splitlines() if block else []
    return [line.strip().removeprefix("$(BIN)/") for line in lines if line.strip().startswith("$(BIN)/python ")]
