"""The plan's arithmetic, at full size: counted on the meta device and held to the published figures."""

import pytest
import torch

from engine.core.config import ModelConfigSection
from engine.core.units import BRCA_SCALE
from engine.generation.cost import (
    Calls,
    NetworkCost,
    evaluated,
    export_nbytes,
    level_flop,
    network_cost,
    pass_calls,
    plan_table,
    probe_cpu_tflops,
)
from engine.model.config import ModelConfig, published_config, tiny_config
from engine.sampling.config import (
    CanvasConfig,
    DecodeConfig,
    GuidanceConfig,
    OutputConfig,
    RefineConfig,
    RunConfig,
    SamplingConfig,
)
from engine.sampling.plan import make_plan

GIGA, PETA = 1e9, 1e15


@pytest.fixture(scope="module")
def full() -> ModelConfig:
    """The published BRCA model."""
    return published_config()


@pytest.fixture(scope="module")
def cost(full: ModelConfig) -> NetworkCost:
    return network_cost(full, "bfloat16", batch=4, guided_calls=True)


def published(method: str) -> RunConfig:
    """4096 x 4096 px by the paper's recipe."""
    return RunConfig(
        model=ModelConfigSection(dtype="bfloat16"),
        canvas=CanvasConfig(height=4096, width=4096),
        sampling=SamplingConfig(from_guide=0, tile_stride=64, tile_weights="uniform"),
        guidance=GuidanceConfig(method=method, to_t=1),  # type: ignore[arg-type]
        refine=RefineConfig(start=300),
        decode=DecodeConfig(tile_stride=16),
        output=OutputConfig(formats=("tiff", "png")),
    )


def test_networks_cost_what_is_published(cost: NetworkCost) -> None:
    assert cost.unet == pytest.approx(210.6 * GIGA, rel=1e-3)
    assert cost.decode == pytest.approx(670.8 * GIGA, rel=1e-3)
    assert cost.encode == pytest.approx(345.2 * GIGA, rel=1e-3)


def test_memory_of_a_replica(cost: NetworkCost) -> None:
    parameters = 400.9e6 + 55.3e6 + 38.7e6
    assert cost.weights_nbytes == pytest.approx(2 * parameters, rel=1e-3)
    one_activation = 2 * 4 * 128 * 256**2  # bfloat16, batch 4, the decoder's widest layer
    assert one_activation < cost.activations_nbytes < 30 * one_activation


@pytest.mark.parametrize(("method", "flop"), [("newton", 113 * PETA), ("none", 2.2 * PETA)])
def test_joint_sampling_at_4096(full: ModelConfig, cost: NetworkCost, method: str, flop: float) -> None:
    config = published(method)
    plan = make_plan(config, full.scale)
    assert pass_calls(plan, plan.passes[0], config).flop(cost) == pytest.approx(flop, rel=0.03)


def test_newton_calls_per_tile(full: ModelConfig) -> None:
    newton, none = (published(m) for m in ("newton", "none"))
    plans = [make_plan(c, full.scale) for c in (newton, none)]
    with_, without = (pass_calls(p, p.passes[0], c) for p, c in zip(plans, (newton, none), strict=True))
    corrections = 256 * 20 * 10
    assert with_.unet - without.unet == 4 * corrections
    assert with_.encode == 2 * corrections
    assert with_.decode == corrections + 20  # and the guide's own tile
    assert without.encode == without.decode == 0


@pytest.mark.parametrize("method", ["newton", "linear"])
def test_levels_share_the_cost_of_a_run(full: ModelConfig, cost: NetworkCost, method: str) -> None:
    config = published(method)
    plan = make_plan(config, full.scale)
    levels = [level_flop(plan, number, config, cost) for number in range(len(plan.levels))]
    passes = sum(pass_calls(plan, p, config).flop(cost) for p in plan.passes)
    assert sum(levels) == pytest.approx(passes + evaluated(plan.decode) * cost.decode)
    assert 0 < levels[0] < levels[1] / 40


def test_calls_add() -> None:
    assert Calls(1, 2, 3, 4) + Calls(10, 20, 30, 40) == Calls(11, 22, 33, 44)


def test_exports_are_counted_without_compression() -> None:
    plan = make_plan(published("none"), BRCA_SCALE)
    px = 4096**2 * 3
    assert export_nbytes(plan, published("none")) == px * 2 * 4 // 3 + px


def test_table_names_what_a_user_asks(full: ModelConfig) -> None:
    config = published("newton")
    text = plan_table(make_plan(config, full.scale), config, full, "cuda")
    for part in ("4096 x 4096", "1.25x", "joint 256 (64)", "refine 3721", "PFLOP", "MiB", "TFLOP/s", "16 x 16 cells"):
        assert part in text


def test_probe_measures_something() -> None:
    assert 1e-5 < probe_cpu_tflops(32, torch.float32, 2, threads=1, seconds=0.05) < 100


def test_counting_leaves_nothing_behind() -> None:
    before = torch.get_default_device()
    network_cost(tiny_config(), "float32", 1, guided_calls=False)
    assert torch.get_default_device() == before
