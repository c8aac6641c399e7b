"""Command lines from typed configs: the same way for every command of the project.

Keys of the YAML, flags and dataclass fields are one set of names; anything else stops with exit code 2 before a model
is touched, naming the nearest key. It does not know what the keys mean. jsonargparse reads types and attribute
docstrings.
"""

import re
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import NoReturn, TypeVar, get_type_hints

import yaml
from jsonargparse import ArgumentParser, set_parsing_settings

PROJECT_ROOT = Path(__file__).resolve().parent.parent
"""Where configs/ lies when the project is installed editable; commands may run from any folder."""

T = TypeVar("T")


class UsageError(Exception):
    """A wrong command line or config file (exit code 2)."""


@dataclass(frozen=True)
class _Keys:
    """The names a schema knows, dotted."""

    leaves: tuple[str, ...]
    sections: tuple[str, ...]

    def nearest(self, name: str, sections: bool = False) -> str:
        """Return the known key (or section) that `name` most likely stands for; its last word counts double."""

        def likeness(known: str) -> float:
            whole = SequenceMatcher(None, name, known).ratio()
            tail = SequenceMatcher(None, name.rpartition(".")[2], known.rpartition(".")[2]).ratio()
            return whole + tail

        return max(self.leaves + self.sections * sections, key=likeness)


def parse(argv: Sequence[str], schema: type[T], prog: str, description: str, first: str | None = None) -> T:
    """Read `--config FILE` and `--section.key VALUE` into a dataclass; wrong usage prints why and exits with 2.

    `first` is the key that a first word without dashes stands for.
    """
    if first is not None:
        if argv and not argv[0].startswith("-"):
            argv = [f"--{first}={argv[0]}", *argv[1:]]
        prog = f"{prog} {first.upper()}"
    config, _ = parse_with_flags(argv, schema, prog, description, {})
    return config


def peek(argv: Sequence[str], key: str, known: Sequence[str], prog: str) -> str:
    """Return what a command line says of a top-level key that decides the schema, `known[0]` where it says nothing.

    Anything else than one of `known` stops with exit code 2; what cannot be read is left to `parse`.
    """
    found: object = known[0]
    for name in _config_files(argv):
        try:
            content = yaml.safe_load(Path(_located(name, "--config")).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, UsageError, yaml.YAMLError):
            continue
        found = content.get(key, found) if isinstance(content, dict) else found
    for token, after in zip(argv, [*argv, ""][1:], strict=True):
        if token.partition("=")[0] == f"--{key}":
            found = token.partition("=")[2] or after
    if found not in known:
        _stop(prog, f"{key} must be one of {', '.join(known)}; got {found!r}.")
    return str(found)


def take(argv: Sequence[str], schema: type) -> tuple[list[str], list[str]]:
    """Part a command line in two: a last word that is no flag's value, then the flags of `schema`; and the rest."""
    names = {f"--{field.name}" for field in fields(schema)}
    own, rest = [], list(argv)
    if rest and not rest[-1].startswith("-") and (len(rest) == 1 or not _awaits_value(rest[-2])):
        own.append(rest.pop())
    words, rest = rest, []
    while words:
        word = words.pop(0)
        group = [word, words.pop(0)] if _awaits_value(word) and words and not words[0].startswith("--") else [word]
        (own if word.partition("=")[0] in names else rest).extend(group)
    return own, rest


def _awaits_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def parse_with_flags(
    argv: Sequence[str], schema: type[T], prog: str, description: str, flags: Mapping[str, str]
) -> tuple[T, frozenset[str]]:
    """As `parse`, with switches that belong to the command alone (name → help); returns those that were given."""
    parser = _build_parser(schema, prog, description, flags)
    keys = _known_keys(schema)
    files: dict[str, str] = {}
    try:
        argv = [_located(t, p) for p, t in zip(["", *argv], argv, strict=False)]
        for name in _config_files(argv):
            files |= dict.fromkeys(_check_file(name, keys), name)
        _check_flags(argv, keys, {"config", "help", "print_config", *flags})
        values = parser.parse_args(list(argv))
        given = frozenset(name for name in flags if values.pop(name.replace("-", "_")))
        values.pop("config")
        built = parser.instantiate(values)
        return schema(**{f.name: built[f.name] for f in fields(schema)}), given  # type: ignore[arg-type]
    except UsageError as error:
        _stop(prog, str(error))
    except (ArgumentError, ValueError) as error:
        flagged = {token.partition("=")[0].removeprefix("--") for token in argv}
        _stop(prog, _with_origin(str(error), {k: f for k, f in files.items() if k not in flagged}))


