"""Command lines from typed configs: the same way for every command of the project.

Keys of the YAML, flags and dataclass fields are one set of names; anything else stops with exit code 2 before a model
is touched, naming the nearest key. It does not know what the keys mean. jsonargparse reads types and attribute
docstrings.
"""

import json
import re
import sys
from argparse import ArgumentError
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, Protocol, TypeVar, cast, get_type_hints

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from engine.core.errors import ConfigError
from engine.core.exits import print_anywhere

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PROJECT_ROOT = Path(__file__).resolve().parents[2]
"""Where configs/ lies when the project is installed editable; commands may run from any folder."""
CONFIGS = "configs"
_SHIPPED = Path(__file__).resolve().parents[1] / "_configs"
"""What a wheel carries of configs/ (setup.py); not there in a checkout."""

T = TypeVar("T", bound="DataclassInstance")


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
    return parse_with_flags(argv, schema, prog, description, {}, first)[0]


def peek(argv: Sequence[str], key: str, known: Sequence[str], prog: str) -> str:
    """Return what a command line says of a top-level key that decides the schema, `known[0]` where it says nothing.

    Anything else than one of `known` stops with exit code 2; what cannot be read is left to `parse`.
    """
    print_anywhere()
    found: object = known[0]
    words = _joined(argv, ("config", key))
    for name in _values(words, "config"):
        with suppress(UsageError):
            found = _mapping(_read_yaml(_located(name))).get(key, found)
    found = [found, *_values(words, key)][-1]
    if found not in known:
        _stop(prog, f"{key} must be one of {', '.join(known)}; got {found!r}.")
    return str(found)


def stored_value(file: str | Path, key: str, default: object) -> object:
    """Return a top-level key of a YAML file, looked up as `--config` is. Raises: ConfigError."""
    try:
        return _mapping(_read_yaml(_located(str(file)))).get(key, default)
    except UsageError as error:
        raise ConfigError(str(error)) from error


def take(argv: Sequence[str], schema: "type[DataclassInstance]") -> tuple[list[str], list[str]]:
    """Part a command line in two: a last word that is no flag's value, then the flags of `schema`; and the rest."""
    names = {f"--{field.name}" for field in fields(schema)}
    own: list[str] = []
    rest = list(argv)
    if rest and not rest[-1].startswith("-") and (len(rest) == 1 or not _awaits_value(rest[-2])):
        own.append(rest.pop())
    words, rest = rest, list[str]()
    while words:
        word = words.pop(0)
        group = [word, words.pop(0)] if _awaits_value(word) and words and not words[0].startswith("--") else [word]
        (own if word.partition("=")[0] in names else rest).extend(group)
    return own, rest


