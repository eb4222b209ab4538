import math
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from test_blocks import configs
from torch import nn

from hvae.arguments import latent_width
from hvae.blocks import Layer, plan
from hvae.checkpoint import read_tensors, write_tensors
from hvae.distributions import DiagonalGaussian, kl_divergence, quantiles
from hvae.validate import InputError
from model import (
    CONFIGS,
    DIGITS,
    HVAE,
    INNER_CONFIG,
    OUTER_CONFIG,
    UPPERCASE,
    WITHOUT_WINDOWS,
    TextInput,
)

MODES = ["top-down", "bottom-up"]
modes = pytest.mark.parametrize("inference", MODES)
likelihoods = pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", "logistic"])
U_NET = [("conv-bn", 4), ("skip-up", 0), ("pool", 2), ("conv", 5), ("upsample", 2)]
U_NET += [("skip-down", 0), ("conv", 3)]
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
cases = pytest.mark.parametrize("case", CASES)


def tiny(inference="top-down", **arguments):
    """A seeded two-level model of 6x8 grey images, without windows; `arguments` replace any."""
    torch.manual_seed(0)
    config = dict(
        WITHOUT_WINDOWS,
        mixtures=1,
        outer_config=[("conv", 4, 2)],
        inner_config=[[("res", 4)]],
        input_size=(6, 8),
        input_channels=1,
        latent_channels=2,
        likelihood="bernoulli",
        text_length=None,
    )
    return HVAE(**{**config, "inference": inference, **arguments})


def case_model(inference, levels, input_size, channels, likelihood, mixtures, text_length):
    return tiny(
        inference,
        outer_config=[("conv", 3), ("pool", 2), ("conv-bn", 4, 2)],
        inner_config=LEVELS[levels],
        input_size=input_size,
        input_channels=channels,
        latent_channels=list(range(1, levels + 1)),
        likelihood=likelihood,
        mixtures=mixtures,
        sigma=None,
        text_length=text_length,
        charset="ABCDE",
    )


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(model, n=3, seed=0):
    """Random 8-bit images and, if the model is conditional, texts."""
    generator = seeded(seed)
    x = torch.randint(256, (n, *model.input_shape), generator=generator) / 255
    return x, model.draw_text(n, generator=generator)


def one_image(model, n):
    return torch.rand(1, *model.input_shape, generator=seeded(1)).expand(n, -1, -1, -1)


def draw(model, n=3, *arguments, **more):
    """n samples with the same noise each time."""
    return model.sample(n, *arguments, **more, generator=seeded())


