"""p(z_l | h) with a window is a density, of earlier positions only, and is sampled as it says."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from test_context import raster_order

from hvae.distributions import DiagonalGaussian
from hvae.fronts import SlantedCanvas, fronts
from hvae.prior import MaskedConv, WindowNetwork, WindowPrior
from model import HVAE
from trainer import train

SMALL = dict(
    outer_config=[("conv", 8, 4)],
    inner_config=[[("conv", 8, 2)], [("conv", 8)], [("dense", 8)]],
    input_size=(16, 24),
    latent_channels=[2, 2, 3, 4],
    text_length=None,
    prior_context=(2, 1),
)
PLAIN_PIXELS = dict(likelihood="gaussian", context=None)  # quick to score thousands of draws


def random_prior(c_z: int, size: tuple[int, int], batch: int = 1, scale: float = 6.0):
    """A prior whose mixtures differ much from N(0, I), and from place to place."""
    torch.manual_seed(0)
    network = WindowNetwork(c_z, 5, (2, 1))
    with torch.no_grad():
        network.out.weight *= scale
    mu, logvar = torch.randn(2, 1, c_z, *size).expand(-1, batch, -1, -1, -1)
    h = torch.randn(1, 5, *size).expand(batch, -1, -1, -1)
    return WindowPrior(DiagonalGaussian(mu, 0.5 * logvar), network, h)


@torch.no_grad()
def test_density_integrates_to_one():
    """Over a grid of all (z_1, z_2) of a map of two positions."""
    line = torch.linspace(-15, 15, 601)
    z = torch.cartesian_prod(line, line).view(-1, 1, 1, 2)
    one = random_prior(1, (1, 2))
    base = DiagonalGaussian(*(part.expand(len(z), -1, -1, -1) for part in one.base))
    prior = WindowPrior(base, one.network, torch.zeros(len(z), 5, 1, 2))
    total = prior.log_prob(z).double().exp().sum() * (line[1] - line[0]) ** 2
    assert total.item() == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_a_position_depends_on_earlier_ones_of_its_window_only(place):
    prior = random_prior(2, (3, 4))
    u = torch.randn(1, 2, 3, 4, requires_grad=True)
    network = prior.network
    _, mean, _ = network(network.from_window(network.canvas(u)), prior.from_h)
    i, j = place
    mean[..., i, j].sum().backward()
    seen = u.grad.abs().sum((0, 1)) > 0
    for row in range(3):
        for column in range(4):
            above = i - 2 <= row < i and abs(column - j) <= 1
            assert seen[row, column] == (above or (row == i and column == j - 1))


@torch.no_grad()
def test_samples_have_the_density():
    """E over draws of q(z) / p(z) is one for any density q; and p's own moments, by the draws."""
    prior = random_prior(2, (2, 2), batch=40_000, scale=3.0)
    z = prior.sample(generator=torch.Generator().manual_seed(1))
    log_q = DiagonalGaussian(prior.base.mu, prior.base.logvar - 1.5).log_prob(z)
    ratio = (log_q - prior.log_prob(z)).double().exp()
    error = ratio.std() / math.sqrt(len(z))
    assert error < 0.1
    assert abs(ratio.mean() - 1) < 5 * error


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(0, 9))
def test_slanted_order_draws_the_map_of_raster_order(h, w, seed):
    prior = random_prior(2, (h, w), batch=3)
    draw = lambda: prior.sample(1.0, torch.Generator().manual_seed(seed))
    slanted = draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvae.prior.fronts", raster_order)
        torch.testing.assert_close(draw(), slanted)


@torch.no_grad()
@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 7), st.integers(1, 3), st.integers(1, 3))
def test_windows_of_a_front_are_those_of_the_convolution(h, w, rows, columns):
    u, conv = torch.randn(3, 2, h, w), MaskedConv(2, 4, rows, columns)
    whole = conv(F.pad(u, (columns, columns, rows, 0)))
    canvas = SlantedCanvas(u.shape, (rows, columns), u)
    for i, j, n in fronts(h, w, columns):
        at = (slice(None), slice(None), *canvas.positions(i, j, n))
        front = conv.of_windows(torch.cat(canvas.window(i, j, n)))[0]
        torch.testing.assert_close(front.permute(2, 0, 1), whole[at])
        canvas.write(i, j, u[at].permute(1, 2, 0))
    assert torch.equal(canvas.maps(), u)


