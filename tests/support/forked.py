"""Functions in a process of their own, forked from one that has imported the commands: imports take longer than runs.

For processes that are killed or hear signals; what needs a fresh environment or Ray needs a fresh process.
"""

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["generate_large", "engine.generation.run", "engine.train", "engine.extract_features", "engine.prepare"]
)


def start(function: Callable[..., Any], *arguments: Any) -> ForkServerProcess:
    """Start a module's function; it is killed when the tests end."""
    process = SERVER.Process(target=function, args=arguments, daemon=True)
    process.start()
    return process


def exit_code(function: Callable[..., Any], *arguments: Any) -> int | None:
    """Let a module's function end; return the exit code of its process, a signal's is negative."""
    process = start(function, *arguments)
    process.join()
    return process.exitcode
