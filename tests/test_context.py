"""p(x|z) with a context: causal and normalised given the palette, and drawn from exactly."""

import copy
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trainer
from hvae.adapt import adapted
from hvae.context import ContextNetwork, is_flat
from hvae.fronts import SlantedCanvas, fronts
from hvae.palette import palette_of, pool
from model import CONFIGS, HVAE
from trainer import Hyperparameters, objective, train

KINDS = [("logistic", 3), ("logistic", 1), ("bernoulli", 1), ("bernoulli", 2)]


class NarrowNetwork(ContextNetwork):
    width = 16


def network(likelihood="logistic", channels=3, context=(2, 2), trained=False):
    """A seeded network in float64; `trained` gives it weights far from their start."""
    torch.manual_seed(0)
    net = NarrowNetwork(channels, context, 3, likelihood).double()
    if trained:
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.7)
    return net


def distribution(likelihood="logistic", channels=3, size=(5, 6), batch=2, **arguments):
    net = network(likelihood, channels, **arguments)
    f = torch.randn(batch, net.features, *size, dtype=torch.float64)
    return net(f)


def images(likelihood, *shape):
    top = 1 if likelihood == "bernoulli" else 255
    return torch.randint(top + 1, shape).double() / top


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("size, context", [((2, 3), (1, 1)), ((3, 3), (2, 3)), ((1, 4), (1, 2))])
def test_probabilities_of_all_binary_images_sum_to_one(size, context, trained):
    pixels = size[0] * size[1]
    every = torch.tensor(list(product([0.0, 1.0], repeat=pixels)), dtype=torch.float64)
    p = distribution("bernoulli", 1, size, 1, context=context, trained=trained)
    f = p.parameters.expand(len(every), -1, -1, -1)
    log_p = p.network(f).log_prob(every.view(-1, 1, *size))
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_probabilities_of_all_values_of_a_pixel_sum_to_one(channels, trained):
    """The last pixel's last channel given everything before it; all 256 of its values."""
    p = distribution("logistic", channels, (3, 4), 1, trained=trained)
    x = images("logistic", 1, channels, 3, 4)
    every = x.repeat(256, 1, 1, 1)
    every[:, -1, -1, -1] = torch.arange(256) / 255
    p = p.network(p.parameters.expand(256, -1, -1, -1))
    palette = p.palette(x).expand(256, -1, -1)
    last = channel_scores(p, every, palette)[:, -1, -1, -1]
    assert last.exp().sum().item() == pytest.approx(1, abs=1e-7)


