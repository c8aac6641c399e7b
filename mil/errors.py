"""What can be wrong with a study, as the user is told of it.

EngineError
└── StudyError           a study cannot be done as asked for
    ├── TaskError        the task's YAML or its rule
    ├── CohortError      labels and features do not fit together
    ├── SplitError       patients cannot be divided as asked for
    │   └── LeakageError     somebody would be trained on and tested on
    └── RunError         a run folder is not what a command needs
"""

from engine.core.errors import EngineError


class StudyError(EngineError):
    """A study cannot be done as asked for."""


class TaskError(StudyError):
    """The task is unknown, or its rule cannot be read."""


class CohortError(StudyError):
    """Labels and features do not fit together."""


class SplitError(StudyError):
    """Patients cannot be divided as asked for."""


class LeakageError(SplitError):
    """A patient, or the source patient of a synthetic slide, would be on both sides of a split."""


class RunError(StudyError):
    """A run folder, or a model in it, is not what the command needs."""
