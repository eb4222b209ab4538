"""The flow that makes p(z_L) from N(0, I), alone and in a model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flow import Flow, Flowed, fit
from model import HVAE, Normal
from trainer import loss_terms

VECTOR_TOP = dict(outer_config=[("conv", 4, 2)], inner_config=[[("dense", 6)]], input_size=(6, 8), input_channels=1,
                  latent_channels=(2, 5), likelihood="bernoulli", text_length=None)


def bent_flow(c, couplings, seed=0):
    """A flow far from the identity, in float64."""
    torch.manual_seed(seed)
    flow = Flow(c, couplings).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


def standard(n, c):
    return Normal(torch.zeros(n, c, dtype=torch.float64), torch.zeros(n, c, dtype=torch.float64))


def tiny(**arguments):
    torch.manual_seed(0)
    return HVAE(**{**VECTOR_TOP, **arguments})


# ------------------------------------------------------------------------------------------------ the map


@settings(max_examples=25, deadline=None)
@given(c=st.integers(2, 9), couplings=st.integers(1, 5), seed=st.integers(0, 99))
def test_inverse_and_determinant(c, couplings, seed):
    flow = bent_flow(c, couplings, seed)
    z = torch.randn(3, c, dtype=torch.float64)
    u, log_det = flow(z)
    torch.testing.assert_close(flow.inverse(u), z)
    torch.testing.assert_close(flow(flow.inverse(z))[0], z)
    for i in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda row: flow(row[None])[0][0], z[i])
        torch.testing.assert_close(log_det[i], torch.linalg.slogdet(jacobian).logabsdet)


def test_flow_starts_near_the_identity():
    torch.manual_seed(0)
    flow, z = Flow(64, 6), torch.randn(100, 64)
    u, log_det = flow(z)
    assert (u.square().sum(1) / z.square().sum(1)).log().abs().max() < 0.5 and log_det.abs().max() < 5


def test_density_integrates_to_one():
    flow = bent_flow(2, 3)
    axis = torch.linspace(-15, 15, 600, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        density = Flowed(standard(len(grid), 2), flow.float()).log_prob(grid).exp()
    assert (density.sum() * (axis[1] - axis[0]) ** 2).item() == pytest.approx(1, abs=0.01)


def test_samples_follow_the_density():
    """The mean of log p over samples is that over the density's own grid."""
    flow = bent_flow(2, 3).float()
    axis = torch.linspace(-15, 15, 600)
    grid = torch.cartesian_prod(axis, axis)
    with torch.no_grad():
        log_p = Flowed(standard(len(grid), 2), flow).log_prob(grid)
        expected = (log_p.exp() * log_p).sum() * (axis[1] - axis[0]) ** 2
        p = Flowed(Normal(torch.zeros(20_000, 2), torch.zeros(20_000, 2)), flow)
        drawn = p.log_prob(p.sample(generator=torch.Generator().manual_seed(0))).mean()
    assert drawn.item() == pytest.approx(expected.item(), abs=0.03)


def test_flow_learns_what_a_gaussian_cannot():
    """A ring: the flow must beat the best Gaussian by far."""
    torch.manual_seed(0)

    def ring(n):
        angle = 2 * math.pi * torch.rand(n)
        return (1 + 0.05 * torch.randn(n, 1)) * torch.stack([angle.cos(), angle.sin()], 1)

    normal = lambda n: Normal(torch.zeros(n, 2), torch.zeros(n, 2))
    p = Flowed(normal(5000), Flow(2, 6))
    fit(Flowed(normal(256), p.flow), ring, steps=600, batch_size=256, lr=5e-3)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(2), 0.5 * torch.eye(2))
    z = ring(5000)
    assert p.log_prob(z).mean().item() > gaussian.log_prob(z).mean().item() + 0.5
    radius = p.sample().norm(dim=1)
    assert ((0.7 < radius) & (radius < 1.3)).float().mean() > 0.8


# ------------------------------------------------------------------------------------------------ in a model


