"""Every public name of `engine` and `mil` has an example in its docstring, and the example says the truth."""

import doctest
from pathlib import Path

import pytest

import engine
import mil

PUBLIC = [(package, name) for package in (engine, mil) for name in package.__all__ if name != "__version__"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all, as a reader has: what one example made, the next one finds."""
    return tmp_path_factory.mktemp("examples")


def examples(text: str, name: str) -> doctest.DocTest:
    return doctest.DocTestParser().get_doctest(text, {}, name, None, None)


def told(test: doctest.DocTest) -> str:
    """Run an example; return what went wrong."""
    said: list[str] = []
    doctest.DocTestRunner(verbose=False, optionflags=doctest.FAIL_FAST).run(test, out=said.append)
    return "".join(said)


@pytest.mark.parametrize(("package", "name"), PUBLIC, ids=[f"{p.__name__}.{n}" for p, n in PUBLIC])
def test_the_example_of_a_public_name_runs(
    package: object, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    test = examples(getattr(package, name).__doc__, name)
    assert any(name in example.source for example in test.examples), f"{name} must have an example that uses it"
    assert told(test) == ""


def test_a_wrong_example_fails() -> None:
    assert "Expected:\n    3" in told(examples(">>> 1 + 1\n3\n", "wrong"))
