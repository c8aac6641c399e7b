"""What can be reached from here: the Hugging Face Hub with its gated models, and a Ray cluster. No wait is long."""

import os
import threading
from collections.abc import Callable, Iterator
from importlib import metadata

from huggingface_hub import HfApi, constants, get_token, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's or httpx2's, whichever the library uses
    RepositoryNotFoundError,
)

from engine.installation.findings import NOTE, Finding
from engine.model.encoders.vit import PUBLISHED
from engine.model.weights.clip import CLIPS
from engine.model.weights.hub import LDM_FILES, VARIANTS

FindCluster = Callable[[float], str]
"""Says in words which Ray cluster a command would find here; takes the longest wait in seconds."""


def ray(find_cluster: FindCluster, wait_s: float) -> Iterator[Finding]:
    """Yield Ray's version and whether a cluster answers."""
    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        return  # the packages say it
    yield Finding("Ray", f"{version}; {find_cluster(wait_s)}")


def wanted_files() -> dict[str, str]:
    """Return a file of each model of the Hub that the engine knows, by repository; the first is the model's own."""
    files = {repo: f"{names[0]}/{LDM_FILES[0]}" for repo, names in VARIANTS.items()}
    files |= {spec.repo_id: spec.filename for spec in PUBLISHED.values()}
    return files | {spec.repo_id: spec.files[0] for spec in CLIPS.values()}


def hub(wait_s: float, ask: Callable[[str], None] | None = None) -> Iterator[Finding]:
    """Yield whether the Hub answers, and of each model whether it is here or may be fetched.

    `ask` raises what the Hub says of a repository; None asks it. A wait of 0 asks nobody.
    """
    offline = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "nobody was asked" if not wait_s else None
    answers = {} if offline else _within(wait_s, list(wanted_files()), ask or HfApi().auth_check)
    login = "with a token" if get_token() else "without a token (hf auth login)"
    reached = [answer for answer in answers.values() if answer is not None and not isinstance(answer, _NO_ANSWER)]
    if offline is not None:
        yield Finding("Hub", f"not used: {offline}. What is in the cache or in folders works.", NOTE)
    elif not reached:
        remedy = "Fetch models on a machine with a network (docs/how-to/offline.md)."
        yield Finding(
            "Hub", f"{constants.ENDPOINT} does not answer within {wait_s:g} s; the demo needs it not", NOTE, remedy
        )
    else:
        yield Finding("Hub", f"{constants.ENDPOINT} answers, {login}")
    for repo, file in wanted_files().items():
        yield _model(repo, file, answers.get(repo), bool(reached))


_NO_ANSWER = (OSError,)


def _model(repo: str, file: str, answer: BaseException | str | None, reached: bool) -> Finding:
    name = repo.split("/")[1].removesuffix("-with-registers-large")
    if isinstance(try_to_load_from_cache(repo, file), str):
        return Finding(name, f"{repo}: in the cache")
    if isinstance(answer, RepositoryNotFoundError) and not isinstance(answer, GatedRepoError):
        return Finding(name, f"{repo}: not in the cache; the Hub does not show it to this login", NOTE)
    if isinstance(answer, HfHubHTTPError) and (
        isinstance(answer, GatedRepoError) or answer.response.status_code in (401, 403)
    ):
        remedy = f"Ask for access on {constants.ENDPOINT}/{repo} and log in with `hf auth login`."
        return Finding(name, f"{repo}: not in the cache; gated, and this login has no access", NOTE, remedy)
    if answer == ALLOWED:
        return Finding(name, f"{repo}: not in the cache; may be fetched")
    why = "the Hub did not say whether it may be fetched" if reached else "cannot be fetched now"
    return Finding(name, f"{repo}: not in the cache; {why}", NOTE)


ALLOWED = "allowed"


def _within(wait_s: float, repos: list[str], ask: Callable[[str], None]) -> dict[str, BaseException | str | None]:
    """Ask for all repositories at once; those that have not answered in time are None.

    Threads, because a name server that is silent is waited for in C, past every time-out of the library.
    """
    answers: dict[str, BaseException | str | None] = dict.fromkeys(repos)

    def one(repo: str) -> None:
        try:
            ask(repo)
        except (HTTPError, OSError, HfHubHTTPError) as error:
            answers[repo] = error if isinstance(error, HfHubHTTPError) else OSError(str(error))
        else:
            answers[repo] = ALLOWED

    threads = [threading.Thread(target=one, args=(repo,), daemon=True) for repo in repos]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(wait_s / len(threads))
    return dict(answers)


def environment() -> Iterator[Finding]:
    """Yield the variables of the environment that change what commands do, where they are set."""
    names = ("RAY_ADDRESS", "RAY_TMPDIR", "CUDA_VISIBLE_DEVICES", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS")
    found = [f"{name}={os.environ[name]}" for name in names if name in os.environ]
    yield Finding("environment", ", ".join(found) or "none of the variables that matter is set")