def _awaits_value(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def parse_with_flags(
    argv: Sequence[str],
    schema: type[T],
    prog: str,
    description: str,
    flags: Mapping[str, str],
    first: str | None = None,
) -> tuple[T, frozenset[str]]:
    """As `parse`, with switches that belong to the command alone (name → help); returns those that were given."""
    if first is not None:
        if argv and not argv[0].startswith("-"):
            argv = [f"--{first}={argv[0]}", *argv[1:]]
        prog = f"{prog} {first.upper()}"
    print_anywhere()  # every command comes by here before it prints, --help included
    try:
        return _read(argv, schema, prog, description, flags)
    except UsageError as error:
        _stop(prog, str(error))


def _read(
    argv: Sequence[str], schema: type[T], prog: str, description: str, flags: Mapping[str, str]
) -> tuple[T, frozenset[str]]:
    """Do what `parse_with_flags` does. Raises UsageError."""
    parser, files = _build_parser(schema, prog, description, flags), _Files(schema, prog)
    try:
        words = files.inlined(argv)
        _check_flags(words, files.keys, {"config", "help", "print_config", *flags})
        values = parser.parse_args(words)
        given = frozenset(name for name in flags if values.pop(name.replace("-", "_")))
        values.pop("config")
        built = parser.instantiate(values)
        return schema(**{f.name: built[f.name] for f in fields(schema)}), given
    except (ArgumentError, ValueError) as error:
        flagged = {word.partition("=")[0].removeprefix("--") for word in argv}
        origins = {k: f for k, f in files.origins.items() if k not in flagged}
        raise UsageError(_with_origin(str(error), origins)) from error


def configured(schema: type[T], file: str | Path | None = None, changes: Mapping[str, object] | None = None) -> T:
    """Return a configuration without a command line: a YAML file's keys, and `changes` over them.

    `changes` are nested mappings or dotted keys. Raises: ConfigError for what `parse` stops at.
    """
    argv = [] if file is None else [f"--config={file}"]
    for key, value in _flat(changes or {}):
        text = str(value) if isinstance(value, str | Path) else json.dumps(value)
        argv.append(f"--{key}={text}")
    try:
        return _read(argv, schema, "", "", {})[0]
    except UsageError as error:
        raise ConfigError(str(error)) from error


def _flat(changes: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in changes.items():
        if isinstance(value, Mapping):
            yield from _flat(cast("Mapping[str, object]", value), f"{prefix}{key}.")
        else:
            yield prefix + key, value


class _Parser(Protocol):
    """What is used of jsonargparse, whose own annotations are partial."""

    def add_argument(self, *names: str, action: str, help: str) -> object: ...
    def add_class_arguments(self, class_type: type, nested_key: None) -> list[str]: ...
    def parse_args(self, args: Sequence[str]) -> Namespace: ...
    def instantiate(self, cfg: Namespace) -> Namespace: ...


def _new_parser(prog: str, usage: str, description: str) -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    return ArgumentParser(prog=prog, usage=usage, description=description, exit_on_error=False)


def _build_parser(schema: type, prog: str, description: str, flags: Mapping[str, str]) -> _Parser:
    switches = "".join(f" [--{name}]" for name in flags)
    parser = _new_parser(prog, f"{prog} [--config FILE]{switches} [--KEY VALUE ...]", description)
    about = "YAML file with any of the keys below; looked up here, then in the project. Later flags override it."
    parser.add_argument("--config", action="config", help=about)
    for name, text in flags.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)
    parser.add_class_arguments(schema, None)
    return parser


def _known_keys(schema: "type[DataclassInstance]", prefix: str = "") -> _Keys:
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


def _joined(argv: Sequence[str], names: Collection[str]) -> list[str]:
    """Write `--name value` of these names as one word, `--name=value`."""
    joined: list[str] = []
    for word in argv:
        if joined and joined[-1].removeprefix("--") in names and joined[-1][:2] == "--" != word[:2]:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def _values(words: Sequence[str], name: str) -> list[str]:
    return [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]


def _located(name: str) -> Path:
    """Return the file of `--config`: as given, else one of the project's. Raises UsageError if there is none."""
    for candidate in (Path(name).expanduser(), *project_files(name)):
        if candidate.is_file():
            return candidate
    raise UsageError(
        f"--config must name a YAML file; {name} is neither here ({Path.cwd()}) nor in the project ({PROJECT_ROOT}). "
        "Check the path."
    )


def project_files(name: str) -> Iterator[Path]:
    """Yield where a file of the project such as configs/demo.yaml may lie: in the checkout, then in the wheel."""
    yield PROJECT_ROOT / name
    if Path(name).parts[:1] == (CONFIGS,):
        yield _SHIPPED.joinpath(*Path(name).parts[1:])


def _read_text(file: Path) -> str:
    """Return the text of a config file: UTF-8, whatever the locale says. Raises UsageError."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} must be YAML: {error}") from error
    except OSError as error:
        raise UsageError(f"{file} cannot be read: {error.strerror}.") from error


def _read_yaml(file: Path) -> object:
    """Return the content of a YAML file. Raises UsageError."""
    try:
        return yaml.safe_load(_read_text(file))
    except yaml.YAMLError as error:
        raise UsageError(f"{file} must be YAML: {' '.join(str(error).split())}") from error


def _mapping(content: object) -> dict[str, object]:
    """Return what may be the keys of a config; nothing if it is no mapping."""
    return cast("dict[str, object]", content) if isinstance(content, dict) else {}


class _Files:
    """The config files of a command line: checked against a schema, and which of them set a key last."""

    def __init__(self, schema: "type[DataclassInstance]", prog: str) -> None:
        self.keys = _known_keys(schema)
        self.origins: dict[str, str] = {}
        self._retired: Mapping[str, str] = getattr(schema, "RETIRED", {})
        self._prog = prog

    def inlined(self, argv: Sequence[str]) -> list[str]:
        """Put the content of each file in its name's place, as jsonargparse takes it too; drop retired keys.

        Raises UsageError for a file that cannot be read, an unknown key in it, or no mapping at all.
        """
        words: list[str] = []
        for word in _joined(argv, ("config", *self._retired)):
            name, _, value = word.removeprefix("--").partition("=")
            if word.startswith("--config="):
                words.append(f"--config={self._content(_located(value))}")
            elif word.startswith("--") and name in self._retired:
                self._say_retired(f"--{name}", name)
            else:
                words.append(word)
        return words

    def _content(self, file: Path) -> str:
        content = _read_yaml(file)
        gone = [key for key in self._retired if _pop(_mapping(content), key.split("."))]
        for key in gone:
            self._say_retired(f"{file}: {key}", key)
        self._walk(str(file), {} if content is None else content, "")
        if content is None:
            return "{}"
        text = _read_text(file)
        # jsonargparse tries a text as a path first, and a locale may not encode it; dumped, it is ASCII.
        return yaml.safe_dump(content, sort_keys=False) if gone or not text.isascii() else text

    def _walk(self, file: str, content: object, prefix: str) -> None:
        if not isinstance(content, dict):
            where = prefix.rstrip(".") or "the file"
            inside = [k for k in self.keys.leaves if k.startswith(prefix)][:3]
            raise UsageError(f"{file}: {where} must hold keys such as {', '.join(inside)}; got {content!r}.")
        for key, value in cast("dict[str, object]", content).items():
            dotted = f"{prefix}{key}"
            if dotted in self.keys.sections:
                self._walk(file, value, dotted + ".")
            elif dotted in self.keys.leaves:
                self.origins[dotted] = file
            else:
                near = self.keys.nearest(dotted, sections=True)
                raise UsageError(f"{file}: {dotted} is not a known key; did you mean {near}?")

    def _say_retired(self, where: str, key: str) -> None:
        if self._prog:  # else a configuration that an earlier release stored, not one that a user writes
            why = self._retired[key]
            sys.stderr.write(f"{self._prog}: {where} is ignored, and an error in the next release: {why}.\n")


def _pop(content: dict[str, object], path: Sequence[str]) -> bool:
    """Remove a nested key; say whether it was there."""
    if len(path) > 1:
        return _pop(_mapping(content.get(path[0])), path[1:])
    return content.pop(path[0], None) is not None


def _check_flags(words: Sequence[str], keys: _Keys, own: set[str]) -> None:
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if not word.startswith("--") or not name:
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
