"""The distributions of latents and of images, alone; and the flow as the prior of a model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hvae.distributions import (
    Bernoulli,
    DiagonalGaussian,
    Flow,
    FlowPrior,
    Gaussian,
    Logistic,
    from_logits,
    kl_divergence,
    logits,
)
from hvae.run import Run
from model import HVAE
from trainer import Hyperparameters, training_step

stable = settings(deadline=None, max_examples=25, derandomize=True)
SEEDS = st.integers(0, 10**6)
LEVELS = torch.arange(256) / 255


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(*shape, seed=0):
    return torch.randint(256, shape, generator=seeded(seed)) / 255


IMAGES = {
    "black": torch.zeros(2, 3, 4, 5),
    "white": torch.ones(2, 3, 4, 5),
    "random": random_images(2, 3, 4, 5),
}


def random_parameters(seed, b, channels, h, w, scale=1.5):
    """A map (b, channels, h, w) whose mass is mostly within [-1, 1] for moderate scales."""
    return scale * torch.randn(b, channels, h, w, generator=seeded(seed))


# ---------------------------------------------------------------------------- latents


def standard(n, c, dtype=torch.float32):
    zeros = torch.zeros(n, c, dtype=dtype)
    return DiagonalGaussian(zeros, zeros)


@stable
@given(SEEDS, st.sampled_from([(3,), (2, 3, 4)]), st.floats(0.1, 4))
def test_gaussian_latents_against_torch_distributions(seed, shape, spread):
    numbers = torch.randn(5, 2, *shape, generator=seeded(seed), dtype=torch.float64)
    mu_q, logvar_q, mu_p, logvar_p, z = spread * numbers
    q, p = DiagonalGaussian(mu_q, logvar_q), DiagonalGaussian(mu_p, logvar_p)
    reference = lambda d: torch.distributions.Normal(d.mu, (0.5 * d.logvar).exp())
    kl = torch.distributions.kl_divergence(reference(q), reference(p)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(q, p), kl)
    torch.testing.assert_close(q.log_prob(z), reference(q).log_prob(z).flatten(1).sum(1))
    torch.testing.assert_close(q.entropy(), reference(q).entropy().flatten(1).sum(1))
    q = DiagonalGaussian(mu_q.float(), logvar_q.float())
    assert (kl_divergence(q, q) == 0).all()


def test_gaussian_samples_have_its_moments():
    q = DiagonalGaussian(torch.full((20000, 1), 2.0), torch.full((20000, 1), math.log(9.0)))
    generator = seeded()
    for temperature in (1.0, 0.5):
        z = q.sample(temperature, generator)
        assert z.mean().item() == pytest.approx(2, abs=0.1)
        assert z.std().item() == pytest.approx(3 * temperature, rel=0.03)
    assert (q.sample(0.0) == 2).all()


# ---------------------------------------------------------------------------- the flow


def bent_flow(c, couplings, seed=0):
    """A flow far from the identity, in float64."""
    torch.manual_seed(seed)
    flow = Flow(c, couplings).double()
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return flow


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
    assert (u.square().sum(1) / z.square().sum(1)).log().abs().max() < 0.5
    assert log_det.abs().max() < 5


@torch.no_grad()
def test_density_integrates_to_one_and_samples_follow_it():
    """The mean of log p over samples is that over a grid."""
    flow = bent_flow(2, 3).float()
    axis = torch.linspace(-15, 15, 600)
    points = torch.cartesian_prod(axis, axis)
    log_p = FlowPrior(standard(len(points), 2), flow).log_prob(points)
    area = (axis[1] - axis[0]) ** 2
    assert (log_p.exp().sum() * area).item() == pytest.approx(1, abs=0.01)
    p = FlowPrior(standard(20_000, 2), flow)
    drawn = p.log_prob(p.sample(generator=seeded())).mean().item()
    assert drawn == pytest.approx(((log_p.exp() * log_p).sum() * area).item(), abs=0.03)


def test_flow_learns_what_a_gaussian_cannot():
    """A ring: the flow must beat the best Gaussian by far."""
    torch.manual_seed(0)

    def ring(n):
        angle = 2 * math.pi * torch.rand(n)
        return (1 + 0.05 * torch.randn(n, 1)) * torch.stack([angle.cos(), angle.sin()], 1)

    p = FlowPrior(standard(256, 2), Flow(2, 6))
    optimizer = torch.optim.Adam(p.flow.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)
    for _ in range(600):
        optimizer.zero_grad()
        (-p.log_prob(ring(256)).mean()).backward()
        torch.nn.utils.clip_grad_norm_(p.flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    p = FlowPrior(standard(5000, 2), p.flow)
    gaussian = torch.distributions.MultivariateNormal(torch.zeros(2), 0.5 * torch.eye(2))
    z = ring(5000)
    assert p.log_prob(z).mean().item() > gaussian.log_prob(z).mean().item() + 0.5
    radius = p.sample().norm(dim=1)
    assert ((radius > 0.7) & (radius < 1.3)).float().mean() > 0.8


# ---------------------------------------------------------------------------- the flow in a model


def vector_top(**arguments):
    """A seeded model of 6x8 grey images whose z_2 is a vector of five numbers."""
    torch.manual_seed(0)
    config = dict(
        outer_config=[("conv", 4, 2)],
        inner_config=[[("dense", 6)]],
        input_size=(6, 8),
        input_channels=1,
        latent_channels=(2, 5),
        likelihood="bernoulli",
        context=None,
        prior_context=None,
        text_length=None,
    )
    return HVAE(**{**config, **arguments})


FLAT = {"outer_config": [("dense", 6)], "inner_config": [], "latent_channels": 2}
MAP_TOP = {"inner_config": [[("res", 4)]]}


@pytest.mark.parametrize(
    "arguments, couplings",
    [
        ({}, 24),
        ({"flow": 2}, 2),
        ({"flow": 0}, 0),
        ({"inference": "bottom-up"}, 0),
        ({"inference": "bottom-up", "flow": 3}, 3),
        (MAP_TOP, 0),
        ({"latent_channels": (2, 1)}, 0),
        (FLAT, 0),
        ({**FLAT, "flow": 2}, 2),
    ],
)
def test_which_models_have_a_flow(arguments, couplings):
    model = vector_top(**arguments)
    flow = model.levels[-1].flow
    assert (len(flow.couplings) if flow else 0) == couplings
    assert ("flow" in model.summary()) == (couplings > 0)
    assert model.config["flow"] == couplings  # in files too, so that they outlive the default
    assert all(level.flow is None for level in model.levels[:-1])


@pytest.mark.parametrize("flow", [-1, 1.5, True, "6", 10**8])
def test_impossible_flows(flow):
    with pytest.raises(ValueError, match="^flow: "):
        vector_top(flow=flow)


@pytest.mark.parametrize("arguments", [MAP_TOP, {"latent_channels": 1}])
def test_flows_of_something_else_than_a_vector(arguments):
    with pytest.raises(ValueError, match="^flow: 2 couplings"):
        vector_top(flow=2, **arguments)


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_top_kl_is_that_to_the_flow(inference):
    model = vector_top(inference=inference, flow=3).eval()
    flow = model.levels[-1].flow = bent_flow(5, 3).float()
    x = torch.rand(4, 1, 6, 8)
    torch.manual_seed(1)
    terms = model(x)
    torch.manual_seed(1)
    q, _, z, *_ = model.infer(x)[1][-1]
    normal = torch.distributions.Normal(q.mu, (0.5 * q.logvar).exp())
    u, log_det = flow(z)
    log_p = torch.distributions.Normal(0, 1).log_prob(u).sum(1) + log_det
    torch.testing.assert_close(terms.kl[:, -1], -normal.entropy().sum(1) - log_p)
    torch.testing.assert_close(terms.z_top, z)
    torch.testing.assert_close(terms.elbo, -terms.reconstruction - terms.kl.sum(1))


def test_samples_come_through_the_flow(full_precision):
    model = vector_top().eval()
    flow = model.levels[-1].flow = bent_flow(5, 6).float()
    generator = seeded()
    z = flow.inverse(torch.randn(3, 5, generator=generator))
    expected = model.generate(3, latents=[None, z], generator=generator).image
    torch.testing.assert_close(model.sample(3, generator=seeded()), expected)


def test_flow_learns_while_the_nats_are_free():
    """Its gradient is that of log p(z_L); the posterior has none from it."""
    model = vector_top()
    x = torch.rand(8, 1, 6, 8)
    gradients = []
    for free_nats in (1e6, 0.0):
        hp = Hyperparameters(batch_size=8, beta_start=1.0, free_nats=free_nats, top_share=0.0)
        hp.fit_to(model)
        assert hp.closed_at(0, 2).tolist() == [1, 1, 1, 1, 0, 0, 0, 0]
        step = Run(vector_top(), hp, torch.device("cpu"), bf16=False, description="", images=8)
        torch.manual_seed(1)
        training_step(step, x, torch.zeros(8, 0))
        gradients.append([p.grad for p in step.model.levels[-1].flow.parameters()])
    assert all(g.abs().max() > 0 for g in gradients[0])
    for free, paid in zip(*gradients, strict=True):  # paid for, the KL adds the same once more
        torch.testing.assert_close(2 * free, paid, atol=1e-5, rtol=1e-3)


def test_flow_is_saved(tmp_path):
    model = vector_top().eval()
    model.save(tmp_path / "model.pt")
    torch.manual_seed(9)  # another order of the numbers, were it drawn anew
    loaded = HVAE.load(tmp_path / "model.pt")
    draw = lambda m: m.sample(3, generator=seeded())
    assert torch.equal(draw(loaded), draw(model))


# ---------------------------------------------------------------------------- logistic images


def sigmoid(t):
    return float(torch.tensor(t, dtype=torch.float64).sigmoid())


def mass(centred, scale, value):
    """P of a value in [-1, 1] that is `centred` above a logistic's mean, from its CDF."""
    low = -math.inf if value == -1 else (centred - 1 / 255) / scale
    high = math.inf if value == 1 else (centred + 1 / 255) / scale
    if low > 0:  # the same mass from the other tail, where float64 has digits left
        low, high = -high, -low
    return sigmoid(high) - sigmoid(low)


