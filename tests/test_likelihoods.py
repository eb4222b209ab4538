import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from likelihoods import Bernoulli, Gaussian, Logistic, from_logits, logits

stable = settings(deadline=None, max_examples=25, derandomize=True)
LEVELS = torch.arange(256) / 255
IMAGES = {"black": torch.zeros(2, 3, 4, 5), "white": torch.ones(2, 3, 4, 5),
          "random": torch.randint(256, (2, 3, 4, 5), generator=torch.Generator().manual_seed(0)) / 255}


def random_parameters(seed, b, channels, h, w, scale=1.5):
    """A map (b, channels, h, w) that keeps most of its mass within [-1, 1] for moderate scales."""
    return scale * torch.randn(b, channels, h, w, generator=torch.Generator().manual_seed(seed))


def sigmoid(t):
    return float(torch.tensor(t, dtype=torch.float64).sigmoid())


def mass(centred, scale, value):
    """A discretised logistic's probability of a value in [-1, 1] that is `centred` above its mean, from its CDF."""
    low = -math.inf if value == -1 else (centred - 1 / 255) / scale
    high = math.inf if value == 1 else (centred + 1 / 255) / scale
    if low > 0:  # the same mass from the other tail, where float64 has digits left
        low, high = -high, -low
    return sigmoid(high) - sigmoid(low)


def logistic_reference(parameters, x, mixtures, neighbours=False):
    """log p(x) per image in float64, value by value, from CDF differences."""
    b, c, h, w = x.shape
    own = Logistic.channels(c, mixtures)
    total = torch.zeros(b, dtype=torch.float64)
    for n in range(b):
        unexplained = {}  # by pixel; what is outside the image is as expected
        for i in range(h):
            for j in range(w):
                block = parameters[n, :own, i, j].double().view(mixtures, -1)
                near = 4 * (parameters[n, own:, i, j].double().view(-1, c) / 4).tanh()
                values = [2 * round(255 * float(v)) / 255 - 1 for v in x[n, :, i, j]]
                before = [unexplained.get(place, [0.0] * c) for place in [(i - 1, j - 1), (i - 1, j), (i - 1, j + 1), (i, j - 1)]]
                moved = [sum(float(a[k]) * t[k] for a, t in zip(near, before)) for k in range(c)] if neighbours else [0.0] * c
                density, left = 0.0, [0.0] * c
                for k in range(mixtures):
                    p = weight = float(block[:, 0].softmax(0)[k])
                    raw, scale, a = block[k, 1 : 1 + c], block[k, 1 + c : 1 + 2 * c], 4 * (block[k, 1 + 2 * c :] / 4).tanh()
                    mean = [2 * (sigmoid(2 * float(m)) - 1 / 64) / (1 - 1 / 32) - 1 for m in raw]
                    beyond = [value - m for value, m in zip(values, mean)]
                    shift = [0.0] if c == 1 else [0.0, a[0] * beyond[0], a[1] * beyond[0] + a[2] * beyond[1]]
                    for channel in range(c):
                        rest = float(beyond[channel] - shift[channel])
                        left[channel] += weight * rest
                        s = math.exp(min(max(float(scale[channel]), -7), 7))
                        p *= mass(rest - moved[channel], s, values[channel])
                    density += p
                unexplained[i, j] = left
                total[n] += math.log(density)
    return total


# ------------------------------------------------------------------------------------------------ logistic


@pytest.mark.parametrize("mixtures", [1, 3])
@stable
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([0.1, 1.5, 5.0, 50.0]))
def test_logistic_sums_to_one_over_a_grey_pixel(mixtures, seed, scale):
    parameters = random_parameters(seed, 1, Logistic.channels(1, mixtures), 1, 1, scale)
    log_p = Logistic(parameters.expand(256, -1, 1, 1), 1, mixtures).log_prob(LEVELS.view(256, 1, 1, 1))
    assert log_p.logsumexp(0).item() == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("mixtures", [1, 3])
