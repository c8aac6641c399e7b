"""Everything that imports Ray; no mathematics.

Ray reads its authentication and telemetry settings once, while it is imported, and the processes it starts read them
again: set later, driver and cluster disagree and refuse each other. Hence the one import-time act of this package.
"""

from actors.environment import prepare_environment

prepare_environment()
