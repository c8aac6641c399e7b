"""What a check says, and all of them as text or JSON; knows no machine."""

import json
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

OK, NOTE, BROKEN = "ok", "note", "BROKEN"
WIDTH = 110


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    subject: str
    text: str
    state: Literal["ok", "note", "BROKEN"] = "ok"
    """note: the engine works, and something is to be known; BROKEN: something that it needs does not work."""
    remedy: str = ""
    """What to do."""


def as_text(findings: Sequence[Finding]) -> str:
    """Return the report for people."""
    subject = max(len(found.subject) for found in findings)
    indent = " " * (subject + 10)
    lines = []
    for found in findings:
        head = f"{found.subject:<{subject}}  {found.state:<6}  "
        for number, text in enumerate(filter(None, (found.text, found.remedy and f"→ {found.remedy}"))):
            lines += textwrap.wrap(
                text,
                WIDTH,
                initial_indent=indent if number else head,
                subsequent_indent=indent,
                break_long_words=False,
                break_on_hyphens=False,
            )
    broken = [found.subject for found in findings if found.state == BROKEN]
    end = f"Broken: {', '.join(broken)}." if broken else "Nothing that the engine needs is broken."
    return "\n".join([*lines, "", end])


def as_json(findings: Sequence[Finding]) -> str:
    """Return the report for programs."""
    broken = any(found.state == BROKEN for found in findings)
    return json.dumps({"broken": broken, "findings": [asdict(found) for found in findings]}, indent=1)