@settings(deadline=None, max_examples=10, derandomize=True)
@given(seed=st.integers(0, 10**6), r=st.integers(0, 255), g=st.integers(0, 255))
def test_logistic_marginals_over_the_last_channel(mixtures, seed, r, g):
    """Summing blue out of p(r, g, b) leaves p(r, g), and summing green out of that leaves p(r): so all sums to one."""
    block = random_parameters(seed, 1, Logistic.channels(3, mixtures), 1, 1, 1.0).double().view(mixtures, 10)
    block[:, 4:7] -= 1.5  # scales; order: weight, 3 means, 3 scales, 3 coefficients (r->g, r->b, g->b)

    def log_p(columns, x):
        c = x.shape[1]
        parameters = block[:, columns].reshape(1, -1, 1, 1).expand(len(x), -1, 1, 1)
        return Logistic(parameters, c, mixtures).log_prob(x[:, :, None, None])

    fixed = torch.tensor([r, g]).double() / 255
    levels = LEVELS.double()[:, None]
    rgb = log_p(list(range(10)), torch.cat([fixed.expand(256, 2), levels], 1)).logsumexp(0)
    rg = log_p([0, 1, 2, 4, 5, 7], fixed[None])[0]
    torch.testing.assert_close(rgb, rg, atol=1e-6, rtol=1e-6)
    rg_summed = log_p([0, 1, 2, 4, 5, 7], torch.cat([fixed[:1].expand(256, 1), levels], 1)).logsumexp(0)
    torch.testing.assert_close(rg_summed, log_p([0, 1, 4], fixed[None, :1])[0], atol=1e-6, rtol=1e-6)


@stable
@given(seed=st.integers(0, 10**6), h=st.integers(1, 3), w=st.integers(1, 3))
def test_the_last_pixel_with_its_neighbours_sums_to_one(seed, h, w):
    """Summed over its values what is left is p of the pixels before it, on which its own parameters have no bearing."""
    channels = Logistic.channels(1, 2, neighbours=True)
    parameters = random_parameters(seed, 1, channels, h, w, 1.0).double()
    x = torch.randint(256, (1, 1, h, w), generator=torch.Generator().manual_seed(seed)).double() / 255
    x = x.repeat(256, 1, 1, 1)
    x[:, 0, -1, -1] = LEVELS.double()
    marginals = []
    for other in (0, 1):
        parameters[..., -1, -1] += other
        log_p = Logistic(parameters.expand(256, -1, h, w), 1, 2, neighbours=True).log_prob(x)
        marginals.append(log_p.logsumexp(0).item())
    assert marginals[0] == pytest.approx(marginals[1], abs=1e-9)
    if h == w == 1:
        assert marginals[0] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("h, w", [(1, 2), (2, 1)])
def test_two_grey_pixels_sum_to_one(h, w):
    parameters = random_parameters(7, 1, Logistic.channels(1, 2, neighbours=True), h, w).expand(256**2, -1, h, w)
    x = torch.cartesian_prod(LEVELS, LEVELS).view(-1, 1, h, w)
    log_p = Logistic(parameters, 1, 2, neighbours=True).log_prob(x)
    assert log_p.double().logsumexp(0).item() == pytest.approx(0, abs=2e-4)


