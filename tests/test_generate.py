"""Samples and figures: what the command line and the notebooks' functions give a user, on tiny untrained models."""

import math
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.utils import make_grid
from tqdm import tqdm

import generate
from dataset import CaptchaFolder, to_tensor
from generate import (Aggregate, fit_aggregate, plot_interpolation, plot_levels, plot_prior_vs_aggregate,
                      plot_reconstructions, plot_samples, sample_batches, sample_sheet, save_individual, slerp)
from model import HVAE, Normal, kl_divergence

ROOT = Path(__file__).resolve().parent.parent
CHARSET = "ABC"
H, W = 20, 40


def tiny(inference="top-down", channels=3, text_length=2, inner=([("res", 4)], [("dense", 5)]), **arguments):
    """A seeded model of 20x40 images whose weights are large enough for every latent to matter."""
    torch.manual_seed(0)
    config = dict(outer_config=[("conv", 4, 2), ("conv", 4, 2)], inner_config=list(inner), input_size=(H, W),
                  input_channels=channels, latent_channels=2, inference=inference, likelihood="bernoulli",
                  text_length=text_length, charset=CHARSET)
    model = HVAE(**{**config, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3
    return model


KINDS = {
    "conditional": dict(),
    "conditional, bottom-up, grey": dict(inference="bottom-up", channels=1, inner=[[("conv", 4, 2)]]),
    "unconditional, one level, grey": dict(text_length=None, inner=[], channels=1),
    "unconditional, bottom-up": dict(text_length=None, inference="bottom-up"),
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "conditional.pt"
    tiny().save(path)
    return path


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "unconditional.pt"
    tiny(text_length=None).save(path)
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty working directory for every test."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def images_for(model, n):
    """A data set of n random images with texts the model knows."""
    generator = torch.Generator().manual_seed(5)
    y = model.draw_text(n, generator=generator)
    labels = torch.zeros(n, 0, dtype=torch.long) if y is None else y
    return list(zip(torch.rand(n, *model.input_shape, generator=generator), labels))


def batch_of(model, items):
    x, y = (torch.stack(column) for column in zip(*items))
    return x, None if model.text_length is None else y


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def read_image(path):
    """A file's image as RGB, uint8 (3, H, W)."""
    with Image.open(path) as image:
        return to_tensor(image.convert("RGB"))


def sheet(*arguments):
    """The sheet (3, H', W') that the command line writes, uint8."""
    generate.main([*map(str, arguments), "--out", "sheet.png"])
    return read_image("sheet.png")


def tiles(image, n):
    """The n images on a sheet of 16 columns, (n, 3, H, W)."""
    corner = lambda i: (2 + i // 16 * (H + 2), 2 + i % 16 * (W + 2))
    return torch.stack([image[:, top : top + H, left : left + W] for top, left in map(corner, range(n))])


def as_saved(images):
    """Images in [0, 1] as an RGB file holds them."""
    return (images * 255 + 0.5).clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


def pictures(figure, rows):
    """What the axes of a figure show, (rows, columns, H, W[, 3])."""
    shown = [torch.as_tensor(axis.get_images()[0].get_array().filled()) for axis in figure.axes]
    return torch.stack(shown).view(rows, -1, *shown[0].shape)


def as_shown(images):
    return images.permute(0, 2, 3, 1).squeeze(-1)


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ------------------------------------------------------------------------------------------------ command line: sheets


@pytest.mark.parametrize("n, rows, columns", [(2, 1, 2), (16, 1, 16), (17, 2, 16), (70, 5, 16)])
def test_size_of_the_sheet(n, rows, columns, conditional, capsys):
    image = sheet("--checkpoint", conditional, "--n", n)
    assert image.shape == (3, rows * (H + 2) + 2, columns * (W + 2) + 2)
    assert capsys.readouterr().out == f"{n} samples on sheet.png\n"
    assert written(Path.cwd()) == ["sheet.png"]


def test_sheet_of_one_image_and_default_number(conditional):
    assert sheet("--checkpoint", conditional, "--n", 1).shape[1:] in [(H, W), (H + 4, W + 4)]  # with or without a frame
    assert sheet("--checkpoint", conditional).shape == (3, 2 * (H + 2) + 2, 16 * (W + 2) + 2)


def test_sheet_shows_the_models_samples(conditional, unconditional):
    for path in (conditional, unconditional):
        image = sheet("--checkpoint", path, "--n", 17, "--seed", 3, "--temperature", 0.5)
        expected = HVAE.load(path).sample(17, None, 0.5, seeded(3))
        assert torch.equal(tiles(image, 17), as_saved(expected))
        assert image[:, :2].min() == 255 and image[:, -H:, -W:].min() == 255  # the frame and the empty place are white


def test_text_is_what_is_drawn(conditional):
    model = HVAE.load(conditional)
    images = {text: tiles(sheet("--checkpoint", conditional, "--n", 5, "--text", text), 5) for text in ("AB", "BA")}
    for text, image in images.items():
        assert torch.equal(image, as_saved(model.sample(5, text, generate.usual_temperature(model), seeded())))
    assert not torch.equal(images["AB"], images["BA"])


def test_seed(conditional):
    draw = lambda *seed: sheet("--checkpoint", conditional, "--n", 3, *seed)
    first = draw("--seed", 1)
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(draw("--seed", 1), first)
    assert not torch.equal(draw("--seed", 2), first)
    assert torch.equal(draw(), draw("--seed", 0))


def test_temperature(conditional):
    arguments = ["--checkpoint", conditional, "--n", 16, "--text", "AB", "--temperature"]
    spread = [tiles(sheet(*arguments, t), 16).float().std(0).mean() for t in (0, 0.3, 1)]
    assert spread[0] == 0 and 1 < spread[1] < spread[2]


def test_other_file_formats(conditional):
    generate.main(["--checkpoint", str(conditional), "--n", "4", "--out", "sheet.jpg"])
    assert read_image("sheet.jpg").shape == (3, H + 4, 4 * (W + 2) + 2)


def test_script_runs_from_another_folder(conditional, here):
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", conditional, "--n", "5", "--text", "CA"]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=900)
    assert (result.returncode, result.stdout, result.stderr) == (0, "5 samples on samples.png\n", "")
    assert written(here) == ["samples.png"]
    assert torch.equal(read_image("samples.png"), sheet("--checkpoint", conditional, "--n", 5, "--text", "CA"))


def test_default_checkpoint_does_not_depend_on_the_folder():
    assert generate.CHECKPOINTS["captcha"] == ROOT / "checkpoints" / "hvae.pt"


# ------------------------------------------------------------------------------------------------ command line: files


def test_many_samples_take_several_sheets(conditional, capsys, monkeypatch):
    """The same images as on one, and never more than a sheet of them at once."""
    arguments = ["--checkpoint", str(conditional), "--n", "150", "--seed", "2"]
    expected = tiles(sheet(*arguments), 150)
    capsys.readouterr()
    monkeypatch.setattr(generate, "SHEET", 64)
    generate.main([*arguments, "--out", "many.png"])
    out, err = capsys.readouterr()
    assert out == "150 samples on many-001.png to many-003.png\n" and "150/150" in err
    assert written(Path.cwd()) == ["many-001.png", "many-002.png", "many-003.png", "sheet.png"]
    found = [tiles(read_image(f"many-00{i}.png"), n) for i, n in ((1, 64), (2, 64), (3, 22))]
    assert torch.equal(torch.cat(found), expected)


def test_interruption_is_one_line(conditional, capsys, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "save_image", interrupt)
    with pytest.raises(SystemExit) as stop:
        generate.main(["--checkpoint", str(conditional), "--n", "1"])
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


def test_individual_files_are_those_of_the_sheet(conditional, capsys):
    arguments = ["--checkpoint", conditional, "--n", 70, "--seed", 4]  # one batch and a part of the next
    expected = tiles(sheet(*arguments), 70)
    generate.main([*map(str, arguments), "--individual", "out/files"])
    assert capsys.readouterr().out.endswith("70 images in out/files\n")
    folder = CaptchaFolder("out/files", text_length=2, charset=CHARSET)
    assert len(folder) == 70 and len(set(folder.texts)) == 9
    index = [int(path.stem.split("_")[1]) for path in folder.paths]
    assert sorted(index) == list(range(70))
    for i, path in zip(index, folder.paths):
        assert torch.equal(read_image(path), expected[i])
    texts = [text for _, drawn in sample_batches(HVAE.load(conditional), 70, seed=4) for text in drawn]
    assert [texts[i] for i in index] == folder.texts
    assert written(Path.cwd())[:2] == ["out", "out/files"] and "samples.png" not in written(Path.cwd())


def test_individual_files_of_a_text(conditional):
    generate.main(["--checkpoint", str(conditional), "--n", "3", "--text", "CB", "--individual", "out"])
    assert written(Path("out")) == ["CB_000000.png", "CB_000001.png", "CB_000002.png"]
    folder = CaptchaFolder("out", text_length=2, charset=CHARSET)
    assert folder[0][0].shape == (3, H, W) and folder[0][1].tolist() == [2, 1]


def test_individual_files_without_a_text(unconditional):
    generate.main(["--checkpoint", str(unconditional), "--n", "66", "--individual", "out"])
    assert written(Path("out")) == [f"{i:06d}.png" for i in range(66)]
    assert len(CaptchaFolder("out")) == 66


def test_individual_files_are_numbered_without_a_progress_bar(unconditional, monkeypatch):
    monkeypatch.setattr(generate, "tqdm", partial(tqdm, disable=True))  # as the variable TQDM_DISABLE does
    save_individual(HVAE.load(unconditional), "out", 3)
    assert written(Path("out")) == ["000000.png", "000001.png", "000002.png"]


def test_charset_that_no_file_name_holds():
    with pytest.raises(ValueError, match="charset"):
        save_individual(tiny(charset="AB/"), "out", 3)
    assert not Path("out").exists()
    save_individual(tiny(charset="AB/", text_length=None), "out", 1)  # draws no texts
    assert written(Path("out")) == ["000000.png"]


PICTURES = ["interpolation", "levels", "originals", "prior_vs_aggregate", "reconstructions", "samples", "temperatures"]


def test_figures(conditional, capsys):
    generate.main(["--checkpoint", str(conditional), "--figures", "docs/pictures"])
    assert capsys.readouterr().out == "pictures in docs/pictures\n"
    assert written(Path.cwd()) == ["docs", "docs/pictures"] + [f"docs/pictures/{name}.png" for name in PICTURES]
    images = {name: read_image(f"docs/pictures/{name}.png").float() for name in PICTURES}
    assert all(image.std() > 1 for image in images.values())
    assert torch.equal(images["samples"], sheet("--checkpoint", conditional).float())
    assert images["originals"].shape == images["samples"].shape


def test_figures_of_an_unconditional_model(unconditional, monkeypatch):
    monkeypatch.setattr(generate, "show_rows", lambda rows, titles, path, labels=(): path.touch())  # drawing is slow
    monkeypatch.setattr(generate, "fit_aggregate", partial(fit_aggregate, most=8))
    generate.main(["--checkpoint", str(unconditional), "--figures", "out"])
    assert written(Path("out")) == [f"{name}.png" for name in PICTURES]


# ------------------------------------------------------------------------------------------------ command line: errors


def check_refused(arguments, culprit, folder, capsys):
    """Exit status 2 and one line that names the culprit, after the usage at most, and no file or folder."""
    before = written(folder)
    with pytest.raises(SystemExit) as error:
        generate.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    *usage, line = err.splitlines()
    assert error.value.code == 2 and out == ""
    assert written(folder) == before
    assert usage in ([], ["usage: " + line.split(": error: ")[0] + " [options]"]) and err.count("error: ") == 1
    assert culprit in line.split(": error: ")[1]


def test_a_name_of_two_lines_is_refused_on_one(here, capsys):
    check_refused(["--checkpoint", "no such\nfile.pt"], "no such file.pt", here, capsys)


@pytest.mark.parametrize("n", ["0", "-3", "2.5", "many"])
def test_wrong_n(n, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--n", n], "--n", here, capsys)
    check_refused(["--checkpoint", conditional, "--n", n, "--individual", "out"], "--n", here, capsys)


@pytest.mark.parametrize("temperature", ["-0.1", "nan", "inf", "warm"])
def test_wrong_temperature(temperature, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--temperature", temperature], "temperature", here, capsys)


@pytest.mark.parametrize("text", ["A?", "ab", "A", "ABC", "", "Ä€"])
def test_wrong_text(text, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--text", text], f"text {text!r}", here, capsys)


def test_text_for_an_unconditional_model(unconditional, here, capsys):
    check_refused(["--checkpoint", unconditional, "--text", "AB"], "unconditional", here, capsys)


@pytest.mark.parametrize("wrong, culprit", [("--temperature=-1", "temperature"), ("--text=A?", "'A?'")])
def test_no_folder_is_made_for_wrong_input(wrong, culprit, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, wrong, "--individual", "out"], culprit, here, capsys)


@pytest.mark.parametrize("seed", [2**64, "first"])
def test_wrong_seed(seed, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--seed", seed], "seed", here, capsys)


def test_wrong_device(conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--device", "abacus"], "abacus", here, capsys)


@pytest.mark.parametrize("target", [[], ["--individual", "out"], ["--figures", "out"]])
def test_checkpoint_that_cannot_be_read(target, here, capsys):
    check_refused(["--checkpoint", "missing.pt", *target], "missing.pt", here, capsys)
    check_refused(["--checkpoint", here, *target], str(here), here, capsys)
    Path("notes.txt").write_text("Remember the milk.\n")
    check_refused(["--checkpoint", "notes.txt", *target], "notes.txt", here, capsys)


def test_checkpoint_whose_weights_do_not_fit(here, capsys):
    torch.save({"format": "hvae-1", "config": tiny().config, "weights": {}}, "other.pt")
    check_refused(["--checkpoint", "other.pt"], "other.pt", here, capsys)


@pytest.mark.parametrize("out, culprit", [("nowhere/sheet.png", "nowhere/sheet.png"), ("sheet.txt", ".txt"),
                                          ("sheet", "extension"), (".", "")])
def test_out_that_cannot_be_written(out, culprit, conditional, here, capsys):
    check_refused(["--checkpoint", conditional, "--n", 2, "--out", out], culprit, here, capsys)


@pytest.mark.parametrize("option", ["--individual", "--figures"])
def test_folder_that_is_a_file(option, conditional, here, capsys):
    Path("taken").write_text("")
    check_refused(["--checkpoint", conditional, option, "taken"], "taken", here, capsys)


# ------------------------------------------------------------------------------------------------ samples


@kinds
def test_sample_sheet(kind):
    model = tiny(**KINDS[kind])
    image = sample_sheet(model, 5, columns=3)
    assert image.shape == (3, 2 * (H + 2) + 2, 3 * (W + 2) + 2)
    assert 0 <= image.min() and image.max() <= 1
    assert not torch.equal(image, sample_sheet(model, 5, columns=3, seed=1))
    assert torch.equal(image, make_grid(model.sample(5, None, generate.usual_temperature(model), seeded()), nrow=3, pad_value=1))


@pytest.mark.parametrize("wrong, match", [({"n": 0}, "n must be"), ({"n": -1}, "n must be"), ({"n": "3"}, "n must be"), ({"n": 1025}, "save_individual"),
                                          ({"text": "?"}, r"'\?'"), ({"temperature": -1.0}, "temperature"),
                                          ({"temperature": math.nan}, "nan")])
def test_sample_sheet_refuses(wrong, match):
    with pytest.raises(ValueError, match=match):
        sample_sheet(tiny(), **wrong)


def test_batches_are_bounded_and_drawn_on_demand(monkeypatch):
    model, drawn = tiny(), []
    sample = model.sample
    monkeypatch.setattr(model, "sample", lambda n, *rest: drawn.append(n) or sample(n, *rest))
    batches = sample_batches(model, 10**9)
    assert drawn == []
    for count in (1, 2):
        images, texts = next(batches)
        assert len(images) == len(texts) == 64 and drawn == [64] * count
    drawn.clear()
    sizes = [(len(images), len(texts)) for images, texts in sample_batches(model, 150)]
    assert sizes == [(64, 64), (64, 64), (22, 22)] and drawn == [64, 64, 22]


def test_batches_tell_the_texts_they_draw():
    model = tiny()
    (images, texts), = sample_batches(model, 40, temperature=0.0)
    assert torch.equal(images, model.sample(40, texts, temperature=0.0)) and len(set(texts)) == 9
    assert [texts for _, texts in sample_batches(model, 66, "BC")] == [["BC"] * 64, ["BC"] * 2]
    assert [texts for _, texts in sample_batches(tiny(text_length=None), 66)] == [[""] * 64, [""] * 2]


def test_batches_differ():
    first, second = [images for images, _ in sample_batches(tiny(), 128, "AB")]
    assert not torch.equal(first, second)


@kinds
def test_global_random_state_is_left_alone(kind):
    model = tiny(**KINDS[kind])
    before = torch.get_rng_state()
    sample_sheet(model, 3)
    plot_samples(model, 2)
    save_individual(model, "out", 2)
    assert torch.equal(torch.get_rng_state(), before)


def test_samples_carry_no_graph():
    assert not sample_sheet(tiny(), 2).requires_grad


# ------------------------------------------------------------------------------------------------ figures


@kinds
def test_numbers_of_pictures(kind):
    model = tiny(**KINDS[kind])
    data_set, texts = images_for(model, 5), model.text_length is not None
    figures = [
        (plot_samples(model, 2, temperatures=[0.5, 1]), 2, 2),
        (plot_reconstructions(model, data_set, 9), 2, 5),  # no more than there are
        (plot_levels(model, data_set, 2), 1 + len(model.levels), 2),
        (plot_interpolation(model, data_set, (0, 4), 3), 1 + texts, 3),
        (plot_prior_vs_aggregate(model, data_set, 2), 2, 2),
    ]
    for figure, rows, columns in figures:
        assert isinstance(figure, Figure) and len(figure.axes) == rows * columns
        shown = pictures(figure, rows)
        assert shown.shape == (rows, columns, H, W) + (3,) * (model.input_shape[0] == 3)
        assert 0 <= shown.min() and shown.max() <= 1


@pytest.mark.parametrize("draw", [plot_samples, plot_reconstructions, plot_levels, plot_interpolation,
                                  plot_prior_vs_aggregate])
def test_path_writes_the_figure(draw):
    model = tiny()
    draw(model, *[] if draw is plot_samples else [images_for(model, 2)], n=2, path="figure.png")
    assert read_image("figure.png").float().std() > 1


@pytest.mark.parametrize("draw", [plot_samples, plot_levels, plot_prior_vs_aggregate])
def test_seed_of_a_figure(draw):
    model = tiny(text_length=None, inner=[[("res", 4)]])
    data_set = [] if draw is plot_samples else [images_for(model, 3)]
    shown = [pictures(draw(model, *data_set, n=2, seed=seed), 1) for seed in (0, 0, 1)]
    assert not torch.equal(shown[0], shown[2])
    assert torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("draw", [plot_reconstructions, plot_levels, plot_prior_vs_aggregate])
def test_empty_data_set_is_refused(draw):
    with pytest.raises(ValueError, match="data set is empty"):
        draw(tiny(), [])


def test_plot_samples():
    """A row per temperature, of the texts written over the columns."""
    model = tiny()
    figure = plot_samples(model, 3, temperatures=(0.0, 1.0), seed=2)
    texts = [axis.get_title() for axis in figure.axes[:3]]
    assert len(set(texts)) > 1
    for row, t in zip(pictures(figure, 2), (0.0, 1.0)):
        torch.testing.assert_close(row, as_shown(model.sample(3, texts, t, seeded(2))))
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["T = 0", "T = 1"]
    assert [axis.get_title() for axis in plot_samples(model, 2, "CA", [1.0]).axes] == ["CA", "CA"]
    with pytest.raises(ValueError, match="unconditional"):
        plot_samples(tiny(text_length=None), 2, "CA")


def test_plot_reconstructions():
    model = tiny()
    items = images_for(model, 2)
    x, y = batch_of(model, items)
    figure = plot_reconstructions(model, items, seed=1)
    shown = pictures(figure, 2)
    torch.testing.assert_close(shown[0], as_shown(x))
    torch.testing.assert_close(shown[1], as_shown(model.reconstruct(x, y, seeded(1))))
    assert [axis.get_title() for axis in figure.axes[:2]] == ["".join(CHARSET[i] for i in row) for row in y]


@pytest.mark.parametrize("silent", [None, 0, 1, 2])
def test_each_row_of_plot_levels_changes_one_level(silent):
    """A level that has no way into the image leaves its own row without any change, and no other row."""
    model = tiny()
    if silent is not None:
        torch.nn.init.zeros_(model.levels[silent].from_z.weight)
    items = images_for(model, 1)
    figure = plot_levels(model, items, 2)
    rows = pictures(figure, 4)
    assert [figure.axes[i].get_ylabel() for i in range(0, 8, 2)] == ["x", "z_3 anew", "z_2 anew", "z_1 anew"]
    assert torch.equal(rows[0], as_shown(items[0][0][None]).expand_as(rows[0]))
    for row, level in zip(rows[1:], (2, 1, 0)):
        assert (row.std(0).mean() > 1e-3) == (level != silent), level


def test_plot_levels_keeps_the_other_levels():
    """With priors that always give the posterior's own draw, no row differs from the decoded image."""
    model = tiny()
    items = images_for(model, 1)
    x, y = batch_of(model, items)
    latents = model.encode(x, y, seeded(1))
    for level, z in zip(model.levels, latents):
        level.prior = lambda h, z=z: Normal(z.expand(len(h), *z.shape[1:]), torch.full((len(h), *z.shape[1:]), -80.0))
    model.encode = lambda *_: latents
    for row in pictures(plot_levels(model, items, 2), 4)[1:]:
        torch.testing.assert_close(row, as_shown(model.decode(latents, y).image).expand_as(row))


@kinds
def test_ends_of_the_interpolation(kind):
    model = tiny(**KINDS[kind])
    items = images_for(model, 4)
    pair = [items[3], items[1]]
    figure = plot_interpolation(model, items, (3, 1), 3, seed=1)
    x, y = batch_of(model, pair)
    latents = model.encode(x, y, seeded(1))
    rows = pictures(figure, 1 if y is None else 2)
    for i, row in enumerate(rows):
        text = None if y is None else y[i : i + 1].expand(2, -1)
        ends = as_shown(model.decode(latents, text).image)
        torch.testing.assert_close(row[[0, -1]], ends, atol=1e-5, rtol=1e-4)
        assert not torch.allclose(row[1], ends[0], atol=1e-3) and not torch.allclose(row[1], ends[1], atol=1e-3)
        if y is not None:
            assert figure.axes[3 * i].get_ylabel() == "text " + "".join(CHARSET[s] for s in y[i])


def test_plot_prior_vs_aggregate(monkeypatch, full_precision):
    model = tiny(flow=0)
    items = images_for(model, 3)
    figure = plot_prior_vs_aggregate(model, items, 3, temperature=0.9, seed=1)
    texts = [axis.get_title() for axis in figure.axes[:3]]
    rows = pictures(figure, 2)
    torch.testing.assert_close(rows[0], as_shown(model.sample(3, texts, 0.9, seeded(1))))
    assert not torch.allclose(rows[0], rows[1], atol=0.01)
    draw = lambda **options: pictures(plot_prior_vs_aggregate(model, items, 2, **options), 2)
    zeros = torch.zeros(1, *model.levels[-1].shape)
    monkeypatch.setattr(generate, "fit_aggregate", lambda *_, **__: Aggregate(zeros, zeros))
    assert torch.equal(*draw())  # the aggregate is N(0, I)
    monkeypatch.setattr(generate, "fit_aggregate", lambda *_, **__: Aggregate(zeros + 3, zeros))
    assert not torch.allclose(*draw(temperature=0.0), atol=0.01)


# ------------------------------------------------------------------------------------------------ slerp, aggregate


SHARES = torch.linspace(0, 1, 7)
SHAPES = pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])


def two(shape):
    return torch.randn(2, 4, *shape, generator=seeded(7))


def norms(z):
    return z.flatten(1).norm(dim=1)


@SHAPES
def test_slerp_ends(shape):
    a, b = two(shape)
    torch.testing.assert_close(slerp(a, b, SHARES[0]), a)
    torch.testing.assert_close(slerp(a, b, SHARES[-1]), b)


@SHAPES
def test_slerp_keeps_the_norm_and_its_pace(shape):
    a, b = (z / norms(z).view(-1, *[1] * len(shape)) * 3 for z in two(shape))
    path = [slerp(a, b, share) for share in SHARES]
    for z in path:
        torch.testing.assert_close(norms(z), torch.full((4,), 3.0))
    steps = torch.stack([norms(after - before) for before, after in zip(path, path[1:])])
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-4, rtol=1e-3)


def test_slerp_of_a_right_angle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angle = math.pi / 6
    torch.testing.assert_close(slerp(a, b, torch.tensor(1 / 3)), torch.tensor([[math.cos(angle), math.sin(angle)]]))


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-5, 1e-3])
def test_slerp_of_nearly_parallel_inputs(distance):
    a, b = two((2, 3, 4))
    b = a + distance * b
    for i in range(4):
        for share in SHARES:
            torch.testing.assert_close(slerp(a[i : i + 1], b[i : i + 1], share), torch.lerp(a, b, share)[i : i + 1],
                                       atol=1e-4, rtol=1e-4)


def test_slerp_of_a_batch_with_a_parallel_pair():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(slerp(a, b, torch.tensor(0.5)), torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]]))


