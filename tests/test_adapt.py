"""A model for other images and texts says about what the model before it said."""

import pytest
import torch

from hvae.adapt import adapted, fitted_weights, stretched
from model import HVAE

OUTER = [("conv", 8, 2), ("res", 8)]
INNER = [[("conv", 8, 2)], [("dense", 6)]]


def tiny(**arguments):
    torch.manual_seed(0)
    config = dict(input_size=(8, 16), text_length=3, charset="ABC", context=(1, 1), mixtures=2)
    return HVAE(OUTER, INNER, **{**config, **arguments}).eval()


def test_the_same_model_takes_over_everything():
    model = tiny()
    same, untrained = adapted(model)
    assert untrained == []
    for name, weight in model.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight)


def test_grey_images_are_seen_as_colour_images_without_colour():
    model, x = tiny(), torch.rand(2, 1, 8, 16)
    for out in model.context.palette.out:
        torch.nn.init.ones_(out.bias)
    grey, untrained = adapted(model, input_channels=1)
    assert untrained == []
    seen = model.features(x.expand(-1, 3, -1, -1), draws=1)
    for one, other in zip(seen, grey.features(x, draws=1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    colour, untrained = adapted(grey, input_channels=3)
    assert all(name.startswith("context.") for name in untrained)
    colour.context.start_palette_at(torch.full((2, 3, 8, 16), 0.5))  # as p(c|z) is untrained
    mean = colour.context.palette.out[0].bias[8:16]
    assert mean.allclose(torch.tensor(127.5 / 128 - 1), atol=0.01)
    for one, other in zip(seen, colour.features(x.expand(-1, 3, -1, -1), draws=1), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_grey_images_without_a_context():
    grey, _ = adapted(tiny(), input_channels=1, context=None)
    assert grey(torch.rand(2, 1, 8, 16), grey.draw_text(2)).elbo.isfinite().all()


def test_grey_images_have_the_probabilities_of_the_first_of_equal_channels():
    model = tiny()
    for p in model.context.parameters():  # no two alike, as if trained
        torch.nn.init.normal_(p, std=0.1)
    grey, _ = adapted(model, input_channels=1)
    f, x = torch.randn(2, model.context.features, 8, 16), torch.rand(2, 1, 8, 16)
    close = dict(rtol=1e-4, atol=1e-4)

    def of_pixels(context, x):
        pixels, every = context(f), torch.arange(2 * 8 * 16)
        canvas, palette = pixels.canvas(x), pixels.palette(x)
        return pixels.score(canvas, canvas, palette, every)[:, 0]

    in_colour = of_pixels(model.context, x.expand(-1, 3, -1, -1))
    torch.testing.assert_close(of_pixels(grey.context, x), in_colour, **close)

    levels, seen = torch.randint(256, (2, 3, 1)).float(), torch.randn(2, 3 * model.context.features)
    for k in range(3):
        one = grey.context.palette.mixture(levels[:, :k, 0], seen)
        earlier = levels[:, :k].expand(-1, -1, 3).flatten(1)
        torch.testing.assert_close(one, model.context.palette.mixture(earlier, seen), **close)


@pytest.mark.parametrize("factor", [1, 2])
def test_a_dense_layer_sums_maps_of_another_size(factor):
    """An even map gives the same numbers, and the mirror gives the mean of the old map."""
    model = tiny()
    other, untrained = adapted(model, input_size=(8 * factor, 16 * factor))
    assert untrained == []
    even = lambda block: torch.ones(1, 8, *block.plan[0].size_in)
    seen = [m.inference[-1](even(m.inference[-1])) for m in (model, other)]
    torch.testing.assert_close(*seen)
    z = torch.randn(1, 6)
    made = [m.generation[-1].layers[0][0](z).unflatten(1, (8, -1)).mean(2) for m in (model, other)]
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [(5, 9), (12, 40)])
def test_another_size_keeps_the_elbo_in_bounds(size):
    model = tiny()
    other, _ = adapted(model, input_size=size)
    y = model.draw_text(4)
    kl = other(torch.rand(4, 3, *size), y).kl
    assert kl.isfinite().all() and kl.max() < 20 * model(torch.rand(4, 3, 8, 16), y).kl.max() + 50


def test_a_vector_above_a_vector():
    model = HVAE(OUTER, [[("dense", 6)], [("dense", 4)]], input_size=(8, 16), text_length=None)
    other, _ = adapted(model, input_size=(12, 20))
    assert other(torch.rand(2, 3, 12, 20)).elbo.isfinite().all()


def test_symbols_and_places_that_both_have():
    model = tiny()
    other = tiny(charset="XCA", text_length=5)
    weights = fitted_weights(model, other)
    for name in ("text_top", "texts.0", "texts.2", "levels.1.prior_features.text"):
        before, after = model.state_dict(), {**other.state_dict(), **weights}
        embedding = f"{name}.embedding.weight"
        assert torch.equal(after[embedding][1:], before[embedding][[2, 0]])
        assert torch.equal(after[embedding][0], other.state_dict()[embedding][0])
    flat, which = "text_top.flat.weight", "texts.0.which.weight"
    n = model.state_dict()[flat].shape[1]
    assert torch.equal(after[flat][:, :n], before[flat])
    assert torch.equal(after[which][[0, 1, 2, 5]], before[which])
    assert "texts.0.bias" not in weights


def test_a_letter_in_the_other_case():
    """It begins as the letter that is known; its own case comes first."""
    model, other = tiny(), tiny(charset="cXaC")
    before, after = model.state_dict(), fitted_weights(model, other)
    name = "texts.0.embedding.weight"
    assert torch.equal(after[name][[0, 2, 3]], before[name][[2, 0, 2]])
    assert torch.equal(after[name][1], other.state_dict()[name][1])


def test_stretched_maps():
    maps = torch.rand(2, 3, 4, 5)
    assert stretched(maps, (4, 5)) is maps
    assert stretched(maps, (8, 3)).shape == (2, 3, 8, 3)
    torch.testing.assert_close(stretched(maps[0], (8, 10)).mean((1, 2)), maps[0].mean((1, 2)))