def lively(model, factor=3.0):
    """Larger weights, so that every latent matters as it does in a trained model."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= factor
    return model


def check_gradients(model, terms):
    """Every parameter learns from the ELBO."""
    terms.elbo.mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


# ---------------------------------------------------------------------------- ELBO


@cases
def test_elbo_terms(case):
    model, levels = case_model(*case), case[1]
    terms = model(*batch(model))
    assert terms.reconstruction.shape == terms.elbo.shape == terms.log_weight.shape == (3,)
    assert terms.kl.shape == (3, levels)
    assert torch.equal(terms.elbo, -(terms.reconstruction + terms.kl.sum(1)))
    assert (terms.kl >= 0).all()
    assert all(term.isfinite().all() and term.dtype == torch.float32 for term in terms[:5])
    check_gradients(model, terms)


@cases
def test_uses(case):
    """encode, decode, reconstruct and sample: shapes, ranges, and no gradients."""
    model = case_model(*case).eval()
    x, y = batch(model)
    latents = model.encode(x, y)
    assert [z.shape for z in latents] == [(3, *level.shape) for level in model.levels]
    assert [z.shape[1] for z in latents] == list(range(1, case[1] + 1))
    assert not any(z.requires_grad for z in latents)
    if case[1] == 5:
        assert latents[-1].dim() == 2  # a vector after 'dense'
    p_x = model.decode(latents, y)
    assert p_x.log_prob(x).shape == (3,)
    for image in (p_x.image, model.reconstruct(x, y), model.sample(3)):
        assert image.shape == x.shape and image.min() >= 0 and image.max() <= 1
    assert not model.sample(2).requires_grad and not model.reconstruct(x, y).requires_grad


def within_four_standard_errors(difference):
    return abs(difference.mean()) < 4 * difference.std() / math.sqrt(len(difference))


@pytest.mark.parametrize(
    "inference, inner", [("top-down", LEVELS[n]) for n in (1, 2, 3)] + [("bottom-up", [])]
)
@torch.no_grad()
def test_mean_log_weight_is_the_elbo(inference, inner):
    """The closed-form KLs are the means of log q - log p, level by level and together."""
    model = lively(tiny(inference, inner_config=inner))
    _, levels = model.infer(one_image(model, 4000))
    for q, p, z, _, kl in levels:
        assert within_four_standard_errors(q.log_prob(z) - p.log_prob(z) - kl)
        torch.testing.assert_close(kl, kl_divergence(q, p))
    terms = model(one_image(model, 4000))
    assert within_four_standard_errors(terms.log_weight - terms.elbo)


@modes
@torch.no_grad()
def test_draws_of_an_image_are_as_if_it_came_several_times(inference):
    model = lively(tiny(inference, inner_config=LEVELS[3])).eval()
    x, _ = batch(model)
    torch.manual_seed(0)
    together = model(x, draws=3)
    torch.manual_seed(0)
    apart = model(x.repeat_interleave(3, 0))
    assert together.elbo.shape == (3 * len(x),) and together.elbo[0] != together.elbo[1]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


class Given(nn.Module):
    """A head whose mean is its input (times `factor`), whatever its weights."""

    def __init__(self, factor, logvar):
        super().__init__()
        self.factor, self.logvar = factor, logvar

    def forward(self, h):
        return DiagonalGaussian(self.factor * h, torch.full_like(h, self.logvar))


def coupled_chain():
    """A chain in which z_1 and z_2 are all but equal.

    z_1 ~ N(0, 1), z_2 ~ N(z_1, e^-4), and p(z_1|z_2) = N(z_2, e^-2).
    """
    model = tiny("bottom-up", outer_config=[("dense", 2)], inner_config=[[("dense", 2)]])
    model.stems[0] = model.inference[1] = model.generation[1] = nn.Identity()
    model.levels[0].q, model.levels[1].q = Given(0.0, 0.0), Given(1.0, -4.0)
    model.levels[0].p = Given(1.0, -2.0)
    model.levels[1].merge = lambda h, z: z
    return model


@torch.no_grad()
def test_bottom_up_mean_log_weight_is_the_elbo():
    """z_2 ~ q(z_2|z_1): the consistency term may not take z_1 and z_2 as independent given x."""
    model = coupled_chain()
    terms = model(one_image(model, 4000))
    assert within_four_standard_errors(terms.log_weight - terms.elbo)


@pytest.mark.parametrize(
    "build",
    [
        lambda: lively(tiny("top-down")),
        lambda: lively(tiny("bottom-up")),
        coupled_chain,
        lambda: lively(tiny("bottom-up", inner_config=LEVELS[3])),
    ],
)
@torch.no_grad()
def test_elbo_is_below_the_importance_weighted_bound(build):
    model = build()
    terms = model(one_image(model, 4000))
    assert terms.elbo.mean() <= terms.log_weight.logsumexp(0) - math.log(4000)


@likelihoods
@modes
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


@likelihoods
@modes
def test_bfloat16_autocast_stays_close(inference, likelihood):
    model = tiny(inference, likelihood=likelihood, text_length=2)
    x, y = batch(model, 8)
    terms = []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            terms.append(model(x, y)[:5])
    for full, half in zip(*terms, strict=True):
        assert half.dtype == torch.float32 and half.isfinite().all()
        torch.testing.assert_close(half, full, rtol=0.03, atol=0.5)


# ---------------------------------------------------------------------------- output level


@likelihoods
def test_set_output_level_starts_at_the_images_mean(likelihood):
    mixtures = 2 if likelihood == "logistic" else 1
    model = tiny(likelihood=likelihood, input_channels=3, mixtures=mixtures).eval()
    assert not model.to_image.bias.any()
    x = torch.tensor([0.2, 0.5, 0.9]).view(1, 3, 1, 1).expand(4, 3, 6, 8)
    before = model(x).elbo.mean()
    model.set_output_level(x)
    model.to_image.weight.data.zero_()
    torch.testing.assert_close(model.sample(4), x, atol=1e-5, rtol=0)
    assert model(x).elbo.mean() > before


def test_mixtures_start_apart():
    """Each component of the logistic at another of the images' values: they need not part."""
    paper, ink = torch.tensor([0.9, 1.0, 0.8]), torch.tensor([0.2, 0.1, 0.6])
    columns = torch.where(torch.arange(8) < 3, ink[:, None], paper[:, None])
    x = columns.view(1, 3, 1, 8).expand(2, 3, 6, 8)
    expected = torch.stack([ink.minimum(paper), ink.maximum(paper)])
    torch.testing.assert_close(quantiles(x, 2), expected)
    model = tiny(likelihood="logistic", input_channels=3, mixtures=2)
    model.set_output_level(x)
    model.to_image.weight.data.zero_()
    means = model.decode([torch.zeros(1, *level.shape) for level in model.levels]).mean
    torch.testing.assert_close((means[0, :, :, 0, 0] + 1) / 2, expected)


def test_output_level_leaves_out_broken_images():
    model, same = tiny(), tiny()
    x = torch.rand(4, *model.input_shape)
    model.set_output_level(x)
    same.set_output_level(torch.cat([x, torch.full_like(x[:1], math.nan)]))
    assert torch.equal(model.to_image.bias, same.to_image.bias)
    same.set_output_level(torch.full_like(x, math.inf))
    assert torch.equal(model.to_image.bias, same.to_image.bias)


# ---------------------------------------------------------------------------- structure


