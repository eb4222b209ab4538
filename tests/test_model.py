import math
import os
import pickle
import platform
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from model import (DIGITS, HVAE, INNER_CONFIG, LATENT_CHANNELS, OUTER_CONFIG, UPPERCASE, Normal, checksum, kl_divergence,
                   quantiles)

MODES = ["top-down", "bottom-up"]
U_NET = [("conv-bn", 4), ("skip-up", 0), ("pool", 2), ("conv", 5), ("upsample", 2), ("skip-down", 0), ("conv", 3)]
LEVELS = {  # inner configs by number of levels
    1: [],
    2: [[("conv", 4, 2), ("res", 4)]],
    3: [[("res", 4)], [("pool", 2), ("conv", 6)]],
    5: [U_NET, [("conv-bn", 4, 2)], [("res", 4)], [("dense", 6)]],
}
CASES = [  # inference, levels, input_size, channels, likelihood, mixtures, text_length
    ("top-down", 1, (31, 77), 1, "bernoulli", 1, None),
    ("top-down", 2, (31, 77), 3, "gaussian", 1, 2),
    ("top-down", 3, (17, 30), 3, "logistic", 3, None),
    ("top-down", 5, (31, 77), 3, "logistic", 1, 3),
    ("bottom-up", 1, (31, 77), 3, "logistic", 1, 2),
    ("bottom-up", 2, (17, 30), 1, "logistic", 2, None),
    ("bottom-up", 3, (31, 77), 3, "gaussian", 1, 2),
    ("bottom-up", 5, (31, 77), 1, "bernoulli", 1, 3),
    ("bottom-up", 5, (24, 16), 3, "gaussian", 1, None),
]


def tiny(inference="top-down", **arguments):
    """A seeded two-level model of 6x8 grey images; `arguments` replace any of HVAE's."""
    torch.manual_seed(0)
    config = dict(outer_config=[("conv", 4, 2)], inner_config=[[("res", 4)]], input_size=(6, 8), input_channels=1,
                  latent_channels=2, likelihood="bernoulli", text_length=None)
    return HVAE(**{**config, "inference": inference, **arguments})


def case_model(inference, levels, input_size, channels, likelihood, mixtures, text_length):
    return tiny(inference, outer_config=[("conv", 3), ("pool", 2), ("conv-bn", 4, 2)], inner_config=LEVELS[levels],
                input_size=input_size, input_channels=channels, latent_channels=list(range(1, levels + 1)),
                likelihood=likelihood, mixtures=mixtures, sigma=None, text_length=text_length, charset="ABCDE")


def batch(model, n=3, seed=0):
    """Random 8-bit images and, if the model is conditional, texts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, *model.input_shape), generator=generator) / 255
    return x, model.draw_text(n, generator=generator)


def one_image(model, n):
    return torch.rand(1, *model.input_shape, generator=torch.Generator().manual_seed(1)).expand(n, -1, -1, -1)


def lively(model, factor=3.0):
    """Larger weights, so that every latent matters as it does in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return model


# ------------------------------------------------------------------------------------------------ ELBO


@pytest.mark.parametrize("case", CASES)
def test_elbo_terms(case):
    model, levels = case_model(*case), case[1]
    x, y = batch(model)
    terms = model(x, y)
    assert terms.reconstruction.shape == terms.elbo.shape == terms.log_weight.shape == (3,)
    assert terms.kl.shape == (3, levels)
    assert torch.equal(terms.elbo, -(terms.reconstruction + terms.kl.sum(1)))
    assert (terms.kl >= 0).all()
    assert all(term.isfinite().all() and term.dtype == torch.float32 for term in terms)


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_learns(case):
    model = case_model(*case)
    model(*batch(model)).elbo.mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("case", CASES)
def test_uses(case):
    """encode, decode, reconstruct and sample: shapes and ranges."""
    model = case_model(*case).eval()
    x, y = batch(model)
    latents = model.encode(x, y)
    assert [z.shape for z in latents] == [(3, *level.shape) for level in model.levels]
    assert [z.shape[1] for z in latents] == list(range(1, case[1] + 1))
    if case[1] == 5:
        assert latents[-1].dim() == 2  # a vector after 'dense'
    p_x = model.decode(latents, y)
    assert p_x.log_prob(x).shape == (3,)
    for image in (p_x.image, model.reconstruct(x, y), model.sample(3)):
        assert image.shape == x.shape and 0 <= image.min() and image.max() <= 1


def test_default_text_is_drawn_and_gradients_are_off():
    model = tiny(text_length=2).eval()
    x, y = batch(model)
    assert not model.sample(2).requires_grad and not model.reconstruct(x, y).requires_grad
    assert not any(z.requires_grad for z in model.encode(x, y))


