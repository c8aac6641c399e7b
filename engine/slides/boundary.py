"""The one place where an exception of any type becomes the failure of one slide.

A slide goes through many libraries (tifffile, zarr, OpenSlide, codecs, HDF5), and a damaged or odd one makes them
raise anything: MemoryError for a header that asks for petabytes, AssertionError, RecursionError, a class of their own.
No list of types was ever whole, and a type that is missing in it costs the run over all other slides. So every type is
taken here, and only here: around the work on one slide. KeyboardInterrupt and SystemExit are none of them and pass, as
our own errors do. What is taken is told with its type and where it came from, so that a fault of ours stays visible.
"""

import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.core.errors import EngineError, SlideError
from engine.core.exits import interruption_behind

DISK_ERROR, OUT_OF_MEMORY, UNEXPECTED = "disk_error", "out_of_memory", "unexpected"
log = logging.getLogger(__name__)
_LONGEST = 300
"""Characters of a library's message that are shown."""
_REMEDIES = {
    DISK_ERROR: "See that its disk is there and whole; then run again.",
    OUT_OF_MEMORY: (
        "A damaged header may ask for any amount: open the slide in a viewer. If it is whole, free memory, or read and "
        "encode less at once, and run again."
    ),
    UNEXPECTED: (
        "Open the slide in a viewer: if it is damaged, copy it again or leave it out; if it is not, write it anew (for "
        "instance vips tiffsave --tile --pyramid), and report this line."
    ),
}


@contextmanager
def one_slide(name: str, path: Path, doing: str) -> Iterator[None]:
    """Turn what the body raises into a SlideError of this slide; `doing` completes "it must be …", as "read".

    Raises: SlideError `disk_error`, `out_of_memory` or `unexpected`, from what was raised; EngineError as it is.
    """
    try:
        yield
    except EngineError:
        raise
    except Exception as error:
        if (stop := interruption_behind(error)) is not None:  # a signal inside a library's lock
            raise stop from None
        code = _code_of(error)
        log.debug("%s: while it was %s", name, doing, exc_info=error)
        raise SlideError(
            code,
            f"{name}: {path} must be {doing} without an error; {_told(error)} came from {_place_of(error)}. "
            f"{_REMEDIES[code]}",
        ) from error


def _code_of(error: Exception) -> str:
    # torch.OutOfMemoryError is a RuntimeError; it is told by its name, so that this needs no torch.
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return OUT_OF_MEMORY
    return DISK_ERROR if isinstance(error, OSError) else UNEXPECTED


def _told(error: Exception) -> str:
    """Return type and message of an exception in one line."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    message = " ".join(str(error).split())
    return f"{name} ({message[:_LONGEST]})" if message else name


def _place_of(error: Exception) -> str:
    """Return file and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)  # the innermost: a RecursionError has thousands
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "somewhere"