def pixel_mass(block, values):
    """p of one pixel's values in [-1, 1] under a mixture; block is (mixtures, channels)."""
    c, total = len(values), 0.0
    for k, weight in enumerate(block[:, 0].softmax(0)):
        raw, scale = block[k, 1 : 1 + c], block[k, 1 + c : 1 + 2 * c]
        a = 4 * (block[k, 1 + 2 * c :] / 4).tanh()
        mean = [2 * (sigmoid(2 * float(m)) - 1 / 64) / (1 - 1 / 32) - 1 for m in raw]
        rest = [value - m for value, m in zip(values, mean, strict=True)]
        shift = [0.0] if c == 1 else [0.0, a[0] * rest[0], a[1] * rest[0] + a[2] * rest[1]]
        p = float(weight)
        for channel in range(c):
            s = math.exp(min(max(float(scale[channel]), -7), 7))
            p *= mass(float(rest[channel] - shift[channel]), s, values[channel])
        total += p
    return total


def logistic_reference(parameters, x, mixtures):
    """log p(x) per image in float64, value by value, from CDF differences."""
    b, _, h, w = x.shape
    total = torch.zeros(b, dtype=torch.float64)
    for n in range(b):
        for i in range(h):
            for j in range(w):
                block = parameters[n, :, i, j].double().view(mixtures, -1)
                values = [2 * round(255 * float(v)) / 255 - 1 for v in x[n, :, i, j]]
                total[n] += math.log(pixel_mass(block, values))
    return total