@settings(deadline=None, max_examples=25, derandomize=True)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(3,), (2, 3, 4)]), spread=st.floats(0.1, 4))
def test_kl_and_log_prob_against_torch_distributions(seed, shape, spread):
    generator = torch.Generator().manual_seed(seed)
    mu_q, logvar_q, mu_p, logvar_p, z = spread * torch.randn(5, 2, *shape, generator=generator, dtype=torch.float64)
    q, p = Normal(mu_q, logvar_q), Normal(mu_p, logvar_p)
    reference = lambda normal: torch.distributions.Normal(normal.mu, (0.5 * normal.logvar).exp())
    expected = torch.distributions.kl_divergence(reference(q), reference(p)).flatten(1).sum(1)
    torch.testing.assert_close(kl_divergence(q, p), expected)
    torch.testing.assert_close(q.log_prob(z), reference(q).log_prob(z).flatten(1).sum(1))
    assert (kl_divergence(Normal(mu_q.float(), logvar_q.float()), Normal(mu_q.float(), logvar_q.float())) == 0).all()


def test_normal_samples_have_its_moments():
    q = Normal(torch.full((20000, 1), 2.0), torch.full((20000, 1), math.log(9.0)))
    generator = torch.Generator().manual_seed(0)
    for temperature in (1.0, 0.5):
        z = q.sample(temperature, generator)
        assert z.mean().item() == pytest.approx(2, abs=0.1)
        assert z.std().item() == pytest.approx(3 * temperature, rel=0.03)
    assert (q.sample(0.0) == 2).all()


def within_four_standard_errors(difference):
    return abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))


@pytest.mark.parametrize("inference, inner", [("top-down", LEVELS[n]) for n in (1, 2, 3)] + [("bottom-up", [])])
@torch.no_grad()
def test_mean_log_weight_is_the_elbo(inference, inner):
    """The closed-form KLs are the expectations of log q - log p, level by level and together."""
    model = lively(tiny(inference, inner_config=inner))
    _, draws = model.infer(one_image(model, 4000))
    for q, p, z in draws:
        assert within_four_standard_errors(q.log_prob(z) - p.log_prob(z) - kl_divergence(q, p))
    terms = model(one_image(model, 4000))
    assert within_four_standard_errors(terms.log_weight - terms.elbo)


@pytest.mark.parametrize("inference", MODES)
@torch.no_grad()
def test_draws_of_an_image_are_as_if_it_came_several_times(inference):
    model = lively(tiny(inference, inner_config=LEVELS[3])).eval()
    x, y = batch(model)
    torch.manual_seed(0)
    together = model(x, y, draws=3)
    torch.manual_seed(0)
    apart = model(x.repeat_interleave(3, 0), None if y is None else y.repeat_interleave(3, 0))
    assert together.elbo.shape == (3 * len(x),) and together.elbo[0] != together.elbo[1]
    for one, other in zip(together, apart):
        torch.testing.assert_close(one, other)


class Given(nn.Module):
    """A head whose mean is its input (times `factor`), whatever its weights."""

    def __init__(self, factor, logvar):
        super().__init__()
        self.factor, self.logvar = factor, logvar

    def forward(self, h):
        return Normal(self.factor * h, torch.full_like(h, self.logvar))


def coupled_chain():
    """Bottom-up with z_1 ~ N(0, 1), z_2 ~ N(z_1, e^-4) and p(z_1|z_2) = N(z_2, e^-2): z_1 and z_2 are all but equal."""
    model = tiny("bottom-up", outer_config=[("dense", 2)], inner_config=[[("dense", 2)]])
    model.stems[0] = model.inference[1] = model.generation[1] = nn.Identity()
    model.levels[0].q, model.levels[1].q, model.levels[0].p = Given(0.0, 0.0), Given(1.0, -4.0), Given(1.0, -2.0)
    model.levels[1].merge = lambda h, z: z
    return model


@torch.no_grad()
def test_bottom_up_mean_log_weight_is_the_elbo():
    """z_2 is drawn from q(z_2|z_1): the consistency term may not treat z_1 and z_2 as independent given x."""
    model = coupled_chain()
    terms = model(one_image(model, 4000))
    assert within_four_standard_errors(terms.log_weight - terms.elbo)


@pytest.mark.parametrize("model", [lively(tiny("top-down")), lively(tiny("bottom-up")), coupled_chain(),
                                   lively(tiny("bottom-up", inner_config=LEVELS[3]))])
@torch.no_grad()
def test_elbo_is_below_the_importance_weighted_bound(model):
    terms = model(one_image(model, 4000))
    assert terms.elbo.mean() <= terms.log_weight.logsumexp(0) - math.log(4000)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("inference", MODES)