@torch.no_grad()
def test_temperature_zero_leaves_the_choice_of_components():
    prior = random_prior(1, (2, 2), batch=64)
    z = prior.sample(temperature=0.0)
    assert len(z[:, 0, 0, 0].unique()) <= prior.network.mixtures


def test_elbo_is_a_bound_of_its_own_importance_weights():
    """The KL term of a window is -H(q) - log p(z): the mean log weight is the ELBO."""
    torch.manual_seed(0)
    model = HVAE(**{**SMALL, **PLAIN_PIXELS}).eval()
    assert [level.window is not None for level in model.levels] == [True, True, True, False]
    x = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        terms = model(x, draws=4000)
    elbo, weight = (t.view(2, -1).mean(1) for t in (terms.elbo, terms.log_weight))
    assert torch.allclose(elbo, weight, atol=1.0)


@pytest.mark.parametrize("inference, has_window", [("top-down", True), ("bottom-up", False)])
def test_the_top_of_a_ladder_may_be_a_map_with_a_window(inference, has_window):
    """Its prior then depends on the text, by h, and on nothing else."""
    torch.manual_seed(0)
    config = {**SMALL, **PLAIN_PIXELS, "inner_config": [[("conv", 8, 2)]], "latent_channels": 2}
    model = HVAE(**{**config, "text_length": 2, "inference": inference}).eval()
    assert (model.levels[-1].window is not None) == has_window
    x, y = torch.rand(2, 3, 16, 24), torch.tensor([[0, 1], [2, 3]])
    with torch.no_grad():
        terms = model(x, y, draws=2000)
    elbo, weight = (t.view(2, -1).mean(1) for t in (terms.elbo, terms.log_weight))
    assert torch.allclose(elbo, weight, atol=1.0)
    assert model.sample(2, ["7K", "QX"]).isfinite().all()


@torch.no_grad()
def test_a_map_below_a_vector_asks_for_its_symbols():
    """The mixtures of its prior know the text; its base Gaussian, and so q, does not."""
    torch.manual_seed(0)
    model = HVAE(**{**SMALL, "text_length": 2, "charset": "AB"}).eval()
    assert [level.prior_features is not None for level in model.levels] == [
        False,
        False,
        True,
        False,
    ]
    y = torch.tensor([[0, 1], [1, 0]])
    h = model.generation[3](torch.randn(1, 8)).expand(2, -1, -1, -1)
    p = model.levels[2].prior(h, y)
    assert torch.equal(*p.base.mu) and not torch.allclose(*p.from_h)


def test_trained_saved_and_sampled(tmp_path):
    model = HVAE(**SMALL)
    data = [(torch.rand(3, 16, 24), torch.zeros(0, dtype=torch.long)) for _ in range(40)]
    before = model.levels[1].window.out.weight.clone()
    trained, _ = train(model, data, steps=3, batch_size=8, workers=0, out=tmp_path / "run")
    assert not torch.equal(trained.levels[1].window.out.weight, before)
    again = HVAE.load(tmp_path / "run" / "hvae.pt")
    draws = [m.sample(2, generator=torch.Generator().manual_seed(3)) for m in (trained, again)]
    assert torch.equal(*draws)


@pytest.mark.parametrize("window", [3, (0, 1), (1, 2, 3), "33"])
def test_wrong_windows_are_refused(window):
    with pytest.raises(ValueError, match="prior_context"):
        HVAE(prior_context=window)


def test_closed_levels_are_closed_with_a_window_too():
    torch.manual_seed(0)
    model = HVAE(**SMALL).eval()
    x = torch.rand(2, 3, 16, 24)
    _, levels = model.infer(x, closed=torch.tensor([0, 3]))
    for level in levels[:3]:
        assert torch.equal(level.z[1], level.p.base.mu[1])
        assert not torch.equal(level.z[0], level.p.base.mu[0])
