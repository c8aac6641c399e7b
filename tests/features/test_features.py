"""Features of tiles: a vector depends on its tile alone, and settings do what they say."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.core.errors import CheckpointError
from engine.features.bag_reader import BagFile, BagScale
from engine.features.bag_writer import write_bag
from engine.features.tile_encoders import (
    DiffusionEncoder,
    FeatureConfig,
    SSLTileEncoder,
    TileEncoder,
    TilePixels,
    cell_grids,
    encode_all,
)
from engine.model.encoders.registry import load_encoder
from engine.model.unet_features import block_widths
from engine.model.zoomldm import ZoomLDM, digest
from engine.slides.phantom.render import Phantom
from tests.support.known_bag import known_plan
from tests.support.tiny_run import narrow_config

CONFIG = FeatureConfig(blocks=("mid", "up.0"), timestep=100, batch=2)
ONE = replace(CONFIG, batch=1)


@pytest.fixture(scope="module")
def model() -> ZoomLDM:
    torch.manual_seed(0)
    return ZoomLDM(narrow_config())


@pytest.fixture(scope="module")
def demo() -> ZoomLDM:
    return ZoomLDM.from_pretrained("demo")


@pytest.fixture(scope="module")
def tiles() -> TilePixels:
    """Three tiles of tissue in a row: a batch of two and one that is filled up."""
    picture = Phantom(3).render(0, 0, 256, 3 * 256, 0.5)
    images = picture.reshape(256, 3, 256, 3).transpose(1, 3, 0, 2)
    coords = np.array([[512 * i, 1024] for i in range(3)], np.int64)
    return TilePixels("S-01", "20x", coords, np.ascontiguousarray(images))


def take(tiles: TilePixels, rows: list[int]) -> TilePixels:
    cells = None if tiles.cells is None else tiles.cells[rows]
    return replace(tiles, coords=tiles.coords[rows], images=tiles.images[rows], cells=cells)


def test_the_pooled_activation_is_the_blocks(model: ZoomLDM) -> None:
    x_t, context = torch.randn(2, 3, 64, 64), model.null_context(2)
    widths = block_widths(model.config)
    assert list(widths) == ["down.0", "down.1", "mid", "up.0", "up.1"]
    every = model.features(x_t, 50, context, list(widths))
    assert every.shape == (2, sum(widths.values()))
    caught: list[Tensor] = []
    hook = model.unet.mid_block.register_forward_hook(lambda _, inputs, output: caught.append(output))  # type: ignore[union-attr]
    with torch.no_grad():
        model.predict_eps(x_t, 50, context, 0.0)
    hook.remove()
    start = widths["down.0"] + widths["down.1"]
    assert torch.equal(every[:, start : start + widths["mid"]], caught[0].mean(dim=(2, 3)))
    assert torch.equal(model.features(x_t, 50, context, ["mid"]), caught[0].mean(dim=(2, 3)))


def test_blocks_come_in_the_order_asked_and_nothing_stays_hooked(model: ZoomLDM) -> None:
    x_t, context = torch.randn(1, 3, 64, 64), model.null_context(1)
    mid, up = (model.features(x_t, 50, context, [name]) for name in ("mid", "up.1"))
    assert torch.equal(model.features(x_t, 50, context, ["up.1", "mid"]), torch.cat([up, mid], dim=1))
    assert not any(module._forward_hooks for module in model.unet.modules())


def test_what_comes_after_the_last_block_is_not_computed(model: ZoomLDM) -> None:
    seen: list[str] = []
    hooks = [
        block.register_forward_hook(lambda *_, i=i: seen.append(f"up.{i}"))
        for i, block in enumerate(model.unet.up_blocks)
    ]
    model.features(torch.randn(1, 3, 64, 64), 50, model.null_context(1), ["mid"])
    assert seen == []
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("blocks", [(), ("up.7",), ("mid", "mid"), ("middle",)])
def test_blocks_that_are_not_there_are_refused(model: ZoomLDM, blocks: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="blocks must be different ones of down.0, down.1, mid, up.0, up.1"):
        DiffusionEncoder(model, replace(CONFIG, blocks=blocks))
    with pytest.raises(ValueError, match="blocks must be"):
        model.features(torch.randn(1, 3, 64, 64), 50, model.null_context(1), blocks)


@pytest.mark.parametrize("kind", ["tiny", "demo", "own"])
def test_a_vector_does_not_depend_on_its_neighbours(
    model: ZoomLDM, demo: ZoomLDM, tiles: TilePixels, kind: str
) -> None:
    config, ssl = CONFIG, None
    if kind == "own":
        config, ssl = replace(CONFIG, condition="own"), load_encoder("demo", extras=demo.extras)
    encoder = DiffusionEncoder(model if kind == "tiny" else demo, config, ssl)
    whole = encoder.encode(tiles)
    assert whole.shape == (3, encoder.dim)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(encoder.encode(take(tiles, [1])), whole[[1]])
    order = [2, 0, 1]
    np.testing.assert_array_equal(encoder.encode(take(tiles, order)), whole[order])
    assert encoder.encode(take(tiles, [])).shape == (0, encoder.dim)


def test_tiles_that_could_not_be_read_are_nan_and_do_not_matter(model: ZoomLDM, tiles: TilePixels) -> None:
    encoder = DiffusionEncoder(model, CONFIG)
    valid = np.array([False, True, False])
    vectors = encoder.encode(replace(tiles, valid=valid))
    assert np.isnan(vectors[~valid]).all()
    np.testing.assert_array_equal(vectors[valid], encoder.encode(tiles)[valid])


@pytest.mark.parametrize(
    "change",
    [{"slide": "S-02"}, {"scale": "5x"}, {"coords": np.array([[0, 1]] * 3, np.int64)}, {"seed": 1}, {"timestep": 101}],
)
def test_noise_is_keyed_by_slide_scale_place_seed_and_timestep(model: ZoomLDM, tiles: TilePixels, change: dict) -> None:
    one = take(tiles, [0])
    config = replace(ONE, **{k: v for k, v in change.items() if k in ("seed", "timestep")})
    other = replace(
        one, **{k: v[:1] if k == "coords" else v for k, v in change.items() if k not in ("seed", "timestep")}
    )
    before, after = DiffusionEncoder(model, ONE).encode(one), DiffusionEncoder(model, config).encode(other)
    assert np.abs(before - after).max() > 1e-4


def test_a_tile_left_of_the_slide_has_noise_of_its_own(model: ZoomLDM, tiles: TilePixels) -> None:
    one = take(tiles, [0])
    encoder = DiffusionEncoder(model, ONE)
    left, right = (encoder.encode(replace(one, coords=np.array([xy], np.int64))) for xy in ([-512, 0], [512, 0]))
    assert not np.array_equal(left, right)


def test_the_condition_and_its_magnification_matter(demo: ZoomLDM, tiles: TilePixels) -> None:
    ssl = load_encoder("demo", extras=demo.extras)
    cells = cell_grids(ssl, np.ascontiguousarray(tiles.images[[0, 1, 2, 0]]).reshape(1, 2, 2, 3, 256, 256))
    assert cells.shape == (1, ssl.dim, 2, 2)
    np.testing.assert_array_equal(cells[0, :, 1, 0], ssl.encode(torch.from_numpy(tiles.images[2:3]))[0])
    own = replace(ONE, condition="own")
    one = replace(take(tiles, [0]), cells=cells, scale="10x")
    vectors = [
        DiffusionEncoder(demo, ONE).encode(one),
        DiffusionEncoder(demo, own).encode(one),
        DiffusionEncoder(demo, own).encode(replace(one, cells=-cells)),
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert np.abs(vectors[i] - vectors[j]).max() > 1e-3
    encoder = DiffusionEncoder(demo, own)
    one = take(tiles, [0])
    contexts = [encoder._context(replace(one, cells=cells), index) for index in (1, 2)]
    assert not torch.equal(*contexts)


def test_a_coarse_tile_without_cells_says_what_it_needs(demo: ZoomLDM, tiles: TilePixels) -> None:
    encoder = DiffusionEncoder(demo, replace(CONFIG, condition="own"), load_encoder("demo", extras=demo.extras))
    with pytest.raises(ValueError, match="needs the 4x4 SSL vectors that a tile covers at 5x"):
        encoder.encode(replace(tiles, scale="5x"))


def test_several_encoders_share_the_pixels_and_the_vectors(demo: ZoomLDM, tiles: TilePixels) -> None:
    ssl = load_encoder("demo", extras=demo.extras)
    own = replace(CONFIG, condition="own")
    tiles = take(tiles, [0, 1])
    asked: list[int] = []

    class Counting:
        id, dim, digest = ssl.id, ssl.dim, ssl.digest

        def encode(self, images: Tensor) -> Tensor:
            asked.append(len(images))
            return ssl.encode(images)

    counting = Counting()
    encoders: list[TileEncoder] = [DiffusionEncoder(demo, own, counting), SSLTileEncoder(counting, 4)]
    both = encode_all(encoders, tiles)
    assert list(both) == ["zoomldm", "demo"]
    assert asked == [4]
    np.testing.assert_array_equal(both["zoomldm"], DiffusionEncoder(demo, own, ssl).encode(tiles))
    np.testing.assert_array_equal(both["demo"], ssl.encode(torch.from_numpy(tiles.images)))


def test_attributes_say_what_was_used(demo: ZoomLDM) -> None:
    attributes = DiffusionEncoder(demo, CONFIG).attributes()
    assert attributes | {"weights_sha256": ""} == {
        "encoder": "zoomldm",
        "weights_sha256": "",
        "block": "mid,up.0",
        "timestep": 100,
        "condition": "null",
        "seed": 0,
    }
    ssl = load_encoder("demo", extras=demo.extras)
    assert SSLTileEncoder(ssl).attributes() == {"encoder": "demo", "weights_sha256": ssl.digest}


def test_what_an_encoder_says_fits_a_bag(model: ZoomLDM, tiles: TilePixels, tmp_path: Path) -> None:
    tiles = take(tiles, [0, 1])
    encoder = DiffusionEncoder(model, ONE)
    plan = known_plan(**encoder.attributes())
    scale = BagScale("20x", 0.5, (512.0, 512.0), tiles.coords)
    path = write_bag(
        tmp_path / "a.h5", replace(plan, scales=(scale,), width=encoder.dim), {"20x": encoder.encode(tiles)}
    )
    with BagFile(path) as bag:
        assert bag.attributes.weights_sha256 == digest(model)
        assert bag.attributes.block == "mid,up.0"
        np.testing.assert_array_equal(bag.features("20x"), encoder.encode(tiles))


def test_nan_features_are_refused_and_placed(tiles: TilePixels) -> None:
    broken = ZoomLDM(narrow_config())
    with torch.no_grad():
        broken.unet.conv_in.weight.fill_(torch.nan)
    with pytest.raises(CheckpointError, match=r"zoomldm must return finite.*\(0, 1024\) of 'S-01' at 20x"):
        DiffusionEncoder(broken, CONFIG).encode(tiles)


def test_wrong_settings_are_refused(model: ZoomLDM, demo: ZoomLDM, tiles: TilePixels) -> None:
    with pytest.raises(ValueError, match="timestep must be below 1000; got 1000"):
        DiffusionEncoder(model, replace(CONFIG, timestep=1000))
    with pytest.raises(ValueError, match="conditioned on 16 wide vectors of 'unknown'; got 'demo', 64 wide"):
        DiffusionEncoder(model, CONFIG, load_encoder("demo", extras=demo.extras))
    with pytest.raises(ValueError, match="magnification must be one of 20x, 10x, 5x, 2.5x; got '40x'"):
        DiffusionEncoder(model, CONFIG).encode(replace(tiles, scale="40x"))
    with pytest.raises(ValueError, match="timestep >= 0 and batch >= 1"):
        FeatureConfig(batch=0)
    with pytest.raises(ValueError, match=r"tiles must be uint8 \(3, 3, 256, 256\)"):
        replace(tiles, images=tiles.images[:, :, :224, :224])
    with pytest.raises(ValueError, match="valid must have one entry for each of the 3"):
        replace(tiles, valid=np.ones(2, bool))