@pytest.mark.parametrize("neighbours", [False, True])
@pytest.mark.parametrize("c, mixtures", [(1, 1), (1, 3), (3, 1), (3, 3)])
def test_logistic_against_a_reference(c, mixtures, neighbours):
    parameters = random_parameters(c, 3, Logistic.channels(c, mixtures, neighbours), 2, 3, 1.0)
    x = torch.randint(256, (3, c, 2, 3), generator=torch.Generator().manual_seed(1)) / 255
    x[0], x[1, :, 0] = 0, 1  # the outermost bins too
    expected = logistic_reference(parameters, x, mixtures, neighbours)
    torch.testing.assert_close(Logistic(parameters, c, mixtures, neighbours).log_prob(x).double(), expected, atol=2e-3, rtol=1e-4)
    exact = Logistic(parameters.double(), c, mixtures, neighbours).log_prob(x.double())
    torch.testing.assert_close(exact, expected, atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("extreme", [1e4, 1e6])
@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("mixtures, neighbours", [(1, False), (3, False), (2, True)])
def test_logistic_is_finite_with_finite_gradients(mixtures, neighbours, image, extreme):
    channels = Logistic.channels(3, mixtures, neighbours)
    signs = torch.randint(2, (2, channels, 4, 5), generator=torch.Generator().manual_seed(2)) * 2.0 - 1
    for parameters in (extreme * signs, torch.full_like(signs, extreme), torch.full_like(signs, -extreme), 0 * signs,
                       random_parameters(3, 2, channels, 4, 5)):
        parameters.requires_grad_()
        p = Logistic(parameters, 3, mixtures, neighbours)
        log_p = p.log_prob(IMAGES[image])
        log_p.sum().backward()
        assert log_p.shape == (2,) and log_p.isfinite().all()
        assert parameters.grad.isfinite().all()
        assert 0 <= p.image.min() and p.image.max() <= 1


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


def test_green_follows_what_red_turns_out_to_be():
    """Green is expected at its own mean, and beyond it by the coefficient, 4 at most, times red's surprise."""
    parameters = torch.zeros(1, Logistic.channels(3, 1), 1, 1)
    parameters[0, 1] = logits(torch.tensor(0.6))  # mean of red; green and blue are at 0.5
    for raw, coefficient in [(0.0, 0.0), (0.5, 4 * math.tanh(0.125)), (-1000.0, -4.0)]:
        parameters[0, 7] = raw  # red -> green
        p = Logistic(parameters, 3, 1)
        torch.testing.assert_close(p.image[0, :, 0, 0], torch.tensor([0.6, 0.5, 0.5]))
        x = torch.tensor([0.3, 0.0, 0.0]).view(1, 3, 1, 1)  # red is 0.1 more, on the scale of [-1, 1]
        torch.testing.assert_close((x - p.beyond_means(x)).flatten(), torch.tensor([0.2, 0.1 * coefficient, 0.0]))


@stable
@given(x=st.floats(0, 1))
def test_from_logits_is_the_inverse(x):
    assert from_logits(logits(torch.tensor(x, dtype=torch.float64))).item() == pytest.approx(x, abs=1e-12)


def test_logits_spread_what_is_almost_white():
    """Two shades near white differ more than two that are as far apart near grey; extremes stay finite."""
    near_white, grey = logits(torch.tensor([0.94, 0.96])).diff(), logits(torch.tensor([0.49, 0.51])).diff()
    assert near_white > 3 * grey > 0
    ends = logits(torch.tensor([-0.1, 0.0, 0.5, 1.0, 1.1]))
    assert ends.isfinite().all() and ends[2] == 0 and ends[0] == ends[1] == -ends[3] == -ends[4]


# ------------------------------------------------------------------------------------------------ gaussian, bernoulli


@stable
@given(seed=st.integers(0, 10**6), c=st.sampled_from([1, 3]))
def test_bernoulli_against_torch_distributions(seed, c):
    logits = random_parameters(seed, 2, Bernoulli.channels(c), 3, 4, 4.0).double()
    x = torch.rand(2, c, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    for x in (x, x.round()):
        expected = torch.distributions.Bernoulli(logits=logits, validate_args=False).log_prob(x).sum((1, 2, 3))
        torch.testing.assert_close(Bernoulli(logits).log_prob(x), expected)
    torch.testing.assert_close(Bernoulli(logits).image, torch.distributions.Bernoulli(logits=logits).mean)


@stable
@given(seed=st.integers(0, 10**6), c=st.sampled_from([1, 3]), log_sigma=st.floats(-4, 2))
def test_gaussian_against_torch_distributions(seed, c, log_sigma):
    """A density over images in [-1, 1]."""
    mean = random_parameters(seed, 2, Gaussian.channels(c), 3, 4).double()
    x = torch.rand(2, c, 3, 4, generator=torch.Generator().manual_seed(seed)).double()
    log_sigma = torch.tensor(log_sigma, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, log_sigma.exp()).log_prob(2 * x - 1).sum((1, 2, 3))
    torch.testing.assert_close(Gaussian(mean, log_sigma).log_prob(x), expected)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("extreme", [-1e4, 0.0, 1e4])
def test_gaussian_and_bernoulli_are_finite(image, extreme):
    for build in (Bernoulli, lambda parameters: Gaussian(parameters, torch.tensor(-3.0))):
        parameters = torch.full((2, 3, 4, 5), extreme, requires_grad=True)
        p = build(parameters)
        log_p = p.log_prob(IMAGES[image])
        log_p.sum().backward()
        assert log_p.shape == (2,) and log_p.isfinite().all() and parameters.grad.isfinite().all()
        assert 0 <= p.image.min() and p.image.max() <= 1


def test_gaussian_image_maps_back_to_0_1():
    image = Gaussian(torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5), torch.tensor(0.0)).image
    assert image.flatten().tolist() == [0, 0, 0.5, 1, 1]


def test_best_image_is_the_likeliest():
    """Every likelihood prefers its own image to that image moved by 0.1."""
    for p in (Gaussian(random_parameters(6, 2, 3, 4, 5, 0.3), torch.tensor(-1.0)),
              Logistic(random_parameters(6, 2, Logistic.channels(3, 1), 4, 5, 0.3), 3, 1)):
        assert (p.log_prob(p.image) > p.log_prob((p.image + 0.1).clamp(0, 1))).all()
