"""MNIST as data, the flat VAE of its named config, and the bound against exact likelihoods."""

import math
import struct

import pytest
import torch
from test_trainer import read_csv
from torch.utils.data import TensorDataset

import generate
import trainer
from dataset import MNIST
from generate import held_out_images, plot_manifold, plot_plane
from hvae.distributions import binarised
from hvae.evaluation import evaluate, importance_bounds
from model import CONFIGS, HVAE
from trainer import hold_out, train


def write_idx(path, array):
    """A uint8 tensor in the format of the MNIST files."""
    header = struct.pack(f">HBB{array.dim()}I", 0, 8, array.dim(), *array.shape)
    path.write_bytes(header + array.to(torch.uint8).numpy().tobytes())


@pytest.fixture
def digits(tmp_path):
    """A folder with 240 training and 30 test images: the digit d is a bar in column 2 d."""
    raw = tmp_path / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, n in (("train", 240), ("t10k", 30)):
        labels = torch.arange(n) % 10
        images = torch.zeros(n, 28, 28)
        images[torch.arange(n), :, 2 * labels + 3] = 250
        images[:, 0, 0] = torch.arange(n)  # tells them apart
        write_idx(raw / f"{name}-images-idx3-ubyte", images)
        write_idx(raw / f"{name}-labels-idx1-ubyte", labels)
    return tmp_path / "data"


def flat_vae():
    torch.manual_seed(0)
    return HVAE(**CONFIGS["mnist-vae"]).eval()


def one_latent(inference="top-down", channels=1):
    """A dense model of 4x4 images."""
    torch.manual_seed(0)
    images = dict(input_size=(4, 4), input_channels=1, likelihood="bernoulli", context=None)
    latent = dict(latent_channels=channels, inference=inference)
    return HVAE([("dense", 8)], [], **images, **latent, text_length=None).eval()


# ---------------------------------------------------------------------------- data


def test_items(digits):
    image, label = MNIST("train", digits)[13]
    assert image.shape == (1, 28, 28) and image.dtype == torch.float32 and label.tolist() == [3]
    assert image[0, 5, 9] == 250 / 255 and image[0, 0, 0] == 13 / 255


def test_splits(digits):
    sets = {split: MNIST(split, digits) for split in ("train", "val", "test")}
    assert [len(part) for part in sets.values()] == [220, 20, 30]
    first = {split: int(255 * part[0][0][0, 0, 0]) for split, part in sets.items()}
    assert first == {"train": 0, "val": 220, "test": 0}


@pytest.mark.parametrize(
    "most, expected", [(None, list(range(30))), (99, list(range(30))), (3, [0, 10, 20])]
)
def test_some_of_the_test_set_are_spread_over_it(most, expected, digits):
    test_set = held_out_images(flat_vae(), "mnist", digits, limit=most)
    assert [int(255 * image[0, 0, 0]) for image, _ in test_set] == expected


def test_digits_have_no_fonts(digits):
    with pytest.raises(ValueError, match="fonts: they have no effect on MNIST"):
        held_out_images(flat_vae(), "mnist", digits, fonts=["DroidSansMono.ttf"])


def test_held_out_digits_are_the_split_val(digits):
    training, held_out = hold_out(MNIST("train", digits, text_length=1), seed=0, limit=7)
    assert len(training) == 220 and len(held_out) == 7
    assert torch.equal(held_out[0][0], MNIST("val", digits)[0][0]) and held_out.text_length == 1


def test_real_mnist(mnist_root):
    sets = [MNIST(split, mnist_root) for split in ("train", "val", "test")]
    assert list(map(len, sets)) == [55_000, 5_000, 10_000]
    image, label = sets[2][0]
    assert label.item() == 7 and 0.05 < image.mean() < 0.2


@pytest.fixture
def no_network(monkeypatch):
    def download(*_, **__):
        raise OSError("unreachable")

    monkeypatch.setattr("torchvision.datasets.mnist.download_and_extract_archive", download)


def test_missing_digits(tmp_path, no_network):
    with pytest.raises(OSError, match="MNIST/raw, or damaged, and could not be downloaded"):
        MNIST("train", tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage" * 99, None])
def test_damaged_digits(content, digits, no_network):
    file = digits / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:1000] if content is None else content)
    with pytest.raises(OSError, match="MNIST/raw, or damaged"):
        MNIST("train", digits)


@pytest.mark.parametrize(
    "arguments, message",
    [({"split": "dev"}, "split"), ({"text_length": 2}, "text_length"), ({"root": ""}, "root")],
)
def test_bad_arguments(arguments, message, digits):
    with pytest.raises(ValueError, match=message):
        MNIST(**{"root": digits, **arguments})