def test_a_few_steps_lower_the_loss(inference, likelihood):
    model = tiny(inference, likelihood=likelihood, text_length=2, charset="AB")
    x, y = batch(model, 8)
    x = x.round()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        losses.append(-model(x, y).elbo.mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
@pytest.mark.parametrize("inference", MODES)
def test_bfloat16_autocast_stays_close(inference, likelihood):
    model = tiny(inference, likelihood=likelihood, text_length=2)
    x, y = batch(model, 8)
    terms = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms.append(model(x, y))
    for full, half in zip(*terms):
        assert half.dtype == torch.float32 and half.isfinite().all()
        torch.testing.assert_close(half, full, rtol=0.03, atol=0.5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
def test_set_output_level_starts_at_the_images_mean(likelihood):
    model = tiny(likelihood=likelihood, input_channels=3, mixtures=2 if likelihood == "logistic" else 1).eval()
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(4, 3, 6, 8)
    before = model(x).elbo.mean()
    model.set_output_level(x)
    model.to_image.weight.data.zero_()
    torch.testing.assert_close(model.sample(4), x, atol=1e-5, rtol=0)
    assert model(x).elbo.mean() > before


@pytest.mark.parametrize("inference", MODES)
def test_neighbours_make_images_likelier_and_leave_the_mean_image(inference):
    """Their coefficients have gradients, and the mean image that is drawn has nothing to do with them."""
    model = tiny(inference, likelihood="logistic", input_channels=3, mixtures=2, neighbours=True)
    x, _ = batch(model)
    model(x).elbo.mean().backward()
    gradients = model.to_image.weight.grad[:, -12:]
    assert gradients.flatten(2).abs().sum(2).all()
    before = model.sample(2, generator=torch.Generator().manual_seed(0))
    model.to_image.weight.data[:, -12:] += 1
    assert torch.equal(model.sample(2, generator=torch.Generator().manual_seed(0)), before)


def test_mixtures_start_apart():
    """Each component of the logistic at another of the images' values, so that they need not part by chance."""
    paper, ink = torch.tensor([0.9, 1.0, 0.8]), torch.tensor([0.2, 0.1, 0.6])
    x = torch.where(torch.arange(8) < 3, ink[:, None], paper[:, None]).view(1, 3, 1, 8).expand(2, 3, 6, 8)
    torch.testing.assert_close(quantiles(x, 2), torch.stack([ink.minimum(paper), ink.maximum(paper)]))
    model = tiny(likelihood="logistic", input_channels=3, mixtures=2)
    model.set_output_level(x)
    model.to_image.weight.data.zero_()
    means = model.decode([torch.zeros(1, *level.shape) for level in model.levels]).mean
    torch.testing.assert_close((means[0, :, :, 0, 0] + 1) / 2, quantiles(x, 2))


# ------------------------------------------------------------------------------------------------ structure


@pytest.mark.parametrize("inference", MODES)
def test_size_keeping_blocks_are_built_identically_and_others_mirrored(inference):
    inner = [U_NET, [("res", 3), ("convt", 5)], [("pool", 2), ("conv", 6)], [("dense", 3)]]
    model = tiny(inference, inner_config=inner,
                 outer_config=[("conv", 4)])
    shapes = lambda block: [(type(m), [tuple(p.shape) for p in m.parameters()]) for m in block.modules()]
    for l in (1, 2):
        assert shapes(model.inference[l]) == shapes(model.generation[l])
        assert all(a is not b for a, b in zip(model.inference[l].parameters(), model.generation[l].parameters()))
    assert [layer.kind for layer in model.generation[3].plan] == ["convt", "upsample"]
    assert [layer.kind for layer in model.generation[4].plan] == ["undense"]
    assert (model.generation[3].plan[0].c_in, model.generation[3].plan[0].c_out) == (6, 5)


@torch.no_grad()
def test_bottom_up_is_markov():
    """q(z_2|.) depends on x through z_1 alone: with z_1 held fixed, another x changes nothing."""
    model = tiny("bottom-up")
    z_1 = torch.randn(2, *model.levels[0].shape)
    free = [model.climb(batch(model, 2, seed)[0])[1][1] for seed in (0, 1)]
    model.stems[0].register_forward_pre_hook(lambda module, arguments: (z_1,))
    held = [model.climb(batch(model, 2, seed)[0])[1][1] for seed in (0, 1)]
    assert not torch.equal(free[0].mu, free[1].mu)
    assert torch.equal(held[0].mu, held[1].mu) and torch.equal(held[0].logvar, held[1].logvar)


def test_bottom_up_gradient_reaches_x_through_z_1_alone():
    model = tiny("bottom-up")
    x = batch(model)[0].requires_grad_()
    _, qs = model.climb(x)
    assert torch.autograd.grad(qs[1].mu.sum(), x)[0].abs().max() > 0
    model.stems[0].register_forward_pre_hook(lambda module, arguments: (arguments[0].detach(),))
    zs, qs = model.climb(x)
    assert torch.autograd.grad(qs[1].log_prob(zs[1].detach()).sum(), x, allow_unused=True)[0] is None


@torch.no_grad()
def test_top_down_posterior_of_z_1_sees_z_2():
    model = tiny("top-down")
    x, _ = batch(model)
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append(model.infer(x)[1])
    (q_1, _, _), (q_2, _, _) = draws[0]
    assert not torch.equal(q_1.mu, draws[1][0][0].mu) and torch.equal(q_2.mu, draws[1][1][0].mu)


@pytest.mark.parametrize("inference", MODES)
@torch.no_grad()
def test_features_pass_the_latents_in_top_down_only(inference):
    """With z_1 fixed, z_2 and z_3 still change a top-down image; the chain's p(x|z_1) knows z_1 alone."""
    model = tiny(inference, inner_config=LEVELS[3]).eval()
    latents = [torch.randn(2, *level.shape) for level in model.levels]
    image = model.decode(latents).parameters
    for l in (1, 2):
        other = list(latents)
        other[l] = latents[l] + 1
        assert torch.equal(model.decode(other).parameters, image) == (inference == "bottom-up")
    assert not torch.equal(model.decode([latents[0] + 1, *latents[1:]]).parameters, image)


def test_the_vae_of_the_assignment():
    """A classic VAE on 28x28 digits: no inner level, one vector latent of two values."""
    model = HVAE([("conv", 32), ("conv", 32), ("conv", 64, 2), ("dense", 128)], [], (28, 28), 1, 2,
                 likelihood="bernoulli", text_length=None)
    assert [str(layer) for layer in model.generation[0].plan] == [
        "undense: 128 -> 64x14x14", "convt, 2: 64x14x14 -> 32x28x28", "convt: 32x28x28 -> 32x28x28"]
    assert isinstance(model.to_image, nn.ConvTranspose2d)
    assert (model.to_image.in_channels, model.to_image.out_channels, model.to_image.stride) == (32, 1, (1, 1))
    assert model.encode(torch.rand(2, 1, 28, 28))[0].shape == (2, 2)
    assert model.sample(2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("stacked", [1, 3])
@pytest.mark.parametrize("inference", MODES)
def test_u_nets_on_50x250_colour_images(inference, stacked):
    outer = [("conv-bn", 32), ("pool", 2), ("conv-bn", 64), ("pool", 2), ("conv-bn", 64)]
    inner = [("conv-bn", 32), ("skip-up", 0), ("pool", 2), ("conv-bn", 64), ("skip-up", 1), ("pool", 2),
             ("conv-bn", 64),
             ("conv-bn", 64), ("upsample", 2), ("skip-down", 1), ("conv-bn", 32), ("upsample", 2), ("skip-down", 0),
             ("conv-bn", 1)]
    model = tiny(inference, outer_config=outer, inner_config=[inner] * stacked, input_size=(50, 250), input_channels=3,
                 likelihood="gaussian")
    assert [level.shape for level in model.levels] == [(2, 12, 62)] * (1 + stacked)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = -model(batch(model, 2)[0]).elbo.mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
    assert model.eval().sample(1).shape == (1, 3, 50, 250)


@pytest.mark.parametrize("outer", [[("pool", 2)], [("res", 3)], [("dense", 5)], [("conv", 3)], [("conv-bn", 3, 2)]])
@pytest.mark.parametrize("inference", MODES)
def test_one_layer_outer_blocks(inference, outer):
    model = tiny(inference, outer_config=outer, inner_config=[], input_size=(7, 5), likelihood="gaussian")
    model(batch(model)[0]).elbo.mean().backward()
    assert model.sample(2).shape == (2, 1, 7, 5)


@pytest.fixture(scope="module")
def default():
    return HVAE()


def test_default_is_the_shipped_configuration(default):
    assert default.config["outer_config"] == OUTER_CONFIG and default.config["inner_config"] == INNER_CONFIG
    assert default.config["latent_channels"] == list(LATENT_CHANNELS)
    assert default.input_shape == (3, 60, 160)
    assert (default.text_length, default.charset) == (4, DIGITS + UPPERCASE)
    assert default.config["inference"] == "top-down"
    assert default.eval().sample(1, "7KQ2").shape == (1, 3, 60, 160)


def test_summary_names_every_level(default):
    for model in (default, tiny("bottom-up", inner_config=LEVELS[5], latent_channels=[1, 2, 3, 4, 5])):
        lines = model.summary().splitlines()
        parameters = sum(p.numel() for p in model.parameters())
        assert f"{len(model.levels)} levels" in lines[0] and f"{parameters:,} parameters" in lines[0]
        rows = {line.split()[0]: line.split()[1] for line in lines[2:]}
        assert rows == {f"z_{l + 1}": "x".join(map(str, level.shape)) for l, level in enumerate(model.levels)}


# ------------------------------------------------------------------------------------------------ text, sampling


@pytest.mark.parametrize("inner", [LEVELS[2], [[("dense", 5)]]])
@pytest.mark.parametrize("inference", MODES)
def test_text_changes_samples_and_elbo(inference, inner):
    model = tiny(inference, inner_config=inner, text_length=2, charset="ABC").eval()
    draw = lambda text: model.sample(2, text, generator=torch.Generator().manual_seed(0))
    images = [draw(text) for text in ("AB", "AC", "BA", "BB")]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    x, y = batch(model, 2)
    elbos = []
    for shift in (0, 1):
        torch.manual_seed(0)
        elbos.append(model(x, (y + shift) % 3).elbo)
    assert not torch.equal(*elbos)


@pytest.mark.parametrize("inference", MODES)
@pytest.mark.parametrize("wrong", [
    None, torch.zeros(2, 2).long(), torch.zeros(3, 3).long(), torch.zeros(3).long(), torch.zeros(3, 2),
    torch.zeros(3, 2).int(), torch.full((3, 2), 3), torch.full((3, 2), -1)])
def test_wrong_y_is_refused(inference, wrong):
    model = tiny(inference, text_length=2, charset="ABC")
    x, y = batch(model)
    latents = model.encode(x, y)
    for use in (lambda: model(x, wrong), lambda: model.encode(x, wrong), lambda: model.reconstruct(x, wrong),
                lambda: model.decode(latents, wrong)):
        with pytest.raises(ValueError, match=r"\by\b"):
            use()


def test_unconditional_model_refuses_a_text():
    model = tiny()
    with pytest.raises(ValueError, match="unconditional"):
        model(batch(model)[0], torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match="unconditional"):
        model.sample(1, "AB")


@pytest.mark.parametrize("n, text", [(1, "A"), (1, "ABC"), (1, "A?"), (1, "ab"), (1, ""),
                                     (2, ["AB"]), (1, ["AB", "AB"]), (1, [""]),
                                     (2, ["AB", "A"]), (1, 12), (1, [12]), (1, [None]), (1, torch.tensor([[0, 1]]))])
def test_sample_refuses_texts_that_do_not_fit(n, text):
    with pytest.raises(ValueError, match="text"):
        tiny(text_length=2, charset="ABC").sample(n, text)


@pytest.mark.parametrize("n", [-1, 1.0, "1", None, True])
def test_sample_refuses_a_wrong_n(n):
    with pytest.raises(ValueError, match="n must be"):
        tiny().sample(n)


@pytest.mark.parametrize("temperature", [-0.1, math.nan, math.inf, -math.inf, "1", None, [], [1, 1, 1], [1, -1], [1, None]])
def test_sample_refuses_a_wrong_temperature(temperature):
    with pytest.raises(ValueError, match="temperature"):
        tiny().sample(1, temperature=temperature)


@pytest.mark.parametrize("arguments", [{}, {"text_length": 2}])
def test_sample_of_no_images(arguments):
    model = tiny(**arguments)
    assert model.sample(0).shape == (0, 1, 6, 8)


def test_sample_of_no_images_with_a_text():
    model = tiny(text_length=2)
    assert model.sample(0, "AB").shape == (0, 1, 6, 8)
    assert model.sample(0, []).shape == (0, 1, 6, 8)


@pytest.mark.parametrize("inference", MODES)
def test_sample_is_repeatable(inference):
    model = tiny(inference, text_length=2).eval()
    draw = lambda seed: model.sample(3, generator=torch.Generator().manual_seed(seed))
    first = draw(0)
    torch.manual_seed(123)  # the global state plays no part
    assert torch.equal(draw(0), first)
    assert not torch.equal(draw(1), first)


@pytest.mark.parametrize("inference", MODES)
def test_an_image_does_not_depend_on_the_rest_of_its_batch(inference):
    model = tiny(inference, outer_config=[("conv-bn", 4, 2)], inner_config=[U_NET], text_length=2, charset="ABC").eval()
    a, b = (model.sample(2, ["AB", other], generator=torch.Generator().manual_seed(0)) for other in ("CC", "BA"))
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1])
    x, y = batch(model, 2)
    terms = []
    for images in (x, torch.stack([x[0], 1 - x[1]])):
        torch.manual_seed(0)
        terms.append(model(images, y))
    torch.testing.assert_close(terms[0].elbo[0], terms[1].elbo[0])


@pytest.mark.parametrize("inference", MODES)
def test_temperature_0_is_deterministic_given_the_text(inference):
    model = tiny(inference, text_length=2).eval()
    cold = model.sample(2, "AB", temperature=0)
    assert torch.equal(cold, model.sample(2, "AB", temperature=0))
    torch.testing.assert_close(cold[0], cold[1])
    draw = lambda t: model.sample(200, "AB", temperature=t, generator=torch.Generator().manual_seed(0))
    spread = [draw(t).std(0).mean() for t in (0.3, 1)]
    assert 0 < spread[0] < spread[1]


def test_samples_in_bfloat16_stay_close(monkeypatch):
    model = tiny().eval()
    draw = lambda: model.sample(4, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("model.has_bf16", lambda device: True)
    half = draw()
    monkeypatch.setattr("model.has_bf16", lambda device: False)
    assert half.dtype == torch.float32 and not torch.equal(half, draw())
    torch.testing.assert_close(half, draw(), atol=0.01, rtol=0)


@pytest.mark.parametrize("inference", MODES)
def test_temperature_per_level(inference, full_precision):
    """The second number is z_2's: with 0 for either level the spread is that of the other."""
    model = tiny(inference).eval()
    draw = lambda T: model.sample(6, temperature=T, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw([0.5, 0.5]), draw(0.5)) and torch.equal(draw((0.5,)), draw(0.5))
    torch.manual_seed(0)
    p_2 = model.levels[1].prior(torch.zeros(6, 1, 1, 1))
    z_2 = p_2.sample(1.0, torch.Generator().manual_seed(0))
    by_hand = model.generate(6, None, lambda l, p, h: z_2 if l == 1 else p.mu).image
    torch.testing.assert_close(draw([0, 1]), by_hand)
    assert not torch.allclose(draw([0, 1]), draw([1, 0]), atol=1e-3)


def test_draw_text():
    model = tiny(text_length=3, charset="XYZ")
    assert model.draw_text(2, "XZY").tolist() == [[0, 2, 1], [0, 2, 1]]
    assert model.draw_text(2, ["XXX", "ZZZ"]).tolist() == [[0, 0, 0], [2, 2, 2]]
    counts = model.draw_text(1000, generator=torch.Generator().manual_seed(0)).flatten().bincount(minlength=3)
    assert counts.sum() == 3000 and (counts > 850).all()
    assert tiny().draw_text(2) is None


# ------------------------------------------------------------------------------------------------ arguments


BAD_ARGUMENTS = {
    "input_size": [28, (28,), (0, 28), (28.0, 28), (28, 28, 3), (10**6, 10**6), None],
    "input_channels": [0, -1, 1.0, True, None],
    "latent_channels": [0, (1, 2, 3), (1,), (1, 0), (1, 2.0), "22", True, 2.0, None],
    "inference": ["ladder", None],
    "likelihood": ["laplace", None],
    "sigma": [0, -0.1, math.nan, math.inf, 10**400, "0.2"],
    "mixtures": [0, 1.5, None],
    "neighbours": [1, None, "yes", True],  # True is for the logistic alone
    "text_length": [0, -4, 4.0, True],
    "charset": ["", "AAB", None, 36],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values])
def test_bad_arguments_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name}: "):
        tiny(**{"text_length": 2, name: value})