@modes
def test_size_keeping_blocks_are_built_identically_and_others_mirrored(inference):
    inner = [U_NET, [("res", 3), ("convt", 5)], [("pool", 2), ("conv", 6)], [("dense", 3)]]
    model = tiny(inference, inner_config=inner, outer_config=[("conv", 4)])
    shapes = lambda block: [
        (type(m), [tuple(p.shape) for p in m.parameters()]) for m in block.modules()
    ]
    for l in (1, 2):
        up, down = model.inference[l], model.generation[l]
        assert shapes(up) == shapes(down)
        pairs = zip(up.parameters(), down.parameters(), strict=True)
        assert all(a is not b for a, b in pairs)
    assert [layer.kind for layer in model.generation[3].plan] == ["convt", "upsample"]
    assert [layer.kind for layer in model.generation[4].plan] == ["undense"]
    assert (model.generation[3].plan[0].c_in, model.generation[3].plan[0].c_out) == (6, 5)


@torch.no_grad()
def test_bottom_up_is_markov():
    """q(z_2|.) depends on x through z_1 alone: with z_1 held, another x changes nothing."""
    model = tiny("bottom-up")
    z_1 = torch.randn(2, *model.levels[0].shape)
    q_2 = lambda seed: model.infer(batch(model, 2, seed)[0])[1][1].q
    free = [q_2(seed) for seed in (0, 1)]
    model.stems[0].register_forward_pre_hook(lambda module, arguments: (z_1,))
    held = [q_2(seed) for seed in (0, 1)]
    assert not torch.equal(free[0].mu, free[1].mu)
    assert torch.equal(held[0].mu, held[1].mu) and torch.equal(held[0].logvar, held[1].logvar)


def test_bottom_up_gradient_reaches_x_through_z_1_alone():
    model = tiny("bottom-up")
    x = batch(model)[0].requires_grad_()
    q = model.infer(x)[1][1].q
    assert torch.autograd.grad(q.mu.sum(), x)[0].abs().max() > 0
    model.stems[0].register_forward_pre_hook(lambda module, arguments: (arguments[0].detach(),))
    q, _, z, *_ = model.infer(x)[1][1]
    log_q = q.log_prob(z.detach()).sum()
    assert torch.autograd.grad(log_q, x, allow_unused=True)[0] is None


@torch.no_grad()
def test_top_down_posterior_of_z_1_sees_z_2():
    model = tiny("top-down")
    x, _ = batch(model)
    (a_1, a_2), (b_1, b_2) = (model.infer(x, generator=seeded(seed))[1] for seed in (0, 1))
    assert not torch.equal(a_1.q.mu, b_1.q.mu) and torch.equal(a_2.q.mu, b_2.q.mu)


@modes
@torch.no_grad()
def test_features_pass_the_latents_in_top_down_only(inference):
    """With z_1 fixed, z_2 and z_3 still change a ladder's image; a chain's knows z_1 alone."""
    model = tiny(inference, inner_config=LEVELS[3]).eval()
    latents = [torch.randn(2, *level.shape) for level in model.levels]
    image = model.decode(latents).parameters
    for l in (1, 2):
        other = list(latents)
        other[l] = latents[l] + 1
        same = torch.equal(model.decode(other).parameters, image)
        assert same == (inference == "bottom-up")
    assert not torch.equal(model.decode([latents[0] + 1, *latents[1:]]).parameters, image)


