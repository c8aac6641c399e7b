"""An error of a zarr write comes when nothing of it is on its way any more."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from zarr.storage import LocalStore

from engine.core.chunk_writes import write_region


class Refusing(LocalStore):
    """A folder that refuses one chunk at once and takes the others later."""

    async def set(self, key: str, value: Any) -> None:
        if key == "c/0":
            raise OSError(28, "No space left on device")
        if key.startswith("c/"):
            await asyncio.sleep(0.02)
        await super().set(key, value)


def test_other_chunks_are_on_the_disk_before_the_error(tmp_path: Path) -> None:
    array = zarr.create_array(Refusing(tmp_path), shape=(16,), chunks=(1,), dtype="uint8", fill_value=0)
    with pytest.raises(OSError, match="No space"):
        write_region(array, np.s_[:], np.arange(1, 17, dtype=np.uint8))
    assert len(list((tmp_path / "c").iterdir())) == 15
