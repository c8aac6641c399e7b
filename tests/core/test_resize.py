import numpy as np
import pytest
import torch
from PIL import Image

from engine.core.numerics import mirror_indices, resize_by


@pytest.mark.parametrize("scale", [1 / 16, 1 / 4, 4, 16])
def test_a_constant_stays_constant_up_to_the_edges(scale: float) -> None:
    out = resize_by(torch.full((1, 3, 64, 64), 0.3), scale)
    assert out.shape[-1] == 64 * scale
    torch.testing.assert_close(out, torch.full_like(out, 0.3))


def test_the_interior_equals_pillows_bicubic() -> None:
    picture = np.random.default_rng(0).random((128, 128)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(picture).resize((32, 32), Image.Resampling.BICUBIC))
    ours = resize_by(torch.from_numpy(picture)[None, None], 1 / 4)[0, 0].numpy()
    np.testing.assert_allclose(ours[2:-2, 2:-2], theirs[2:-2, 2:-2], atol=1e-5)


def test_borders_are_mirrored_with_the_edge_repeated_even_past_a_whole_picture() -> None:
    assert mirror_indices(3, 4, torch.device("cpu")).tolist() == [2, 2, 1, 0, 0, 1, 2, 2, 1, 0, 0]


def test_a_size_that_is_not_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="whole px; got 10x12"):
        resize_by(torch.zeros(1, 3, 10, 12), 1 / 4)