@pytest.mark.parametrize("factor", [-1, -2.5])
def test_slerp_of_opposite_inputs(factor):
    a, _ = two((2, 3, 4))
    path = torch.stack([slerp(a, factor * a, share) for share in SHARES])
    assert path.isfinite().all()
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], factor * a)


def test_slerp_of_zeros():
    a, b = torch.zeros(1, 3), torch.ones(1, 3)
    assert all(slerp(*pair, share).isfinite().all() for pair in [(a, a), (a, b), (b, a)] for share in SHARES)


@pytest.mark.parametrize("kind, most, used", [*((kind, 512, 70) for kind in KINDS), ("conditional", 10, 10),
                                              ("conditional", 64, 64)])
def test_aggregate_is_the_mean_and_variance_of_z(kind, most, used):
    model = tiny(**KINDS[kind])
    items = images_for(model, 70)
    aggregate = fit_aggregate(model, items, most, seed=1)
    generator = seeded(1)
    parts = [part for part in (items[: min(64, used)], items[64:used]) if part]  # as many at once as in the source
    z = torch.cat([model.encode(*batch_of(model, part), generator)[-1] for part in parts])
    assert len(z) == used and aggregate.mu.shape == aggregate.logvar.shape == (1, *model.levels[-1].shape)
    torch.testing.assert_close(aggregate.mu[0], z.mean(0))
    torch.testing.assert_close(aggregate.logvar[0].exp(), (z - z.mean(0)).square().mean(0))


