"""The errors a caller acts on; everything else is a plain ValueError.

EngineError
├── CheckpointError      a checkpoint is missing, foreign, damaged or hostile
├── ConfigError          keys or values of a configuration are not what its schema knows
├── CanvasError          the canvas on disk is damaged or cannot be written
│   └── CanvasMismatchError   the folder holds a run of another plan
├── DeviceMemoryError    a batch does not fit into the memory of its device
├── BagError             a feature bag is damaged, refused or cannot be named
│   └── BagMismatchError      the bag or its unfinished blocks were made with other settings
├── PreparedError        a prepared training set is damaged, incomplete or holds what no network returns
│   └── PreparedMismatchError it was made by other networks or for other magnifications
├── ReplicaLostError     a batch failed on its replicas too often
├── SlideError           a slide cannot be used; carries a reason code for tables
├── RowError             a row of a cohort's table cannot be made; carries a reason code
└── ClusterError         Ray or its resources are not as asked for
"""

import lzma
import struct
import tokenize
import zlib

UNREADABLE = (
    *(OSError, ValueError, RuntimeError, EOFError, SyntaxError, LookupError, TypeError, ArithmeticError),
    *(struct.error, tokenize.TokenError, zlib.error, lzma.LZMAError),  # the last two are Exceptions and nothing else
)
"""What picture libraries raise on damaged files, found by flipping bytes: a bad header sends them anywhere."""


class EngineError(Exception):
    """A failure to show the user as it is: what must hold, what came, what to do (exit code 1).

    >>> import engine
    >>> try:
    ...     engine.Run.open("nowhere")
    ... except engine.EngineError as error:
    ...     print(error)
    nowhere must be the folder of a run, with state.json; it is not. Pass output.folder.
    """


class ConfigError(EngineError):
    """Keys or values of a configuration are not what its schema knows."""


class CheckpointError(EngineError):
    """A checkpoint is missing, foreign, damaged or needs more than tensors."""


class CanvasError(EngineError):
    """The canvas on disk is damaged or cannot be written."""


class CanvasMismatchError(CanvasError):
    """The output folder holds a run of another plan."""


class DeviceMemoryError(EngineError):
    """A batch in its planned shape does not fit into the memory of its device, even when that is cleared."""


class BagError(EngineError):
    """A feature bag is damaged, lacks rows, holds what no encoder returns, or has a name that cannot be used."""


class BagMismatchError(BagError):
    """The bag on disk, or its unfinished blocks, were made with other settings."""


class PreparedError(EngineError):
    """A prepared training set is damaged, incomplete, empty where it must not be, or holds NaN."""


class PreparedMismatchError(PreparedError):
    """The prepared training set was made by another encoder or autoencoder, or for other magnifications."""


class ReplicaLostError(EngineError):
    """A batch was lost or wrong on its replicas too often; names tile, step and cause."""


class ClusterError(EngineError):
    """Ray does not answer, or lacks the resources asked for."""


class SlideError(EngineError):
    """A slide cannot be used. `code` is the reason in one word, for tables and for what is tried again."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["SlideError"], tuple[str, str]]:
        return type(self), (self.code, str(self))  # it travels between processes


class RowError(EngineError):
    """A row of a cohort's table cannot be made. `code` is the reason in one word, for tables."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code

    def __reduce__(self) -> tuple[type["RowError"], tuple[str, str]]:
        return type(self), (self.code, str(self))  # it travels between processes