def test_the_vae_of_the_assignment():
    """A classic VAE on 28x28 digits: no inner level, one vector latent of two values."""
    model = HVAE(**CONFIGS["mnist-vae"])
    assert model.generation[0].plan == [
        Layer("undense", 128, 64, (), (14, 14)),
        Layer("convt", 64, 32, (14, 14), (28, 28), 2),
        Layer("convt", 32, 32, (28, 28), (28, 28)),
    ]
    out = model.to_image
    assert isinstance(out, nn.ConvTranspose2d)
    assert (out.in_channels, out.out_channels, out.stride) == (32, 1, (1, 1))
    assert model.encode(torch.rand(2, 1, 28, 28))[0].shape == (2, 2)
    assert model.sample(2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("stacked", [1, 3])
@modes
def test_u_nets_on_50x250_colour_images(inference, stacked):
    outer = [("conv-bn", 32), ("pool", 2), ("conv-bn", 64), ("pool", 2), ("conv-bn", 64)]
    inner = [("conv-bn", 32), ("skip-up", 0), ("pool", 2), ("conv-bn", 64), ("skip-up", 1)]
    inner += [("pool", 2), ("conv-bn", 64), ("conv-bn", 64), ("upsample", 2), ("skip-down", 1)]
    inner += [("conv-bn", 32), ("upsample", 2), ("skip-down", 0), ("conv-bn", 1)]
    size = dict(input_size=(50, 250), input_channels=3)
    blocks = dict(outer_config=outer, inner_config=[inner] * stacked)
    model = tiny(inference, **size, **blocks, likelihood="gaussian")
    assert [level.shape for level in model.levels] == [(2, 12, 62)] * (1 + stacked)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    loss = -model(batch(model, 2)[0]).elbo.mean()
    loss.backward()
    optimizer.step()
    assert loss.isfinite() and all(p.isfinite().all() for p in model.parameters())
    assert model.eval().sample(1).shape == (1, 3, 50, 250)


@pytest.mark.parametrize(
    "outer, inner",
    [
        ([("conv", 8, 2)], [[("dense", 1)], [("dense", 4)]]),
        ([("conv", 4, 8), ("res", 4)], []),
        ([("conv", 1, 8), ("res", 1)], []),
    ],
)
def test_levels_of_single_values(outer, inner):
    """Normalised alone, a value would always be 0, and torch rejects one image of them."""
    model = tiny(outer_config=outer, inner_config=inner, input_size=(8, 8))
    x = torch.rand(1, 1, 8, 8)
    (-model(x).elbo.sum()).backward()
    assert all(p.grad.abs().sum() > 0 for block in model.inference for p in block.parameters())
    assert model.eval().sample(1).shape == x.shape


# ---------------------------------------------------------------------------- the two lists alone


OUTERS = [
    [("pool", 2)],
    [("res", 3)],
    [("dense", 5)],
    [("conv", 3)],
    [("conv-bn", 3, 2)],
    [("conv", 4, 2), ("res", 6), ("pool", 3)],
]
INNERS = [
    [],
    [[("dense", 5)]],
    [[("conv-bn", 4, 2)], [("res", 6), ("dense", 3)], [("dense", 8)]],
    [[("upsample", 2), ("conv", 3)], [("pool", 2)]],
    [U_NET, [("convt", 2), ("convt-bn", 5)]],
]


def check_lists_alone(outer, inner, inference, **size):
    """Builds a model from its lists alone, then trains and samples it once."""
    torch.manual_seed(0)
    model = HVAE(outer, inner, inference=inference, **size)
    ends = [block.plan[-1] for block in model.inference]
    widths = [latent_width(end.c_out, end.size_out) for end in ends]
    assert model.config["latent_channels"] == widths == [level.shape[0] for level in model.levels]
    assert [level.shape[1:] for level in model.levels] == [tuple(end.size_out) for end in ends]
    check_gradients(model, model(*batch(model, 2)))
    assert model.eval().sample(2).shape == (2, *model.input_shape)
    assert HVAE(**model.config).config == model.config


@modes
@pytest.mark.parametrize("size", [(15, 13), (16, 22)])
@pytest.mark.parametrize("inner", INNERS)
@pytest.mark.parametrize("outer", OUTERS)
def test_two_lists_build_a_model(outer, inner, size, inference):
    if outer[-1][0] == "dense":
        inner = [[("dense", 4)]] * len(inner)
    check_lists_alone(outer, inner, inference, input_size=size)


@modes
def test_two_lists_build_a_model_of_captchas(inference):
    check_lists_alone([("conv", 4, 4)], [[("conv", 8, 2)], [("dense", 8)]], inference)


@st.composite
def two_lists(draw):
    """(outer_config, inner_config, size) of one to four levels, correct by construction."""
    outer, _, size = draw(configs(inner=False))
    here, inner = plan(outer, 3, size, "outer_config")[-1], []
    for _ in range(draw(st.integers(0, 3))):
        if here.size_out and math.prod(here.size_out) < 2000:
            block, _, _ = draw(configs(inner=True, size=here.size_out))
        else:
            block = [("dense", draw(st.integers(1, 8)))]
        here = plan(block, here.c_out, here.size_out, "inner_config[0]")[-1]
        inner.append(block)
    return outer, inner, size


@modes
@settings(deadline=None, max_examples=25, derandomize=True)
@given(two_lists())
def test_any_two_lists_build_a_model(inference, lists):
    outer, inner, size = lists
    torch.manual_seed(0)
    model = HVAE(outer, inner, size, inference=inference)
    terms = model(*batch(model, 2))
    terms.elbo.mean().backward()
    assert all(term.isfinite().all() for term in terms[:5])
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.eval().sample(1).shape == (1, *model.input_shape)


# ---------------------------------------------------------------------------- the default


@pytest.fixture(scope="module")
def default():
    return HVAE()


def test_default_is_the_shipped_configuration(default):
    assert default.config["outer_config"] == OUTER_CONFIG
    assert default.config["inner_config"] == INNER_CONFIG
    assert default.config["latent_channels"] == [4, 4, 4, 8, 64]
    assert default.input_shape == (3, 60, 160)
    assert (default.text_length, default.charset) == (4, DIGITS + UPPERCASE)
    assert default.config["inference"] == "top-down"
    assert default.eval().sample(1, "7KQ2").shape == (1, 3, 60, 160)


@pytest.mark.parametrize(
    "c, size, width",
    [
        (128, (), 64),
        (1, (), 1),
        (128, (4, 10), 8),
        (128, (8, 20), 4),
        (128, (15, 40), 2),
        (128, (35, 80), 1),
        (128, (4096, 4096), 1),
        (3, (1, 1), 3),
    ],
)
def test_latent_width(c, size, width):
    assert latent_width(c, size) == width


def test_summary_names_every_level(default):
    five = tiny("bottom-up", inner_config=LEVELS[5], latent_channels=[1, 2, 3, 4, 5])
    for model in (default, five):
        lines = model.summary().splitlines()
        parameters = sum(p.numel() for p in model.parameters())
        assert f"{len(model.levels)} levels" in lines[0]
        assert f"{parameters:,} parameters" in lines[0]
        rows = {line.split()[0]: line.split()[1] for line in lines[2:]}
        assert rows == {
            f"z_{l + 1}": "x".join(map(str, level.shape)) for l, level in enumerate(model.levels)
        }


# ---------------------------------------------------------------------------- text, sampling


@pytest.mark.parametrize("inner", [LEVELS[2], [[("dense", 5)]]])
@modes
def test_text_changes_samples_and_elbo(inference, inner):
    model = tiny(inference, inner_config=inner, text_length=2, charset="ABC").eval()
    images = [draw(model, 2, text) for text in ("AB", "AC", "BA", "BB")]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    x, y = batch(model, 2)
    elbos = []
    for shift in (0, 1):
        torch.manual_seed(0)
        elbos.append(model(x, (y + shift) % 3).elbo)
    assert not torch.equal(*elbos)


WRONG_Y = {
    "none": None,
    "too few texts": torch.zeros(2, 2).long(),
    "too long": torch.zeros(3, 3).long(),
    "one row": torch.zeros(3).long(),
    "floats": torch.zeros(3, 2),
    "int32": torch.zeros(3, 2).int(),
    "above the charset": torch.full((3, 2), 3),
    "negative": torch.full((3, 2), -1),
}


@modes
@pytest.mark.parametrize("wrong", WRONG_Y.values(), ids=WRONG_Y)
def test_wrong_y(inference, wrong):
    model = tiny(inference, text_length=2, charset="ABC")
    x, y = batch(model)
    latents = model.encode(x, y)
    for use in (
        lambda: model(x, wrong),
        lambda: model.encode(x, wrong),
        lambda: model.reconstruct(x, wrong),
        lambda: model.decode(latents, wrong),
    ):
        with pytest.raises(InputError, match=r"\by\b"):
            use()


def test_text_for_an_unconditional_model():
    model = tiny()
    with pytest.raises(InputError, match="unconditional"):
        model(batch(model)[0], torch.zeros(3, 2).long())
    with pytest.raises(InputError, match="unconditional"):
        model.sample(1, "AB")


WRONG_TEXTS = [(1, text) for text in ("A", "ABC", "A?", "xy", "", 12)]
WRONG_TEXTS += [(1, ["AB", "AB"]), (1, [""]), (1, [12]), (1, [None]), (1, torch.zeros(1, 2).long())]
WRONG_TEXTS += [(2, ["AB"]), (2, ["AB", "A"])]


@pytest.mark.parametrize("charset, same", [("ABC", True), ("ABCabc", False)])
def test_lower_case_texts(charset, same):
    """They mean the upper-case symbols, where the charset has only those."""
    model = tiny(text_length=2, charset=charset)
    lower, upper = (model.draw_text(1, text) for text in ("ab", "AB"))
    assert torch.equal(lower, upper) == same


@pytest.mark.parametrize("n, text", WRONG_TEXTS)
def test_texts_that_do_not_fit(n, text):
    with pytest.raises(InputError, match="text"):
        tiny(text_length=2, charset="ABC").sample(n, text)


@pytest.mark.parametrize("n", [-1, 1.0, "1", None, True])
def test_wrong_n(n):
    with pytest.raises(InputError, match="^n"):
        tiny().sample(n)


WRONG_TEMPERATURES = [-0.1, math.nan, math.inf, -math.inf, "1", None]
WRONG_TEMPERATURES += [[], [1, 1, 1], [1, -1], [1, None]]


@pytest.mark.parametrize("temperature", WRONG_TEMPERATURES)
def test_wrong_temperature(temperature):
    with pytest.raises(InputError, match="temperature"):
        tiny().sample(1, temperature=temperature)


@pytest.mark.parametrize("length, text", [(None, None), (2, None), (2, "AB"), (2, [])])
def test_sample_of_no_images(length, text):
    for windows in (WITHOUT_WINDOWS, {"context": (1, 1), "prior_context": (1, 1)}):
        assert tiny(text_length=length, **windows).sample(0, text).shape == (0, 1, 6, 8)


@modes
def test_sample_is_repeatable(inference):
    model = tiny(inference, text_length=2).eval()
    first = draw(model)
    torch.manual_seed(123)  # the global state plays no part
    assert torch.equal(draw(model), first)
    assert not torch.equal(model.sample(3, generator=seeded(1)), first)


@modes
def test_an_image_does_not_depend_on_the_rest_of_its_batch(inference):
    blocks = dict(outer_config=[("conv-bn", 4, 2)], inner_config=[U_NET])
    model = tiny(inference, **blocks, text_length=2, charset="ABC").eval()
    a, b = (draw(model, 2, ["AB", other]) for other in ("CC", "BA"))
    torch.testing.assert_close(a[0], b[0])
    assert not torch.allclose(a[1], b[1])
    x, y = batch(model, 2)
    terms = []
    for images in (x, torch.stack([x[0], 1 - x[1]])):
        torch.manual_seed(0)
        terms.append(model(images, y))
    torch.testing.assert_close(terms[0].elbo[0], terms[1].elbo[0])


@modes
def test_temperature_0_is_deterministic_given_the_text(inference):
    model = tiny(inference, text_length=2).eval()
    cold = model.sample(2, "AB", temperature=0)
    assert torch.equal(cold, model.sample(2, "AB", temperature=0))
    torch.testing.assert_close(cold[0], cold[1])
    spread = [draw(model, 200, "AB", temperature=T).std(0).mean() for T in (0.3, 1)]
    assert 0 < spread[0] < spread[1]


def test_samples_in_bfloat16_stay_close(monkeypatch):
    model = tiny().eval()
    monkeypatch.setattr("model.has_bf16", lambda device: True)
    half = draw(model)
    monkeypatch.setattr("model.has_bf16", lambda device: False)
    assert half.dtype == torch.float32 and not torch.equal(half, draw(model))
    torch.testing.assert_close(half, draw(model), atol=0.01, rtol=0)


def test_draw_text():
    model = tiny(text_length=3, charset="XYZ")
    assert model.draw_text(2, "XZY").tolist() == [[0, 2, 1], [0, 2, 1]]
    assert model.draw_text(2, ["XXX", "ZZZ"]).tolist() == [[0, 0, 0], [2, 2, 2]]
    counts = model.draw_text(1000, generator=seeded()).flatten().bincount(minlength=3)
    assert counts.sum() == 3000 and (counts > 850).all()
    assert tiny().draw_text(2) is None


@modes
@pytest.mark.parametrize("inner", [LEVELS[2], [[("dense", 5)]]])
def test_texts_of_several_lengths(inference, inner, path):
    model = tiny(
        inference, inner_config=inner, text_length=3, lengths=[1, 0, 2.0], charset="AB"
    ).eval()
    y = model.draw_text(3000, generator=seeded())
    lengths = (y < 2).sum(1)
    assert torch.equal(y < 2, torch.arange(3) < lengths[:, None])  # blanks come last
    counts = lengths.bincount(minlength=4).tolist()
    assert counts[0] == counts[2] == 0 and 1800 < counts[3] < 2200
    images = [draw(model, 2, text) for text in ("A", "B", "AAA", "BAA")]
    assert all(not torch.equal(a, b) for i, a in enumerate(images) for b in images[:i])
    assert model(*batch(model)).elbo.isfinite().all()
    assert "texts of 1 or 3 from 2 symbols" in model.summary()
    model.save(path)
    assert torch.equal(draw(HVAE.load(path), 2, ["A", "BAB"]), draw(model, 2, ["A", "BAB"]))
    for wrong in ("", "AB", "ABAB"):
        with pytest.raises(InputError, match="1 or 3 symbols"):
            model.sample(1, wrong)
    with pytest.raises(InputError, match="expected 3 symbols"):
        tiny(text_length=3, charset="AB").sample(1, "AA")
    for wrong in ([1, 2], [0, 0, 0], [1, -1, 1]):
        with pytest.raises(InputError, match="lengths"):
            tiny(text_length=3, lengths=wrong)


def test_a_blank_adds_nothing():
    """To a map, every symbol in its place; to a vector, nothing but what the others say."""
    torch.manual_seed(0)
    y = torch.tensor([[0, 2, 2], [0, 1, 2], [2, 2, 2]])  # of the charset "AB"
    h = torch.randn(3, 4, 2, 3)
    text = TextInput(4, (2, 3), 3, 2)
    torch.testing.assert_close(text(h, y)[2], h[2])
    assert not torch.allclose(text(h, y)[0], h[0])
    of_vector = TextInput(4, (), 3, 2)
    empty = of_vector(torch.zeros(3, 4), y)[2]
    torch.testing.assert_close(empty, of_vector.flat.bias)


# ---------------------------------------------------------------------------- arguments


BAD_ARGUMENTS = {
    "input_size": [28, (28,), (0, 28), (28.0, 28), (28, 28, 3), (10**6, 10**6), None],
    "input_channels": [0, -1, 1.0, True, None],
    "latent_channels": [0, (1, 2, 3), (1,), (1, 0), (1, 2.0), "22", True, 2.0, 10**9],
    "inference": ["ladder", None],
    "likelihood": ["laplace", None],
    "sigma": [0, -0.1, math.nan, math.inf, 10**400, "0.2"],
    "mixtures": [0, 1.5, None, 10**9],
    "text_length": [0, -4, 4.0, True, 10**9],
    "charset": ["", "AAB", None, 36],
}


@pytest.mark.parametrize(
    "name, value", [(name, value) for name, values in BAD_ARGUMENTS.items() for value in values]
)
def test_bad_arguments_are_named(name, value):
    with pytest.raises(InputError, match=f"^{name}: "):
        tiny(**{"text_length": 2, name: value})


WRONG_SHAPES = [(1, 1, 6, 9), (1, 1, 8, 6), (1, 3, 6, 8), (1, 6, 8), (6, 8), (1, 1, 1, 6, 8)]


@modes
@pytest.mark.parametrize("shape", WRONG_SHAPES)
def test_wrong_images(inference, shape):
    model = tiny(inference)
    for use in (model, model.encode, model.reconstruct):
        with pytest.raises(InputError, match="expected images"):
            use(torch.zeros(shape))


@pytest.mark.parametrize("change", [lambda x: 2 * x - 1, lambda x: 255 * x, lambda x: x.byte()])
def test_images_that_are_not_from_0_to_1(change):
    model = tiny()
    with pytest.raises(InputError, match=r"in \[0, 1\], got torch.*from"):
        model(change(torch.ones(2, 1, 6, 8).tril()))


@modes
@pytest.mark.parametrize(
    "wrong, named",
    [
        (lambda z_1, z_2: [z_1], "expected 2 latents"),
        (lambda z_1, z_2: [z_1, z_2, z_2], "expected 2 latents"),
        (lambda z_1, z_2: [], "expected 2 latents"),
        (lambda z_1, z_2: [z_1[:, :1], z_2], "z_1"),
        (lambda z_1, z_2: [z_1, z_2[..., :1]], "z_2"),
        (lambda z_1, z_2: [z_1, z_2[0]], "z_2"),
        (lambda z_1, z_2: [z_1, z_2[:2]], "z_2"),  # other numbers of images
        (lambda z_1, z_2: [z_1[:2], z_2], "z_2"),
        (lambda z_1, z_2: [z_1, z_2[:1]], "z_2"),
    ],
)
def test_wrong_latents(inference, wrong, named):
    model = tiny(inference)
    with pytest.raises(InputError, match=named):
        model.decode(wrong(*model.encode(batch(model)[0])))


# ---------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.mark.parametrize("case", CASES[2:4] + CASES[6:8])
def test_saved_model_draws_bitwise_the_same_samples(case, path):
    model = case_model(*case)
    model(*batch(model))  # moves the batch norms' running statistics
    model.provenance = {"steps": 7, "data": "captchas"}
    model.eval().save(path)
    loaded = HVAE.load(path)
    assert not loaded.training and loaded.provenance == model.provenance
    assert loaded.config == model.config
    assert torch.equal(draw(loaded), draw(model))
    weights = zip(model.state_dict().values(), loaded.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)


def test_numpy_arguments_survive_the_file(path):
    numbers = dict(sigma=np.float32(0.2), text_length=2, lengths=[*np.bincount([1, 2, 2])[1:]])
    model = tiny(likelihood=np.str_("gaussian"), **numbers)
    model.save(path)
    loaded = HVAE.load(path)
    assert loaded.config == model.config
    assert loaded.log_sigma.exp().item() == pytest.approx(0.2)


def test_provenance_that_no_file_can_hold(path):
    model = tiny()
    model.provenance = {"folder": path}
    with pytest.raises(InputError, match="model.pt.*provenance"):
        model.save(path)
    assert not path.exists()


def test_half_a_file_draws_almost_the_same(tmp_path):
    model = tiny(likelihood="gaussian", sigma=0.4).eval()
    full, half = tmp_path / "full.pt", tmp_path / "half.pt"
    model.save(full)
    model.save(half, half=True)
    for weight in read_tensors(half)[0].values():
        assert weight.dtype == (torch.float16 if weight.ndim > 1 else torch.float32)
    assert half.stat().st_size < full.stat().st_size
    loaded = HVAE.load(half)
    for name, weight in loaded.state_dict().items():
        assert weight.dtype == model.state_dict()[name].dtype
    torch.testing.assert_close(draw(loaded), draw(model), atol=0.01, rtol=0)
    # its rounding error would count once for every pixel
    assert torch.equal(loaded.log_sigma, model.log_sigma)


def test_loading_a_missing_file_or_a_folder(tmp_path):
    for path in (tmp_path / "missing.pt", tmp_path):
        with pytest.raises(FileNotFoundError) as error:
            HVAE.load(path)
        assert str(path) in str(error.value)


def check_unreadable(path, culprit=""):
    """Loading is an error of one plain line that names the file and what is wrong with it."""
    with pytest.raises(InputError) as error:
        HVAE.load(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and culprit in message
    assert "\n" not in message and "\x1b" not in message and len(message) < 1000


OTHER_FILES = [b"", b"hello", b"Just a text\n", b"Great news, everyone\n", b"Memo", b"J", b"."]
OTHER_FILES += [
    b"\x85",
    b"{}",
    b"\x80\x02}q\x00.",
    b"PK\x03\x04",
    bytes(1000),
    b"\x89PNG\r\n\x1a\n",
]


@pytest.mark.parametrize("content", OTHER_FILES)
def test_other_files(content, path):
    path.write_bytes(content)
    check_unreadable(path)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.999])