def _build_parser(schema: type, prog: str, description: str, flags: Mapping[str, str]) -> ArgumentParser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    switches = "".join(f" [--{name}]" for name in flags)
    parser = ArgumentParser(
        prog=prog,
        usage=f"{prog} [--config FILE]{switches} [--KEY VALUE ...]",
        description=description,
        exit_on_error=False,
    )
    parser.add_argument(
        "--config",
        action="config",
        help="YAML file with any of the keys below; looked up here, then in the project. Later flags override it.",
    )
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(schema, None)
    return parser


def _known_keys(schema: type, prefix: str = "") -> _Keys:
    leaves: list[str] = []
    sections: list[str] = []
    hints = get_type_hints(schema)
    for field in fields(schema):
        name = prefix + field.name
        if is_dataclass(hints[field.name]):
            inner = _known_keys(hints[field.name], name + ".")
            leaves += inner.leaves
            sections += [name, *inner.sections]
        else:
            leaves.append(name)
    return _Keys(tuple(leaves), tuple(sections))


def _located(token: str, before: str) -> str:
    """Replace the file of `--config FILE` by the one that exists: as given, else below the project's root."""
    name = token if before == "--config" else token.removeprefix("--config=")
    if before != "--config" and name == token:
        return token
    candidates = (Path(name).expanduser(), PROJECT_ROOT / name)
    for candidate in candidates:
        if candidate.is_file():
            return token.replace(name, str(candidate)) if token != name else str(candidate)
    raise UsageError(
        f"--config must name a YAML file; {name} is neither here ({Path.cwd()}) nor in the project ({PROJECT_ROOT})."
    )


def _config_files(argv: Sequence[str]) -> list[str]:
    after = [t for p, t in zip(argv, argv[1:], strict=False) if p == "--config"]
    return after + [t.removeprefix("--config=") for t in argv if t.startswith("--config=")]


def _check_file(name: str, keys: _Keys) -> list[str]:
    """Return the dotted keys of a YAML file. Raises UsageError for an unknown one or for no mapping at all."""
    try:
        content = yaml.safe_load(Path(name).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{name} must be YAML: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise UsageError(f"{name} cannot be read: {error.strerror}.") from error
    found: list[str] = []
    _walk(name, {} if content is None else content, "", keys, found)
    return found


def _walk(file: str, content: object, prefix: str, keys: _Keys, found: list[str]) -> None:
    if not isinstance(content, dict):
        where = prefix.rstrip(".") or "the file"
        inside = [k for k in keys.leaves if k.startswith(prefix)][:3]
        raise UsageError(f"{file}: {where} must hold keys such as {', '.join(inside)}; got {content!r}.")
    for key, value in content.items():
        dotted = f"{prefix}{key}"
        if dotted in keys.sections:
            _walk(file, value, dotted + ".", keys, found)
        elif dotted in keys.leaves:
            found.append(dotted)
        else:
            raise UsageError(
                f"{file}: {dotted} is not a known key; did you mean {keys.nearest(dotted, sections=True)}?"
            )


def _check_flags(argv: Sequence[str], keys: _Keys, own: set[str]) -> None:
    for token in argv:
        name = token.partition("=")[0].removeprefix("--")
        if not token.startswith("--") or not name:
            continue
        if name in keys.sections:
            inside = next(k for k in keys.leaves if k.startswith(name + "."))
            raise UsageError(f"--{name} is a section; give one of its keys, such as --{inside} VALUE.")
        if name not in own and name not in keys.leaves:
            raise UsageError(f"--{name} is not a known flag; did you mean --{keys.nearest(name)}?")


def _with_origin(message: str, files: Mapping[str, str]) -> str:
    """Put jsonargparse's message on one line, and say which file set the key it is about."""
    text = " ".join(message.split()).replace("Parser key ", "wrong value for ")
    key = next((k for k in re.findall(r"[a-z_]+(?:\.[a-z_]+)*", text) if k in files), None)
    return f"{files[key]}: {text}" if key else text


def _stop(prog: str, message: str) -> NoReturn:
    sys.stderr.write(f"{prog}: {message}\nSee {prog} --help for every key and its unit.\n")
    raise SystemExit(2)