def test_binarised_images_are_drawn_anew():
    """A model that is sure of white pays only for black draws: its loss is their share."""
    data = TensorDataset(torch.full((200, 1, 4, 4), 0.25), torch.zeros(200, 0))
    model = one_latent()
    torch.nn.init.zeros_(model.to_image.weight)
    torch.nn.init.constant_(model.to_image.bias, 50.0)
    black = lambda **settings: evaluate(model, data, **settings)["reconstruction"] / 50 / 16
    drawn = [black(binarise=True, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert all(abs(share - 0.75) < 0.03 for share in drawn)
    assert black() == pytest.approx(0.75)
    model.provenance["binarised"] = True  # then that is what evaluate() does
    assert black() == drawn[0]


def test_training_binarises(tmp_path, monkeypatch):
    seen, forward = [], HVAE.forward
    record = lambda self, x, *rest, **more: seen.append(x) or forward(self, x, *rest, **more)
    monkeypatch.setattr(HVAE, "forward", record)
    data = TensorDataset(torch.full((8, 1, 4, 4), 0.5), torch.zeros(8, 0))
    settings = dict(steps=3, batch_size=4, workers=0, val_dataset=data, out=tmp_path)
    trained, _ = train(one_latent(), data, binarise=True, **settings)
    assert seen and all(set(x.unique().tolist()) == {0.0, 1.0} for x in seen)
    assert not torch.equal(seen[0], seen[1])
    assert trained.provenance["binarised"] is True


# ---------------------------------------------------------------------------- the bound


def log_likelihood_by_quadrature(model, x):
    """log p(x) for a latent that is one number, by the trapezoidal rule, float64 (B,)."""
    z = torch.linspace(-9, 9, 3001, dtype=torch.float64)
    with torch.no_grad():
        logits = model.decode([z[:, None].float()]).parameters.double()  # (3001, 1, H, W)
    images = x[:, None].double().expand(-1, len(z), -1, -1, -1)
    nats = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.expand_as(images), images, reduction="none"
    )
    log_p_z = -0.5 * (z.square() + math.log(2 * math.pi))
    return (log_p_z - nats.flatten(2).sum(2)).logsumexp(1) + math.log(18 / 3000)


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_bound_tightens_to_the_exact_likelihood(inference):
    model = one_latent(inference)
    torch.nn.init.normal_(model.to_image.weight, std=1.0)
    torch.nn.init.normal_(model.levels[0].from_z.weight, std=2.0)
    model.levels[0].q.out.bias.data[1] = 1.0  # a wide posterior, whose draws reach everywhere
    x = torch.rand(6, 1, 4, 4).bernoulli()
    exact = log_likelihood_by_quadrature(model, x).mean().item()
    metrics = evaluate(model, TensorDataset(x, torch.zeros(6, 0)), 10_000)
    bounds = metrics["bounds"]
    assert list(bounds) == [1, 10, 100, 1000, 10_000]
    assert bounds[10_000] == metrics["log_likelihood"]
    assert bounds[1] == pytest.approx(metrics["elbo"], abs=0.1)
    assert bounds[1] + 0.02 < bounds[10] < bounds[1000] < exact + 0.02
    assert bounds[10_000] == pytest.approx(exact, abs=0.02)


def test_bounds_of_groups():
    w = torch.randn(3, 25, dtype=torch.float64)
    bounds = importance_bounds(w)
    assert list(bounds) == [1, 10, 25]
    log_mean = lambda part: part.exp().mean(1).log()
    torch.testing.assert_close(bounds[1], w.mean(1))
    torch.testing.assert_close(bounds[25], log_mean(w))
    torch.testing.assert_close(bounds[10], (log_mean(w[:, :10]) + log_mean(w[:, 10:20])) / 2)


# ---------------------------------------------------------------------------- the flat VAE


def test_layers_of_the_flat_vae():
    model = flat_vae()
    shapes = lambda block: [(p.kind, p.c_in, p.c_out, p.size_out, p.arg) for p in block.plan]
    assert shapes(model.inference[0]) == [
        ("conv", 1, 32, (28, 28), 1),
        ("conv", 32, 32, (28, 28), 1),
        ("conv", 32, 64, (14, 14), 2),
        ("dense", 64, 128, (), 1),
    ]
    assert shapes(model.generation[0]) == [
        ("undense", 128, 64, (14, 14), 1),
        ("convt", 64, 32, (28, 28), 2),
        ("convt", 32, 32, (28, 28), 1),
    ]
    (level,) = model.levels
    assert level.shape == (2,) and level.p is None
    assert (level.from_z.in_features, level.from_z.out_features) == (2, 128)
    last = model.to_image
    assert isinstance(last, torch.nn.ConvTranspose2d)
    assert (last.in_channels, last.out_channels) == (32, 1)
    assert model.sample(2).shape == (2, 1, 28, 28)


@pytest.mark.parametrize("config", [name for name in CONFIGS if name.startswith("mnist")])
def test_named_configs(config):
    model = HVAE(**CONFIGS[config])
    assert sum(parameter.numel() for parameter in model.parameters()) <= 5e6
    assert model(torch.rand(2, 1, 28, 28).bernoulli()).elbo.isfinite().all()
    assert model.config["likelihood"] == "bernoulli" and model.text_length is None


@pytest.mark.parametrize("binary", [False, True])
def test_plane_shows_the_means(binary, digits):
    model = flat_vae()
    model.provenance["binarised"] = binary
    test_set = held_out_images(model, "mnist", digits)
    points = plot_plane(model, test_set).axes[0].collections[0]
    x = torch.stack([image for image, _ in test_set])
    x = binarised(x, torch.Generator().manual_seed(0)) if binary else x
    means = model.infer(x)[1][0].q.mu.detach()
    shown = torch.as_tensor(points.get_offsets().data).float()
    torch.testing.assert_close(shown, means, atol=1e-4, rtol=1e-3)
    assert points.get_array().tolist() == [label.item() for _, label in test_set]


def test_plane_of_no_images():
    with pytest.raises(ValueError, match="empty"):
        plot_plane(flat_vae(), [])


def test_manifold_is_the_grid_of_quantiles():
    model = flat_vae()
    torch.nn.init.normal_(model.levels[0].from_z.weight, std=3.0)
    shown = plot_manifold(model, 3).axes[0].get_images()[0].get_array().filled()  # (84, 84, 3)
    q = torch.distributions.Normal(0, 1).icdf(torch.tensor([1, 3, 5]) / 6)
    for row in range(3):
        for column in range(3):
            image = model.decode([torch.tensor([[q[column], q[2 - row]]])]).image[0, 0].detach()
            tile = shown[28 * row : 28 * row + 28, 28 * column : 28 * column + 28, 0]
            torch.testing.assert_close(torch.as_tensor(tile), image, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("plot", [lambda model: plot_plane(model, []), plot_manifold])
def test_plane_needs_a_plane(plot):
    with pytest.raises(ValueError, match="one level of two numbers"):
        plot(one_latent(channels=3))


# ---------------------------------------------------------------------------- command lines


@pytest.fixture
def flat_options(digits, tmp_path):
    """The options that train the flat VAE for a moment."""
    run = ["--steps", "2", "--batch-size", "8", "--workers", "0", "--device", "cpu"]
    data = ["--data", "mnist", "--root", str(digits), "--config", "mnist-vae"]
    return [*data, *run, "--out", str(tmp_path / "out")]


def test_flat_vae_in_one_command(flat_options, tmp_path, capsys):
    out, figures = tmp_path / "out", tmp_path / "figures"
    trainer.main(flat_options)
    pictures = {"plane.png", "manifold.png", "reconstructions.png", "samples.png"}
    assert {"hvae.pt", *pictures} <= {p.name for p in out.iterdir()}
    model = HVAE.load(out / "hvae.pt")
    assert model.config == flat_vae().config and model.provenance["data"]["data"] == "MNIST"
    capsys.readouterr()
    data, checkpoint = flat_options[:4], str(out / "hvae.pt")
    trainer.main([*data, "--evaluate", checkpoint, "--importance-samples", "10"])
    assert "30 images" in capsys.readouterr().out
    generate.main([*data, "--checkpoint", checkpoint, "--figures", str(figures)])
    assert (figures / "plane.png").is_file()


@pytest.mark.parametrize(
    "options, expected",
    [
        ("", ("captcha", 10_000, False, None)),
        ("--data mnist", ("mnist-hvae", 40_000, True, 0.0)),
        ("--data mnist --config mnist-vae --steps 5", ("mnist-vae", 5, False, 0.0)),
        ("--data mnist --config captcha", ("captcha", 10_000, False, None)),
    ],
)
def test_defaults_of_the_command_line(options, expected):
    _, args, _ = trainer.parse(options.split())
    assert (args.config, args.steps, args.binarise, args.closed_share) == expected


def test_the_digits_configs_train_on_digits():
    """Unless other images are named."""
    data_of = lambda options: trainer.parse(options.split())[1].data
    assert data_of("--config mnist-hvae") == data_of("--config mnist-vae") == "mnist"
    assert data_of("--config mnist-vae --data captcha") == "captcha"
    assert data_of("--config mnist-vae --folder in") is None and data_of("") is None


def test_digits_as_texts(flat_options, tmp_path):
    trainer.main([*flat_options, "--length", "1", "--steps", "1"])
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.text_length, model.charset) == (1, "0123456789")
    assert model.sample(1, "7").shape == (1, 1, 28, 28)
    assert read_csv(tmp_path / "out" / "metrics.csv")[-1]["step"] == 1


def test_missing_digits_end_in_one_line(tmp_path, capsys, no_network):
    with pytest.raises(SystemExit) as stop:
        trainer.main(["--data", "mnist", "--root", str(tmp_path)])
    assert stop.value.code == 2 and "MNIST is not in" in capsys.readouterr().err.splitlines()[-1]