def test_aggregate_of_one_image_is_its_posterior():
    model = tiny(text_length=None)
    x, _ = images_for(model, 1)[0]
    q = model.infer(x[None])[1][-1][0]
    aggregate = fit_aggregate(model, [(x, torch.zeros(0))] * 512)
    sigma = (q.logvar / 2).exp()
    assert ((aggregate.mu - q.mu).abs() < 5 * sigma / 512**0.5).all()
    torch.testing.assert_close(aggregate.logvar, q.logvar, atol=0.35, rtol=0)


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4)])
def test_aggregate_works_as_a_normal(shape):
    mu, logvar = torch.randn(2, 1, *shape, generator=seeded())
    aggregate, normal = Aggregate(mu, logvar), Normal(mu, logvar)
    z = aggregate.sample(1.0, seeded())
    assert torch.equal(z, normal.sample(1.0, seeded())) and torch.equal(aggregate.sample(0.0), mu)
    assert torch.equal(aggregate.log_prob(z), normal.log_prob(z))
    assert torch.equal(aggregate.entropy(), normal.entropy())
    assert kl_divergence(aggregate, normal).item() == 0
    five = aggregate.expand(5)
    assert five.mu.shape == five.logvar.shape == (5, *shape) and torch.equal(five.sample(0.0), mu.expand(5, *shape))
    draws = five.sample(1.0, seeded())
    assert not torch.equal(draws[0], draws[1])


