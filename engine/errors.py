"""The errors a caller acts on; everything else is a plain ValueError.

EngineError
├── CheckpointError      a checkpoint is missing, foreign, damaged or hostile
├── CanvasError          the canvas on disk is damaged or cannot be written
│   └── CanvasMismatchError   the folder holds a run of another plan
├── BagError             a feature bag is damaged, refused or cannot be named
│   └── BagMismatchError      the bag or its unfinished blocks were made with other settings
├── ReplicaLostError     a batch failed on its replicas too often
└── ClusterError         Ray or its resources are not as asked for
"""


class EngineError(Exception):
    """A failure to show the user as it is: what must hold, what came, what to do (exit code 1)."""


class CheckpointError(EngineError):
    """A checkpoint is missing, foreign, damaged or needs more than tensors."""


class CanvasError(EngineError):
    """The canvas on disk is damaged or cannot be written."""


class CanvasMismatchError(CanvasError):
    """The output folder holds a run of another plan."""


class BagError(EngineError):
    """A feature bag is damaged, lacks rows, holds what no encoder returns, or has a name that cannot be used."""


class BagMismatchError(BagError):
    """The bag on disk, or its unfinished blocks, were made with other settings."""


class ReplicaLostError(EngineError):
    """A batch was lost or wrong on its replicas too often; names tile, step and cause."""


class ClusterError(EngineError):
    """Ray does not answer, or lacks the resources asked for."""