@pytest.mark.parametrize("inference", MODES)
@pytest.mark.parametrize("shape", [(1, 1, 6, 9), (1, 1, 8, 6), (1, 3, 6, 8), (1, 6, 8), (6, 8), (1, 1, 1, 6, 8)])
def test_wrong_images_are_refused(inference, shape):
    model = tiny(inference)
    for use in (model, model.encode, model.reconstruct):
        with pytest.raises(ValueError, match="expected images"):
            use(torch.zeros(shape))


@pytest.mark.parametrize("inference", MODES)
def test_wrong_latents_are_refused(inference):
    model = tiny(inference)
    z_1, z_2 = model.encode(batch(model)[0])
    for latents, named in [([z_1], "expected 2 latents"), ([z_1, z_2, z_2], "expected 2 latents"),
                           ([], "expected 2 latents"),
                           ([z_1[:, :1], z_2], "z_1"), ([z_1, z_2[..., :1]], "z_2"), ([z_1, z_2[0]], "z_2")]:
        with pytest.raises(ValueError, match=named):
            model.decode(latents)


@pytest.mark.parametrize("inference", MODES)
def test_latents_of_different_batch_sizes_are_refused(inference):
    model = tiny(inference)
    z_1, z_2 = model.encode(batch(model)[0])
    for latents in ([z_1, z_2[:2]], [z_1[:2], z_2], [z_1, z_2[:1]]):
        with pytest.raises(ValueError):
            model.decode(latents)