def test_truncated_file(share, path):
    tiny().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    check_unreadable(path)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.9999])
def test_flipped_bit(share, path):
    """Wherever it is: in the header, or in the weights, where only the digest notices it."""
    tiny().save(path)
    content = bytearray(path.read_bytes())
    content[int(share * len(content))] ^= 4
    path.write_bytes(content)
    check_unreadable(path, "digest" if share > 0.5 else "")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_tensors_of_another_project(metadata, path):
    save_file({"weight": torch.zeros(3)}, path, metadata)
    check_unreadable(path, "not a file of this project")


@pytest.mark.parametrize(
    "metadata, culprit",
    [
        ({}, "lacks config, provenance"),
        ({"config": {}}, "lacks provenance"),
        ({"provenance": {}}, "lacks config"),
        ({"step": 3, "config": {}, "provenance": {}}, "state of a training run"),
        ({"config": [1], "provenance": {}}, "config"),
        ({"config": {}, "provenance": ["a list"]}, "provenance"),
        ({"config": {}, "provenance": {}}, "h_top"),  # lacks the weights of HVAE()
    ],
)
def test_files_that_are_no_checkpoints(metadata, culprit, path):
    write_tensors(path, {"weight": torch.zeros(1)}, metadata)
    check_unreadable(path, culprit)


