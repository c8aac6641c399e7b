"""Dask arrays computed on Ray."""

from pathlib import Path

import numpy as np
import pytest

from engine.core.errors import ClusterError
from engine.images.reductions import colour_histograms
from tests.support.known_picture import PIXELS, image_of


@pytest.mark.ray
def test_a_reduction_computes_on_ray(ray_cluster: None, tmp_path: Path) -> None:
    import os

    import dask.array as da

    import engine
    from actors.cluster import dask_on_ray

    image_of(tmp_path / "a.ome.zarr")
    level = engine.open_picture(tmp_path / "a.ome.zarr", chunks=512).levels[0]
    counted = np.stack([np.bincount(colour.ravel(), minlength=256) for colour in PIXELS])
    with dask_on_ray():
        np.testing.assert_array_equal(colour_histograms(level), counted)
        where = da.ones(4, chunks=2).map_blocks(lambda part: part * os.getpid(), dtype=float).compute()
    assert os.getpid() not in where
    assert (da.ones(4, chunks=2).map_blocks(lambda part: part * os.getpid(), dtype=float) == os.getpid()).all()


def test_without_ray_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from actors.cluster import dask_on_ray

    monkeypatch.setattr("ray.is_initialized", lambda: False)  # an earlier test may have connected this process
    with pytest.raises(ClusterError, match="connected to it"), dask_on_ray():
        pass