# ------------------------------------------------------------------------------------------------ files


@pytest.mark.parametrize("case", CASES[2:4] + CASES[6:8])
def test_saved_model_draws_bitwise_the_same_samples(case, tmp_path):
    model = case_model(*case)
    model(*batch(model))  # moves the batch norms' running statistics
    model.provenance = {"steps": 7, "data": "captchas"}
    model.eval().save(tmp_path / "model.pt")
    loaded = HVAE.load(tmp_path / "model.pt")
    assert not loaded.training and loaded.provenance == model.provenance and loaded.config == model.config
    draw = lambda m: m.sample(3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(loaded), draw(model))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values()))


def test_file_loads_without_running_code(tmp_path):
    tiny(latent_channels=(1, 2), input_size=[6, 8]).save(tmp_path / "model.pt")
    content = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {"config", "weights", "provenance"} <= set(content)


def test_numpy_sigma_survives_the_file(tmp_path):
    numpy = pytest.importorskip("numpy")
    tiny(likelihood="gaussian", sigma=numpy.float64(0.2)).save(tmp_path / "model.pt")
    assert HVAE.load(tmp_path / "model.pt").log_sigma.exp().item() == pytest.approx(0.2)


def test_half_a_file_draws_almost_the_same(tmp_path):
    model = tiny(likelihood="gaussian", sigma=0.4).eval()
    for name, half in [("whole.pt", False), ("half.pt", True)]:
        model.save(tmp_path / name, half=half)
    weights = torch.load(tmp_path / "half.pt", weights_only=True)["weights"]
    assert all(weight.dtype == (torch.float16 if weight.ndim > 1 else torch.float32) for weight in weights.values())
    assert (tmp_path / "half.pt").stat().st_size < (tmp_path / "whole.pt").stat().st_size
    loaded = HVAE.load(tmp_path / "half.pt")
    assert all(weight.dtype == model.state_dict()[name].dtype for name, weight in loaded.state_dict().items())
    draw = lambda m: m.sample(4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(draw(loaded), draw(model), atol=0.01, rtol=0)
    assert torch.equal(loaded.log_sigma, model.log_sigma)  # its rounding error would count once for every pixel


def test_loading_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            HVAE.load(path)
        assert str(path) in str(error.value)


def refused(path):
    with pytest.raises(ValueError) as error:
        HVAE.load(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"Just a text\n", b"Great news, everyone\n", b"Memo",
                                     b"J", b".", b"\x85", b"{}",
                                     b"\x80\x02}q\x00.", b"PK\x03\x04", bytes(1000), b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(content, tmp_path):
    path = tmp_path / "other.pt"
    path.write_bytes(content)
    refused(path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_truncated_file_is_refused(share, tmp_path):
    path = tmp_path / "truncated.pt"
    tiny().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path)


@pytest.mark.parametrize("content", [
    {}, [1, 2], torch.zeros(3), {"weights": {}}, {"format": "hvae-2"}, {"format": "hvae-1"},
    {"format": "hvae-1", "config": {}},
    {"format": "hvae-1", "config": {"wings": 2}, "weights": {}}, {"format": "hvae-1", "config": [1], "weights": {}},
    {"format": "hvae-1", "config": {"sigma": -1.0}, "weights": {}},
    {"format": "hvae-1", "config": {"sigma": "wide"}, "weights": {}}])
def test_other_dicts_are_refused(content, tmp_path):
    torch.save(content, tmp_path / "dict.pt")
    refused(tmp_path / "dict.pt")


@pytest.mark.parametrize("weights", [{}, {1: torch.zeros(1)}, {"h_top": torch.zeros(1)}, None, 5, [1]])
def test_weights_that_do_not_fit_are_refused(weights, tmp_path):
    torch.save({"format": "hvae-1", "config": tiny().config, "weights": weights}, tmp_path / "weights.pt")
    refused(tmp_path / "weights.pt")


def forged(path, config=None, provenance=None, **weights):
    """A checkpoint with a checksum that is right, whatever is in it."""
    model = tiny()
    content = {"config": {**model.config, **(config or {})}, "weights": {**model.state_dict(), **weights},
               "provenance": {} if provenance is None else provenance}
    torch.save({"format": "hvae-1", **content, "checksum": checksum(**content)}, path)


def test_forged_files_are_refused(tmp_path):
    """Right checksums do not make them good, and none may take memory that the file's size does not suggest."""
    path = tmp_path / "forged.pt"
    forged(path)
    HVAE.load(path)
    bias = tiny().to_image.bias.detach()
    huge = [("res", 8000)] * 10
    for change in (dict(config={"outer_config": huge}), dict(config={"flow": 10**9}), dict(config={"input_size": (10**6, 10**6)}),
                   dict(config={"inner_config": [[("upsample", 10**6)]]}), dict(config={"text_length": 10**9}),
                   dict(config={"sigma": 10**400}), dict(config={"latent_channels": 10**9}), dict(config={"input_channels": 10**12}),
                   dict(provenance=["a list"]), dict(more=bias), {"to_image.bias": bias * math.nan},
                   {"to_image.bias": bias + math.inf}, {"to_image.bias": bias[:0]}, {"to_image.bias": 1e300 * bias.double().exp()},
                   dict(provenance={"steps": "many"}), dict(provenance={"seconds": [1]}), dict(provenance={1j: 0}),
                   dict(config={"outer_config": [("pool", 1)] * 10**5}), dict(more=torch.zeros(1).expand(10**9))):
        forged(path, **change)
        refused(path)


def test_forged_nests_are_refused(tmp_path):
    nest = []
    for _ in range(12):  # a file of a few kilobytes, a text of terabytes
        nest = [nest] * 10
    content = {"config": tiny().config, "weights": tiny().state_dict(), "provenance": {"nest": nest}, "checksum": ""}
    torch.save({"format": "hvae-1", **content}, tmp_path / "nest.pt")
    refused(tmp_path / "nest.pt")


def test_compressed_files_are_refused(tmp_path):
    tiny().save(tmp_path / "plain.pt")
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(tmp_path / "packed.pt", "w") as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part), zipfile.ZIP_DEFLATED)
    refused(tmp_path / "packed.pt")