# ------------------------------------------------------------------------------------------------ shipped checkpoint


@pytest.fixture(scope="module")
def shipped():
    if not generate.CHECKPOINTS["captcha"].is_file():
        pytest.skip("checkpoints/hvae.pt is missing")
    return HVAE.load(generate.CHECKPOINTS["captcha"])


def test_shipped_file_fits_the_default_model(shipped):
    assert generate.CHECKPOINTS["captcha"].stat().st_size < 20e6
    content = torch.load(generate.CHECKPOINTS["captcha"], weights_only=True)
    default = HVAE()
    assert {**default.config, **content["config"]} == shipped.config == default.config  # a file may lack newer arguments
    shapes = lambda weights: {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes(content["weights"]) == shapes(default.state_dict())
    assert all(weight.isfinite().all() for weight in content["weights"].values())


def test_shipped_provenance(shipped):
    provenance = shipped.provenance
    assert provenance["version"] and provenance["images_seen"] > 0 and provenance["seconds"] > 0
    assert provenance["data"]["renderer"] == "captcha" and provenance["data"]["split"] == "train"
    held_out = provenance["held_out"]
    assert math.isfinite(held_out["elbo"]) and math.isfinite(held_out["reconstruction"])
    assert len(held_out["kl"]) == len(shipped.levels)


def test_shipped_samples_vary_and_follow_the_text(shipped):
    a, b = (shipped.sample(16, text, 1.0, seeded()) for text in ("7KQ2", "MWB8"))
    assert a.shape == (16, 3, 60, 160)
    assert a.std(0).mean() > 0.02 and b.std(0).mean() > 0.02
    assert (a.mean(0) - b.mean(0)).abs().mean() > 0.005  # same seed, same noise: the text alone