@pytest.mark.parametrize("mixtures", [1, 3])
@stable
@given(seed=SEEDS, scale=st.sampled_from([0.1, 1.5, 5.0, 50.0]))
def test_logistic_sums_to_one_over_a_grey_pixel(mixtures, seed, scale):
    parameters = random_parameters(seed, 1, Logistic.channels(1, mixtures), 1, 1, scale)
    p = Logistic(parameters.expand(256, -1, 1, 1), 1, mixtures)
    log_p = p.log_prob(LEVELS.view(256, 1, 1, 1))
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("mixtures", [1, 3])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=SEEDS, r=st.integers(0, 255), g=st.integers(0, 255))
def test_logistic_marginals_over_the_last_channel(mixtures, seed, r, g):
    """Blue summed out of p(r, g, b) leaves p(r, g), and green out of that p(r): all sums to 1."""
    channels = Logistic.channels(3, mixtures)
    block = random_parameters(seed, 1, channels, 1, 1, 1.0).double().view(mixtures, 10)
    block[:, 4:7] -= 1.5  # order: weight, 3 means, 3 scales, 3 coefficients (r->g, r->b, g->b)

    def log_p(columns, x):
        c = x.shape[1]
        parameters = block[:, columns].reshape(1, -1, 1, 1).expand(len(x), -1, 1, 1)
        return Logistic(parameters, c, mixtures).log_prob(x[:, :, None, None])

    fixed = torch.tensor([r, g]).double() / 255
    levels = LEVELS.double()[:, None]
    of_rg, of_r = [0, 1, 2, 4, 5, 7], [0, 1, 4]
    rgb = log_p(list(range(10)), torch.cat([fixed.expand(256, 2), levels], 1)).logsumexp(0)
    torch.testing.assert_close(rgb, log_p(of_rg, fixed[None])[0], atol=1e-6, rtol=1e-6)
    rg = log_p(of_rg, torch.cat([fixed[:1].expand(256, 1), levels], 1)).logsumexp(0)
    torch.testing.assert_close(rg, log_p(of_r, fixed[None, :1])[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("c, mixtures", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_logistic_against_a_reference(c, mixtures):
    parameters = random_parameters(c, 3, Logistic.channels(c, mixtures), 2, 3, 1.0)
    x = random_images(3, c, 2, 3, seed=1)
    x[0], x[1, :, 0] = 0, 1  # the outermost bins too
    expected = logistic_reference(parameters, x, mixtures)
    log_p = Logistic(parameters, c, mixtures).log_prob(x).double()
    torch.testing.assert_close(log_p, expected, atol=2e-3, rtol=1e-4)
    exact = Logistic(parameters.double(), c, mixtures).log_prob(x.double())
    torch.testing.assert_close(exact, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("extreme", [1e4, 1e6])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("mixtures", [1, 3])
def test_logistic_is_finite_with_finite_gradients(mixtures, image, extreme):
    channels = Logistic.channels(3, mixtures)
    signs = torch.randint(2, (2, channels, 4, 5), generator=seeded(2)) * 2.0 - 1
    ones = torch.ones_like(signs)
    maps = [extreme * signs, extreme * ones, -extreme * ones, 0 * ones]
    for parameters in (*maps, random_parameters(3, 2, channels, 4, 5)):
        parameters.requires_grad_()
        p = Logistic(parameters, 3, mixtures)
        log_p = p.log_prob(IMAGES[image])
        log_p.sum().backward()
        assert log_p.shape == (2,) and log_p.isfinite().all()
        assert parameters.grad.isfinite().all()
        assert p.image.min() >= 0 and p.image.max() <= 1


def test_logistic_log_prob_is_never_positive():
    """It is the probability of an 8-bit image, not a density."""
    for scale in (0.1, 1.0, 10.0, 100.0):
        p = Logistic(random_parameters(4, 2, Logistic.channels(3, 3), 4, 5, scale), 3, 3)
        assert (p.log_prob(IMAGES["random"]) <= 1e-4).all()


def test_logistic_reads_values_as_8_bit():
    """Images within rounding of their 8-bit values are the same images."""
    p = Logistic(random_parameters(5, 2, Logistic.channels(3, 1), 4, 5), 3, 1)
    x = IMAGES["random"]
    assert torch.equal(p.log_prob(x), p.log_prob((x + 0.001).clamp(0, 1)))


@pytest.mark.parametrize(
    "raw, coefficient", [(0.0, 0.0), (0.5, 4 * math.tanh(0.125)), (-1000.0, -4.0)]
)
def test_green_follows_what_red_turns_out_to_be(raw, coefficient):
    """Green is expected beyond its own mean by the coefficient, 4 at most, times red's surprise."""
    parameters = torch.zeros(1, Logistic.channels(3, 1), 1, 1)
    parameters[0, 1] = logits(torch.tensor(0.6))  # mean of red; green and blue are at 0.5
    parameters[0, 7] = raw  # red -> green
    p = Logistic(parameters, 3, 1)
    torch.testing.assert_close(p.image[0, :, 0, 0], torch.tensor([0.6, 0.5, 0.5]))
    x = torch.tensor([0.3, 0.0, 0.0]).view(1, 3, 1, 1)  # in [-1, 1]: red is 0.1 above its mean
    expected = (x - p.residuals(x)[:, 0]).flatten()
    torch.testing.assert_close(expected, torch.tensor([0.2, 0.1 * coefficient, 0.0]))


@stable
@given(x=st.floats(0, 1))
def test_from_logits_is_the_inverse(x):
    there_and_back = from_logits(logits(torch.tensor(x, dtype=torch.float64)))
    assert there_and_back.item() == pytest.approx(x, abs=1e-12)


def test_logits_spread_what_is_almost_white():
    """Two shades near white differ more than two as far apart near grey; the ends stay finite."""
    near_white = logits(torch.tensor([0.94, 0.96])).diff()
    grey = logits(torch.tensor([0.49, 0.51])).diff()
    assert near_white > 3 * grey > 0
    ends = logits(torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]))
    assert ends.isfinite().all() and ends[2] == 0
    assert ends[0] == ends[1] == -ends[3] == -ends[4]


# ---------------------------------------------------------------------------- other images


@stable
@given(seed=SEEDS, c=st.sampled_from([1, 3]))
def test_bernoulli_against_torch_distributions(seed, c):
    parameters = random_parameters(seed, 2, c, 3, 4, 4.0).double()
    reference = torch.distributions.Bernoulli(logits=parameters, validate_args=False)
    x = torch.rand(2, c, 3, 4, generator=seeded(seed)).double()
    for images in (x, x.round()):
        expected = reference.log_prob(images).sum((1, 2, 3))
        torch.testing.assert_close(Bernoulli(parameters).log_prob(images), expected)
    torch.testing.assert_close(Bernoulli(parameters).image, reference.mean)


@stable
@given(seed=SEEDS, c=st.sampled_from([1, 3]), log_sigma=st.floats(-4, 2))
def test_gaussian_images_against_torch_distributions(seed, c, log_sigma):
    """A density over images in [-1, 1]."""
    mean = random_parameters(seed, 2, c, 3, 4).double()
    x = torch.rand(2, c, 3, 4, generator=seeded(seed)).double()
    log_sigma = torch.tensor(log_sigma, dtype=torch.float64)
    reference = torch.distributions.Normal(mean, log_sigma.exp())
    expected = reference.log_prob(2 * x - 1).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(mean, log_sigma).log_prob(x), expected)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("extreme", [-1e4, 0.0, 1e4])
def test_gaussian_and_bernoulli_are_finite(image, extreme):
    for build in (Bernoulli, lambda parameters: Gaussian(parameters, torch.tensor(-3.0))):
        parameters = torch.full((2, 3, 4, 5), extreme, requires_grad=True)
        p = build(parameters)
        log_p = p.log_prob(IMAGES[image])
        log_p.sum().backward()
        assert log_p.shape == (2,) and log_p.isfinite().all()
        assert parameters.grad.isfinite().all()
        assert p.image.min() >= 0 and p.image.max() <= 1


def test_gaussian_image_maps_back_to_0_1():
    mean = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    assert Gaussian(mean, torch.tensor(0.0)).image.flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_best_image_is_the_likeliest():
    """Every likelihood prefers its own image to that image moved by 0.1."""
    for p in (
        Gaussian(random_parameters(6, 2, 3, 4, 5, 0.3), torch.tensor(-1.0)),
        Logistic(random_parameters(6, 2, Logistic.channels(3, 1), 4, 5, 0.3), 3, 1),
    ):
        assert (p.log_prob(p.image) > p.log_prob((p.image + 0.1).clamp(0, 1))).all()