def test_forged_order_of_a_flow_is_refused(tmp_path):
    vector_top = dict(inner_config=[[("dense", 6)]], latent_channels=(2, 4), flow=2)
    model = tiny(**vector_top)
    model.levels[-1].flow.order[1, 0] = 999
    model.save(tmp_path / "model.pt")
    refused(tmp_path / "model.pt")


def test_file_keeps_what_load_can_read(tmp_path):
    model = tiny(likelihood=np.str_("bernoulli"))
    model.save(tmp_path / "model.pt")
    assert HVAE.load(tmp_path / "model.pt").config == model.config
    model.provenance = {"folder": tmp_path}
    with pytest.raises(ValueError, match="provenance"):
        model.save(tmp_path / "other.pt")


@pytest.mark.parametrize("outer, inner", [([("conv", 8, 2)], [[("dense", 1)], [("dense", 4)]]),
                                          ([("conv", 4, 8), ("res", 4)], []), ([("conv", 1, 8), ("res", 1)], [])])
def test_levels_of_single_values(outer, inner):
    """Normalised alone, a value would always be 0, and torch refuses one image of them."""
    model = HVAE(outer, inner, (8, 8), 1, 2, likelihood="bernoulli", text_length=None)
    x = torch.rand(1, 1, 8, 8)
    (-model(x).elbo.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for block in model.inference for p in block.parameters())
    assert model.eval().sample(1).shape == x.shape