def forge(path, config=None, **weights):
    """A checkpoint whose digest is right, whatever is in it."""
    model = tiny()
    metadata = {"config": {**model.config, **(config or {})}, "provenance": {}}
    write_tensors(path, {**model.state_dict(), **weights}, metadata)


BIAS = torch.zeros(1)


@pytest.mark.parametrize(
    "change, culprit",
    [
        ({"config": {"wings": 2}}, "wings"),
        ({"config": {"sigma": -1.0}}, "sigma"),
        ({"config": {"sigma": "wide"}}, "sigma"),
        ({"config": {"sigma": 10**400}}, "sigma"),
        ({"config": {"outer_config": [["conv", 5, 2]]}}, "inference.0.layers.0.0.weight"),
        ({"config": {"outer_config": [["res", 8000]] * 10}}, "outer_config[0]"),
        ({"config": {"inner_config": [[["upsample", 10**6]]]}}, "inner_config[0][0]"),
        ({"config": {"inference": "bottom-up"}}, "h_top"),
        ({"config": {"input_size": [10**6, 10**6]}}, "input_size"),
        ({"config": {"input_channels": 10**12}}, "outer_config[0]"),
        ({"config": {"latent_channels": 10**9}}, "latent_channels"),
        ({"config": {"text_length": 10**9}}, "text_length"),
        ({"config": {"flow": 10**9}}, "flow"),
        ({"more": BIAS}, "more"),
        ({"h_top": BIAS}, "h_top"),
        ({"to_image.bias": BIAS * math.nan}, "to_image.bias"),
        ({"to_image.bias": BIAS + math.inf}, "to_image.bias"),
        ({"to_image.bias": BIAS.double() + 1e300}, "to_image.bias"),
        ({"to_image.bias": BIAS[:0]}, "to_image.bias"),
    ],
)
def test_forged_files(change, culprit, path):
    forge(path)
    HVAE.load(path)
    config = change.get("config")
    forge(path, config, **{k: v for k, v in change.items() if k != "config"})
    check_unreadable(path, culprit)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize(
    "write",
    [
        lambda evil, path: torch.save({"config": evil, "weights": {}}, path),
        lambda evil, path: torch.save(evil, path, _use_new_zipfile_serialization=False),
        lambda evil, path: path.write_bytes(pickle.dumps(evil)),
        lambda evil, path: path.write_bytes(pickle.dumps(evil, protocol=0)),
    ],
)
def test_malicious_file_runs_nothing(write, path, tmp_path):
    write(Malicious(str(tmp_path / "trace")), path)
    check_unreadable(path)
    assert not (tmp_path / "trace").exists()


# ---------------------------------------------------------------------------- memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_kept_memory_is_not_asked_for_again():
    """Tensors of 40 MB, one by one: without it, each takes thousands of new pages."""
    code = """if True:
        import resource, sys, torch
        from hvae.parallel import keep_memory
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        if sys.argv[1] == "keep":
            keep_memory()
        for _ in range(20):  # until the heap has grown around what the interpreter allocates
            torch.ones(10_000_000)
        before = faults()
        for _ in range(20):
            torch.ones(10_000_000)
        print(faults() - before)"""
    root = Path(__file__).parents[1]
    run = lambda how: int(subprocess.check_output([sys.executable, "-c", code, how], cwd=root))
    assert run("keep") < run("as it is") / 3
