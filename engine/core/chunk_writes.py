"""Writing a region of a zarr array, so that an error finds nothing half on its way.

zarr raises at the first chunk that is refused, while its loop goes on with the others: they would appear in a folder
that the caller has removed by then. Source: zarr 3.1, `zarr.core.common.concurrent_map` (asyncio.gather).
"""

import asyncio
from typing import Any

import numpy as np
from zarr.core.sync import sync


def write_region(array: Any, region: tuple[slice, ...], values: np.ndarray) -> None:
    """Write the values; raise what zarr raises, when all chunks that it had begun are written or refused."""
    try:
        array[region] = values
    except BaseException:  # Ctrl-C, too
        sync(_others_done())
        raise


async def _others_done() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    await asyncio.gather(*others, return_exceptions=True)
