"""Every model of bags keeps the contract."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from mil.data.dataset import as_bags
from mil.fit.training import fit_scale
from mil.models import MODELS, BagModel, ModelConfig, build_model, pooling
from mil.models.transmil import pseudo_inverse

WIDTHS = (6, 4)


def model_of(name: str, classes: int = 2, seed: int = 0) -> BagModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build_model(ModelConfig(name, WIDTHS, hidden=16, attention=8, dropout=0.0, classes=classes)).eval()


def bag(count: int, seed: int = 1) -> Tensor:
    return torch.randn(1, count, sum(WIDTHS), generator=torch.Generator().manual_seed(seed))


def full(x: Tensor) -> Tensor:
    return torch.ones(x.shape[:2], dtype=torch.bool)


@pytest.fixture(params=[(name, classes) for name in sorted(MODELS) for classes in (2, 3)], ids=str)
def model(request: pytest.FixtureRequest) -> BagModel:
    return model_of(*request.param)


@pytest.mark.parametrize("count", [1, 2, 5, 300])
def test_any_number_of_instances_has_an_answer(model: BagModel, count: int) -> None:
    x = bag(count)
    out = model(x, full(x))
    assert out.logit.shape == ((1,) if model.config.classes == 2 else (1, 3))
    assert torch.isfinite(out.logit).all()
    assert out.attention.shape == (1, count)
    assert (out.attention >= 0).all()
    torch.testing.assert_close(out.attention.sum(dim=1), torch.ones(1))
    loss = model.loss(x, full(x), torch.ones(1), torch.ones(1))
    assert torch.isfinite(loss)


def test_order_does_not_matter_where_it_should_not(model: BagModel) -> None:
    x = bag(50)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(2))
    one, other = model(x, full(x)), model(x[:, order], full(x))
    same = torch.allclose(one.logit, other.logit, atol=1e-5)
    assert same == model.permutation_invariant
    if same:
        torch.testing.assert_close(one.attention[:, order], other.attention, atol=1e-6, rtol=1e-4)


def test_padding_does_not_matter(model: BagModel) -> None:
    short, long = bag(7, 3), bag(40, 4)
    x = torch.full((2, 40, sum(WIDTHS)), 1e3)  # what lies under the mask must not be looked at
    x[0, :7], x[1] = short[0], long[0]
    mask = torch.zeros(2, 40, dtype=torch.bool)
    mask[0, :7], mask[1] = True, True
    both, alone = model(x, mask), model(short, full(short))
    torch.testing.assert_close(both.logit[:1], alone.logit)
    torch.testing.assert_close(both.attention[:1, :7], alone.attention)
    assert both.attention[0, 7:].abs().max() == 0
    y, weight = torch.tensor([1.0, 0.0]), torch.ones(2)
    apart = [model.loss(b, full(b), y[i : i + 1], weight[:1]) for i, b in enumerate((short, long))]
    torch.testing.assert_close(model.loss(x, mask, y, weight), torch.stack(apart).mean())


def test_gradient_reaches_every_parameter(model: BagModel) -> None:
    x = torch.cat([bag(40, 5), bag(40, 6)])
    model.loss(x, full(x), torch.tensor([1.0, 0.0]), torch.ones(2)).backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert dead == []


def test_whitened_features_are_uncorrelated_within_a_scale() -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(sum(WIDTHS), sum(WIDTHS)))
    bags = as_bags([(rng.normal(size=(60, sum(WIDTHS))) @ mixing).astype(np.float32) for _ in range(40)])
    model = build_model(ModelConfig("abmil", WIDTHS, hidden=4, attention=2, whiten=True))
    fit_scale(model.features, bags, seed=0)
    out = model.features(torch.from_numpy(np.concatenate([bag.read() for bag in bags])))
    np.testing.assert_allclose(out.mean(dim=0), 0, atol=1e-3)
    found = np.cov(out.numpy().T)
    for columns in (slice(0, 6), slice(6, 10)):
        np.testing.assert_allclose(found[columns, columns], np.eye(6 if columns.start == 0 else 4), atol=0.12)
    assert np.abs(found[:6, 6:]).max() > 0.2  # scales are whitened apart


def test_chunks_change_nothing(model: BagModel, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.cat([bag(50, 7), bag(50, 8)]), torch.tensor([1.0, 0.0])
    mask = full(x)
    mask[0, 20:] = False  # whole chunks of nothing but padding
    results = []
    for chunk in (pooling.CHUNK, 16):
        monkeypatch.setattr(pooling, "CHUNK", chunk)
        model.zero_grad()
        model.loss(x, mask, y, torch.ones(2)).backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        results.append((model(x, mask), gradients))
    (one, one_gradients), (other, other_gradients) = results
    torch.testing.assert_close(one.logit, other.logit)
    torch.testing.assert_close(one.attention, other.attention)
    torch.testing.assert_close(one_gradients, other_gradients, atol=1e-5, rtol=1e-3)


MEMORY = """
import resource, sys, torch
from mil.models import build_model, ModelConfig
torch.set_num_threads(1)
widths = (8, 8)
model = build_model(ModelConfig(sys.argv[1], widths, hidden=64, attention=32))
x = torch.randn(1, 100_000, 16)
mask = torch.ones(1, 100_000, dtype=torch.bool)
y = weight = torch.ones(1)
model.loss(x[:, :9000], mask[:, :9000], y, weight).backward()  # what libraries allocate once
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.loss(x, mask, y, weight).backward()
with torch.no_grad():
    model.eval()(x, mask)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.parametrize("name", sorted(MODELS))
def test_100_000_instances_in_bounded_memory(name: str) -> None:
    """Embedded, the bag would take 24 MiB; an (N, N) matrix 37 GiB. Chunks need neither; TransMIL keeps sequences."""
    done = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, timeout=250, check=True)
    assert int(done.stdout) < (750 if name == "transmil" else 30)


def test_the_pseudo_inverse_is_one() -> None:
    a = torch.softmax(torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 4 * torch.eye(8), dim=-1)
    torch.testing.assert_close(pseudo_inverse(a), torch.linalg.inv(a), atol=1e-4, rtol=1e-4)


def test_an_unknown_model_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="mean abmil"):
        build_model(ModelConfig("abnil", WIDTHS))