@pytest.mark.parametrize("arguments, couplings", [
    ({}, 24), ({"flow": 2}, 2), ({"flow": 0}, 0), ({"inference": "bottom-up"}, 0), ({"inference": "bottom-up", "flow": 3}, 3),
    ({"inner_config": [[("res", 4)]]}, 0), ({"latent_channels": (2, 1)}, 0),
    ({"outer_config": [("dense", 6)], "inner_config": [], "latent_channels": 2}, 0)])
def test_which_models_have_a_flow(arguments, couplings):
    model = tiny(**arguments)
    flow = model.levels[-1].flow
    assert (len(flow.couplings) if flow else 0) == couplings
    assert ("flow" in model.summary()) == (couplings > 0)
    assert model.config["flow"] == couplings  # in files too, so that they outlive the default
    assert all(level.flow is None for level in model.levels[:-1])


@pytest.mark.parametrize("arguments", [{"flow": -1}, {"flow": 1.5}, {"flow": True}, {"flow": "6"}, {"flow": 10**8},
                                       {"flow": 2, "inner_config": [[("res", 4)]]}, {"flow": 2, "latent_channels": 1}])
def test_impossible_flows(arguments):
    with pytest.raises(ValueError, match="flow"):
        tiny(**arguments)


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_top_kl_is_that_to_the_flow(inference):
    model = tiny(inference=inference, flow=3).eval()
    model.levels[-1].flow = bent_flow(5, 3).float()
    x = torch.rand(4, 1, 6, 8)
    torch.manual_seed(1)
    elbo = model(x)
    torch.manual_seed(1)
    q, _, z = model.infer(x)[1][-1]
    normal = torch.distributions.Normal(q.mu, (0.5 * q.logvar).exp())
    u, log_det = model.levels[-1].flow(z)
    log_p = torch.distributions.Normal(0, 1).log_prob(u).sum(1) + log_det
    torch.testing.assert_close(elbo.kl[:, -1], -normal.entropy().sum(1) - log_p)
    torch.testing.assert_close(elbo.z_top, z)
    torch.testing.assert_close(elbo.elbo, -elbo.reconstruction - elbo.kl.sum(1))


def test_samples_come_through_the_flow(full_precision):
    model = tiny().eval()
    model.levels[-1].flow = bent_flow(5, 6).float()
    u = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    z = model.levels[-1].flow.inverse(u)
    expected = model.generate(3, None, lambda l, p, h: z if l == 1 else p.mu).image
    torch.testing.assert_close(model.sample(3, None, [0, 1], torch.Generator().manual_seed(0)), expected)


def test_flow_learns_while_the_nats_are_free():
    """Its gradient is that of log p(z_L); the posterior has none from it."""
    model = tiny()
    x, closed = torch.rand(8, 1, 6, 8), torch.tensor([1, 1, 1, 1, 0, 0, 0, 0])
    gradients = []
    for free_nats in (1e6, 0.0):
        model.zero_grad()
        torch.manual_seed(1)
        loss_terms(model, x, None, 1.0, free_nats, closed)[0].backward()
        gradients.append([p.grad.clone() for p in model.levels[-1].flow.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0])
    for free, paid in zip(*gradients):  # paid for, the KL adds the same gradient once more
        torch.testing.assert_close(2 * free, paid, atol=1e-5, rtol=1e-3)


def test_files_from_before_there_were_flows(tmp_path):
    model = tiny(flow=0).eval()
    del model.config["flow"]
    model.save(tmp_path / "model.pt")
    assert torch.equal(HVAE.load(tmp_path / "model.pt").sample(2, temperature=0), model.sample(2, temperature=0))


def test_flow_is_saved(tmp_path):
    model = tiny().eval()
    model.save(tmp_path / "model.pt")
    torch.manual_seed(9)  # another order of the numbers, were it drawn anew
    loaded = HVAE.load(tmp_path / "model.pt")
    draw = lambda m: m.sample(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(loaded), draw(model))