def channel_scores(p, x, palette=None):
    """log p of every channel of every pixel, (B, H, W, C), as log_prob adds them up."""
    own = p.palette(x)
    canvas, every = p.canvas(x), torch.arange(len(p.f))
    log_p = p.score(canvas, canvas, own, every).reshape(len(x), -1).sum(1)
    assert torch.allclose(log_p + p.log_prob_of_palette(own), p.log_prob(x))
    palette = own if palette is None else palette
    return p.score(canvas, canvas, palette, every).reshape(len(x), *p.size, -1)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_probabilities_of_all_values_of_a_palette_sum_to_one(channels, trained):
    """The last level of a palette given the others."""
    net = network("logistic", channels, trained=trained).palette
    f = torch.randn(1, ContextNetwork.features, 3, 4, dtype=torch.float64).expand(256, -1, -1, -1)
    palette = torch.randint(256, (1, 3, channels)).double().repeat(256, 1, 1)
    every = palette.clone()
    every[:, -1, -1] = torch.arange(256)
    before = palette[:1].flatten(1)
    log_p = [
        net.mixture(before[:, :k], pool(f[:1])).log_prob(before[:, k]) for k in range(3 * channels)
    ]
    ratio = (net.log_prob(every, f) - sum(log_p[:-1])).exp()
    assert ratio.sum().item() == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("channels", [1, 3])
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_a_palette_is_paper_ink_and_the_deepest_colour(channels, seed):
    """Two other colours are more frequent: one nearer to the paper, and one nearer than deepest."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high: torch.randint(low, high, (2, channels), generator=generator).float()
    paper, deepest = draw(220, 256), draw(0, 100)
    counts = {0.0: 300, 0.15: 150, 0.6: 100, 0.8: 40, 1.0: 10}
    share = torch.cat([torch.full((n,), at) for at, n in counts.items()])
    x = (paper[..., None] + share * (deepest - paper)[..., None]).round()
    ink = x[..., 450]
    x = x[..., torch.randperm(600, generator=generator)].unflatten(2, (20, 30))
    assert torch.equal(palette_of(x), torch.stack([paper, ink, deepest], 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31))
def test_an_even_ink_is_not_taken_for_uneven_paper(seed):
    """The ink has the commonest level of all, because the paper has many."""
    generator = torch.Generator().manual_seed(seed)
    paper = torch.randint(190, 250, (1, 1, 20, 30), generator=generator).float()
    is_ink = torch.rand(1, 1, 20, 30, generator=generator) < 0.2
    found = palette_of(torch.where(is_ink, 40.0, paper))[0, :, 0].tolist()
    assert found[0] >= 180 and found[1:] == [40, 40]


@pytest.mark.parametrize("dark", [True, False])
def test_ink_is_on_the_side_of_the_deepest_colour(dark):
    x = torch.tensor([190.0] * 300 + [250.0] * 150 + [40.0] * 100 + [30.0] * 10).view(1, 1, 20, 28)
    found = palette_of(x if dark else 255 - x)[0, :, 0].tolist()
    assert found == ([190, 40, 40] if dark else [65, 215, 215])


def test_the_palette_of_one_colour_is_that_colour():
    x = torch.full((2, 3, 4, 5), 77.0)
    assert torch.equal(palette_of(x), torch.full((2, 3, 3), 77.0))
    net = network("logistic")
    net.start_palette_at(x / 255)
    assert all(out.bias.isfinite().all() for out in net.palette.out)


@pytest.mark.parametrize("channels", [1, 3])
def test_every_pixel_sees_the_palette(channels):
    p, x = distribution("logistic", channels, trained=True), images("logistic", 2, channels, 5, 6)
    palette = p.palette(x)
    for colour in range(3):
        other = palette.clone()
        other[:, colour] = 255 - other[:, colour]
        differs = channel_scores(p, x, palette) != channel_scores(p, x, other)
        assert differs.double().mean() > 0.9  # a unit can saturate


def test_draws_are_a_mixture_over_palettes():
    """Both pixels of 1x2 images: the second given drawn palettes and first pixels."""
    n, m = 10_000, 200
    torch.manual_seed(0)
    net, levels = NarrowNetwork(1, (1, 1), 6, "logistic").double(), torch.arange(256) / 255
    p = net(torch.randn(1, net.features, 1, 2, dtype=torch.float64))
    palettes = torch.tensor([220.0, 120, 20]) + torch.linspace(-20, 20, 64)[:, None]
    net.palette.start_at(palettes[:, :, None])
    for out in net.palette.out:
        torch.nn.init.normal_(out.weight, std=0.3)  # so that palettes depend on z
    generator = torch.Generator().manual_seed(0)
    drawn = net(p.parameters.expand(n, -1, -1, -1)).sample(generator).flatten(1)

    noise = torch.rand(3, 2, m, dtype=torch.float64, generator=generator)
    palettes = net.palette.sample(p.parameters.expand(m, -1, -1, -1), noise)
    every = net(p.parameters.expand(256 * m, -1, -1, -1))
    x = torch.zeros(m, 256, 2, dtype=torch.float64)

    def probabilities(pixel):
        x[:, :, pixel] = levels
        scores = channel_scores(every, x.view(-1, 1, 1, 2), palettes.repeat_interleave(256, 0))
        return scores[:, 0, pixel, 0].view(m, 256).exp()

    first = probabilities(0)
    x[:, :, 0] = first.multinomial(1, generator=generator) / 255
    for pixel, probability in ((0, first), (1, probabilities(1))):
        share = probability.view(m, 4, 64).sum(2)  # four classes of levels
        found = (255 * drawn[:, pixel]).round().long().div(64, rounding_mode="floor")
        found = found.bincount(minlength=4) / n
        variance = share.var(0) / m + found * (1 - found) / n
        assert ((found - share.mean(0)).abs() < 4.5 * variance.sqrt() + 1e-4).all()


def test_the_estimate_has_all_of_the_palette(monkeypatch):
    """It is that of the image, not of the window with replaced values, and it is learned."""
    for name in ("KEEP_EDGE", "KEEP_FLAT"):
        monkeypatch.setattr(f"hvae.context.{name}", 0.0)
    p, x = distribution(trained=True), images("logistic", 2, 3, 5, 6)
    p.network.window_noise = 1.0
    estimate = p.estimate(x)
    assert torch.equal(estimate, p.log_prob_of_palette(p.palette(x)))
    estimate.sum().backward()
    assert all(out.weight.grad.any() for out in p.network.palette.out)


def test_a_model_starts_at_the_palettes_of_its_images():
    torch.manual_seed(0)
    model = HVAE([("conv", 8, 2)], [], (6, 8), text_length=None)
    x = torch.cat([torch.full((8, 3, 6, 8), 0.9), torch.full((1, 3, 6, 8), torch.nan)])
    model.set_output_level(x)
    f = torch.zeros(500, ContextNetwork.features, 1, 1)
    drawn = model.context.palette.sample(f, torch.rand(9, 2, 500))
    assert ((drawn - 0.9 * 255).abs() < 10).float().mean() > 0.99


@pytest.mark.parametrize("trained", [False, True])
def test_frequencies_of_palettes_are_their_probabilities(trained):
    n = 20_000
    net = network("logistic", 1, trained=trained).palette
    f = torch.randn(1, ContextNetwork.features, 2, 2, dtype=torch.float64).expand(n, -1, -1, -1)
    noise = torch.rand(3, 2, n, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = net.sample(f, noise)[:, :2, 0].long() // 64  # four classes of the first two levels
    frequency = (4 * drawn[:, 0] + drawn[:, 1]).bincount(minlength=16) / n
    levels, pooled = torch.arange(256).double(), pool(f[:256])
    paper = net.mixture(levels[:, None][:, :0], pooled).log_prob(levels)
    ink = torch.stack(
        [net.mixture(levels[:, None], pooled).log_prob(x.expand(256)) for x in levels]
    )
    expected = (paper[:, None] + ink.T).exp().view(4, 64, 4, 64).sum((1, 3)).flatten()
    assert expected.sum().item() == pytest.approx(1, abs=1e-7)
    assert ((frequency - expected).abs() < 4.5 * (expected / n).sqrt() + 1e-4).all()


def test_palettes_start_at_those_of_the_data():
    """An untrained network draws colours like those of the images that it starts at."""
    torch.manual_seed(0)
    paper, ink = torch.randint(230, 250, (64, 3, 1, 1)), torch.randint(40, 60, (64, 3, 1, 1))
    x = torch.where(torch.arange(30).view(1, 1, 5, 6) < 6, ink, paper) / 255
    net = network("logistic")
    net.start_palette_at(x)
    f = torch.zeros(1000, net.features, 1, 1, dtype=torch.float64)
    drawn = net.palette.sample(f, torch.rand(9, 2, 1000).double())
    near = ((drawn[:, 0] - 240).abs() < 20) & ((drawn[:, 1:] - 50).abs() < 20).all(1)
    assert near.double().mean() > 0.98
    trained = network("logistic", trained=True)
    weights = {k: w.clone() for k, w in trained.state_dict().items()}
    trained.start_palette_at(x)
    assert all(torch.equal(w, weights[k]) for k, w in trained.state_dict().items())


def test_paper_that_all_images_share_is_known_at_once():
    """Also to a network that was trained on other papers; what it knows of inks stays."""
    net = network("logistic", trained=True)
    before = copy.deepcopy(net.palette.out)
    paper = torch.tensor([238.0, 238, 204]).view(1, 3, 1, 1)
    ink = torch.randint(40, 60, (64, 3, 1, 1))
    net.start_palette_at(torch.where(torch.arange(30).view(1, 1, 5, 6) < 6, ink, paper) / 255)
    f = torch.randn(1000, net.features, 1, 1, dtype=torch.float64)
    drawn = net.palette.sample(f, torch.rand(9, 2, 1000).double())[:, 0]
    assert ((drawn - paper.view(1, 3)).abs() <= 3).all(1).double().mean() > 0.98
    for out, old in zip(net.palette.out[3:], before[3:], strict=True):
        assert torch.equal(out.weight, old.weight) and torch.equal(out.bias, old.bias)


@pytest.mark.parametrize("likelihood, channels", KINDS)
def test_no_pixel_depends_on_a_later_pixel_or_channel(likelihood, channels):
    """Every pixel and channel is changed in turn: what comes before it keeps its probability.

    The palette, which is drawn before the pixels, stays.
    """
    h, w = 4, 5
    p = distribution(likelihood, channels, (h, w), 1, trained=True)
    x = images(likelihood, 1, channels, h, w)
    palette = p.palette(x)
    before = channel_scores(p, x)
    for i, j, c in product(range(h), range(w), range(channels)):
        changed = x.clone()
        changed[0, c, i, j] = 1 - changed[0, c, i, j]
        now = channel_scores(p, changed, palette).flatten()
        first = (i * w + j) * channels + c
        assert torch.equal(now[:first], before.flatten()[:first])
        assert now[first] != before.flatten()[first]


@pytest.mark.parametrize("context", [(1, 1), (2, 3), (3, 2)])
def test_a_pixel_sees_its_window_and_nothing_else(context):
    rows_up, columns = context
    h, w, (i, j) = 7, 9, (5, 4)
    p = distribution("bernoulli", 1, (h, w), 1, context=context, trained=True)
    x = images("bernoulli", 1, 1, h, w)
    score = channel_scores(p, x)[0, i, j, 0]
    for a, b in product(range(h), range(w)):
        if (a, b) == (i, j):
            continue
        changed = x.clone()
        changed[0, 0, a, b] = 1 - changed[0, 0, a, b]
        inside = i - rows_up <= a < i and abs(b - j) <= columns or a == i and 0 < j - b <= columns
        assert (channel_scores(p, changed)[0, i, j, 0] != score) == inside


def raster_order(h, w, columns):
    return [(i, j, 1) for i, j in product(range(h), range(w))]


@pytest.mark.parametrize("likelihood, channels", KINDS)
@settings(max_examples=10, deadline=None)
@given(
    st.integers(1, 7), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 9)
)
def test_slanted_order_draws_the_image_of_raster_order(likelihood, channels, h, w, r, c, seed):
    p = distribution(likelihood, channels, (h, w), context=(r, c), trained=True)
    draw = lambda: p.sample(torch.Generator().manual_seed(seed))
    slanted = draw()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hvae.context.fronts", raster_order)
        assert torch.equal(draw(), slanted)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 7), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3))
def test_windows_of_a_front_are_those_that_are_scored(h, w, rows, columns):
    x = images("bernoulli", 2, 1, h, w)
    p = distribution("bernoulli", 1, (h, w), 2, context=(rows, columns))
    canvas = SlantedCanvas(x.shape, (rows, columns), x)
    for i, j, n in fronts(h, w, columns):
        row, column = canvas.positions(i, j, n)
        pixels = ((w * row + column)[:, None] + h * w * torch.arange(2)).flatten()
        scored = p.window(p.canvas(x), p.palette(x), pixels)
        assert torch.equal(torch.cat(canvas.window(i, j, n)).flatten(2), scored)
        canvas.write(i, j, x[:, :, row, column].permute(1, 2, 0))
    assert torch.equal(canvas.maps(), x)


@pytest.mark.parametrize("likelihood, channels", KINDS)
@pytest.mark.parametrize("trained", [False, True])
def test_draws_are_images(likelihood, channels, trained):
    p = distribution(likelihood, channels, batch=8, trained=trained)
    x = p.sample()
    levels = 1 if likelihood == "bernoulli" else 255
    assert x.shape == (8, channels, 5, 6) and x.min() >= 0 and x.max() <= 1
    assert torch.allclose((levels * x).round(), levels * x) and p.log_prob(x).isfinite().all()


def test_frequencies_of_binary_draws_are_their_probabilities():
    n, size = 40_000, (2, 2)
    p = distribution("bernoulli", 1, size, 1, context=(1, 1), trained=True)
    many = p.network(p.parameters.expand(n, -1, -1, -1))
    draws = many.sample(torch.Generator().manual_seed(0)).flatten(1)
    codes = (draws * torch.tensor([8, 4, 2, 1])).sum(1).long()
    every = torch.tensor(list(product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    probability = (
        p.network(p.parameters.expand(16, -1, -1, -1)).log_prob(every.view(16, 1, 2, 2)).exp()
    )
    error = (codes.bincount(minlength=16) / n - probability).abs()
    assert (error < 4.5 * (probability * (1 - probability) / n).sqrt() + 1e-9).all()


@pytest.mark.parametrize("trained", [False, True])
def test_frequencies_of_8_bit_draws_are_their_probabilities(trained):
    """Red of the first pixel, where the palette is always the same."""
    n = 20_000
    p = distribution("logistic", 3, (1, 2), 1, trained=trained)
    for out in p.network.palette.out:
        torch.nn.init.zeros_(out.weight)
        out.bias.data[8:] = torch.tensor([100 / 128 - 1, -9.0]).repeat_interleave(8)
    many = p.network(p.parameters.expand(n, -1, -1, -1))
    red = 255 * many.sample(torch.Generator().manual_seed(0))[:, 0, 0, 0]
    x = torch.full((256, 3, 1, 2), 100 / 255, dtype=torch.float64)
    x[:, 0, 0, 0] = torch.arange(256) / 255
    every = p.network(p.parameters.expand(256, -1, -1, -1))
    palette = torch.full((256, 3, 3), 100.0, dtype=torch.float64)
    probability = channel_scores(every, x, palette)[:, 0, 0, 0].exp()
    counts = red.round().long().bincount(minlength=256)
    classes = torch.arange(256) // 16  # sixteen values each, so that all are frequent
    expected = torch.zeros(16, dtype=torch.float64).index_add(0, classes, probability)
    found = torch.zeros(16, dtype=torch.float64).index_add(0, classes, counts.double()) / n
    assert expected.sum().item() == pytest.approx(1, abs=1e-6)
    assert ((found - expected).abs() < 4.5 * (expected * (1 - expected) / n).sqrt() + 1e-4).all()


def test_estimate_is_unbiased(monkeypatch):
    for name, share in (("KEEP_EDGE", 0.05), ("KEEP_FLAT", 0.01)):  # of so small an image, too
        monkeypatch.setattr(f"hvae.context.{name}", share * 6 * 8 / 9600)
    p = distribution(size=(6, 8), batch=1, trained=True)
    p.network.window_noise = 0.0
    flat = torch.full((1, 3, 6, 8), 0.5, dtype=torch.float64)
    x = torch.cat([flat[..., :5], images("logistic", 1, 3, 6, 3)], 3)
    x = (255 * x).round() / 255
    assert 0 < is_flat(x).float().mean() < 1
    with torch.no_grad():
        many = p.network(p.parameters.expand(4000, -1, -1, -1))
        estimates = many.estimate(x.expand(4000, -1, -1, -1))
    error = (estimates.mean() - p.log_prob(x)).abs()
    assert error < 4.5 * estimates.std() / 4000**0.5


@pytest.mark.parametrize("likelihood, channels", KINDS)
def test_model_with_a_context_trains_and_draws(likelihood, channels, tmp_path):
    """A trained tiny model: held-out nats fall, draws are images, the file draws the same."""
    torch.manual_seed(0)
    x = images(likelihood, 64, channels, 6, 8).float()
    x[..., 4:] = x[..., :4]  # what the window can learn
    data = torch.utils.data.TensorDataset(x, torch.zeros(64, 0).long())
    model = HVAE(
        [("conv", 8, 2)],
        [[("res", 8)]],
        (6, 8),
        channels,
        likelihood=likelihood,
        context=(1, 4),
        mixtures=2,
        text_length=None,
    )
    few = dict(steps=40, batch_size=16, lr=1e-2, warmup=5, eval_every=20, log_every=20, workers=0)
    plain = dict(beta_start=1.0, closed_share=0.0, free_nats=0.0)
    model, history = train(model, data, out=tmp_path, device="cpu", **few, **plain)
    assert history[-1]["val_neg_elbo"] < history[0]["val_neg_elbo"]
    draw = lambda m: m.sample(4, generator=torch.Generator().manual_seed(3))
    drawn = draw(model)
    assert drawn.shape == (4, channels, 6, 8) and drawn.min() >= 0 and drawn.max() <= 1
    assert torch.equal(draw(HVAE.load(tmp_path / "hvae.pt")), drawn)


def test_context_on_a_checkpoint_keeps_its_latents():
    torch.manual_seed(0)
    outer = [("conv", 8, 2), ("res", 8)]
    config = dict(outer_config=outer, inner_config=[[("res", 8)]], input_size=(6, 8))
    plain = dict(likelihood="gaussian", context=None, prior_context=None)
    model = HVAE(**config, **plain, text_length=None).eval()
    changed, _ = adapted(model, context=(2, 2), mixtures=3, prior_context=(1, 1))
    changed.eval()
    x = images("logistic", 3, 3, 6, 8).float()
    draw = lambda m: m.encode(x, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(draw(model), draw(changed), strict=True))
    z = draw(model)
    torch.testing.assert_close(changed.decode(z).image, model.decode(z).image)
    changed.freeze_latents()
    changed(x).elbo.sum().backward()
    trained = {name.split(".")[0] for name, p in changed.named_parameters() if p.grad is not None}
    assert trained == {"generation", "to_image", "context"}
    assert changed.generation[1].layers[0].conv1.weight.grad is None


@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
@pytest.mark.parametrize("shape", [(1, 3, 6, 8), (3, 3, 6, 8), (2, 1, 6, 8), (2, 3, 8, 6)])
def test_a_distribution_scores_images_of_its_own_number_and_size(likelihood, shape):
    p_x = ContextNetwork(3, (2, 2), 3, likelihood)(torch.randn(2, 32, 6, 8))
    with pytest.raises(ValueError, match="expected images"):
        p_x.log_prob(torch.ones(shape))


def test_grey_pixels_have_no_binary_likelihood():
    p_x = ContextNetwork(1, (2, 2), 1, "bernoulli")(torch.randn(2, 32, 6, 8))
    with pytest.raises(ValueError, match="0 or 1"):
        p_x.log_prob(torch.full((2, 1, 6, 8), 0.5))


@pytest.mark.parametrize("context", [(0, 1), (1,), 3, (1, 1.5), "33", (True, 1)])
def test_bad_contexts_are_named(context):
    with pytest.raises(ValueError, match="^context: "):
        HVAE(likelihood="logistic", context=context)


def test_a_density_has_no_context():
    with pytest.raises(ValueError, match="^context: "):
        HVAE(likelihood="gaussian", context=(2, 2))


def test_command_line_adds_a_context_to_a_checkpoint(tmp_path, capsys, monkeypatch):
    for pictures in ("plot_history", "save_figures"):  # they take longer than the rest
        monkeypatch.setattr(trainer, pictures, lambda *_: None)
    torch.manual_seed(0)
    outer = [("conv", 8, 2), ("res", 8)]
    size, texts = (16, 32), dict(text_length=2, charset="AB")
    plain = dict(likelihood="gaussian", context=None, prior_context=None)
    ladder = HVAE(outer, [[("res", 8)]], size, **texts, **plain)
    ladder.save(tmp_path / "ladder.pt")
    data = [
        "--size",
        "16",
        "32",
        "--length",
        "2",
        "--charset",
        "AB",
        "--images",
        "16",
        "--workers",
        "0",
        "--device",
        "cpu",
    ]
    short = ["--steps", "2", "--batch-size", "4", "--eval-every", "2"]
    config, out = ["--context", "3", "3"], ["--out", str(tmp_path / "run")]
    config += ["--prior-context", "3", "3"]
    init = ["--init", str(tmp_path / "ladder.pt"), "--frozen-share", "1", "--pixel-weight", "1"]
    trainer.main([*config, *init, *data, *short, *out])
    model = HVAE.load(tmp_path / "run" / "hvae.pt")
    assert model.config["context"] == [3, 3] and model.config["mixtures"] == 6
    assert model.config["prior_context"] == [3, 3]
    kept = {k: v for k, v in ladder.state_dict().items() if k.startswith(("levels.", "inference."))}
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in kept.items())
    with pytest.raises(SystemExit):
        untrained = ["--frozen-share", "1", "--out", str(tmp_path / "other")]
        trainer.main([*config, *untrained, *data, *short])
    assert "--init" in capsys.readouterr().err


@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
def test_the_guess_teaches_the_latents_if_pixels_count_less(likelihood):
    """At weight 0 the loss is that of the guess; at 1 it is the -ELBO, without the guess."""
    torch.manual_seed(0)
    outer = [("conv", 8, 2), ("res", 8)]
    model = HVAE(outer, [], (6, 8), text_length=None, likelihood=likelihood, context=(2, 2))
    x = images(likelihood, 3, 3, 6, 8).float()
    terms = model.train()(x)
    loss = lambda weight: objective(terms, 1.0, torch.zeros(1), torch.zeros(3).long(), weight)
    kl = terms.kl.sum(1).mean()
    torch.testing.assert_close(loss(0.0), terms.guess.mean() + kl)
    torch.testing.assert_close(loss(1.0), terms.reconstruction.mean() + kl)
    torch.testing.assert_close(loss(0.3), 0.7 * loss(0.0) + 0.3 * loss(1.0))
    assert model.eval()(x).guess is None


@pytest.mark.parametrize("likelihood", ["logistic", "bernoulli"])
def test_the_best_guess_is_the_image(likelihood):
    x = images(likelihood, 2, 3, 6, 8)
    guess = 2 * x - 1 if likelihood == "logistic" else 20 * (2 * x - 1)
    f = torch.randn(2, 32, 6, 8, dtype=torch.float64)
    best = torch.cat([guess, f[:, 3:]], 1)
    net = network(likelihood)
    assert (net(best).guess.log_prob(x) > net(f).guess.log_prob(x)).all()


def test_the_weight_of_binary_pixels_rises_to_one():
    model = HVAE(**CONFIGS["mnist-hvae"])
    hp = Hyperparameters(steps=1000)
    hp.fit_to(model)
    weights = [hp.pixel_weight_at(step) for step in (0, 300, 600, 999)]
    assert weights == pytest.approx([0, 0.5, 1, 1])
    hp = Hyperparameters(steps=1000)
    hp.fit_to(HVAE())
    assert {hp.pixel_weight_at(step) for step in range(0, 1000, 99)} == {0.05}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1.5])
def test_a_broken_pixel_breaks_only_its_image(value):
    p, x = distribution("logistic"), images("logistic", 2, 3, 5, 6)
    expected = p.log_prob(x)
    x[0, :, 0, 0] = value
    torch.testing.assert_close(p.log_prob(x)[1], expected[1])
    assert p.log_prob(x)[0].isfinite() == (value == 1.5)