def test_output_level_overlooks_broken_images():
    model, same = tiny(), tiny()
    x = torch.rand(4, *model.input_shape)
    model.set_output_level(x)
    same.set_output_level(torch.cat([x, torch.full_like(x[:1], math.nan)]))
    assert torch.equal(model.to_image.bias, same.to_image.bias)
    same.set_output_level(torch.full_like(x, math.inf))
    assert torch.equal(model.to_image.bias, same.to_image.bias)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [
    lambda evil, path: torch.save({"format": "hvae-1", "config": evil, "weights": {}}, path),
    lambda evil, path: torch.save(evil, path, _use_new_zipfile_serialization=False),
    lambda evil, path: path.write_bytes(pickle.dumps(evil)),
    lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=0))])
def test_malicious_file_runs_nothing(write, tmp_path):
    write(Malicious(str(tmp_path / "trace")), tmp_path / "evil.pt")
    refused(tmp_path / "evil.pt")
    assert not (tmp_path / "trace").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_load_error_is_one_plain_line(tmp_path):
    """It does not repeat torch's advice to switch the check off."""
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Malicious(str(tmp_path / "trace"))))
    with pytest.raises(ValueError) as error:
        HVAE.load(tmp_path / "evil.pt")
    message = str(error.value)
    assert "\n" not in message and "\x1b" not in message and "weights_only" not in message and "options" not in message


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_asked_for_again():
    """Twenty tensors of 40 MB, one after the other: without it, each takes thousands of new pages."""
    code = """if True:
        import resource, sys, torch
        from model import keep_memory
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if sys.argv[1] == "keep":
            keep_memory()
        torch.ones(10_000_000)
        before = faults()
        for _ in range(20):
            torch.ones(10_000_000)
        print(faults() - before)"""
    run = lambda how: int(subprocess.check_output([sys.executable, "-c", code, how], cwd=Path(__file__).parents[1]))
    assert run("keep") < run("as it is") / 3
