import pytest

from engine.images.ome_zarr import Image
from tests.support.known_picture import image_of


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """1300 x 900 px of 0.5 µm in three levels."""
    return image_of(tmp_path_factory.mktemp("image") / "image.ome.zarr")
