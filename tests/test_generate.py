"""Samples and figures: what the command line and the notebook show, on tiny untrained models."""

import math
import resource
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

import generate
from dataset import CaptchaDataset, CaptchaFolder
from generate import (
    SampleBatches,
    fit_aggregate,
    plot_interpolation,
    plot_levels,
    plot_prior_vs_aggregate,
    plot_reconstructions,
    plot_rows,
    plot_samples,
    sample_sheet,
    save_individual,
    slerp,
)
from hvae.adapt import adapted
from hvae.checkpoint import read_tensors
from hvae.distributions import DiagonalGaussian
from hvae.evaluation import evaluate
from hvae.pictures import write_image
from hvae.validate import InputError
from model import HVAE, WITHOUT_WINDOWS

ROOT = Path(__file__).resolve().parent.parent
CHARSET = "ABC"
H, W = 20, 40


def tiny(**arguments):
    """A seeded model of 20x40 images whose weights are large enough for every latent to matter.

    It has no windows, so pictures are means of p(x|z), and depend on z and the text alone.
    """
    torch.manual_seed(0)
    config = dict(
        WITHOUT_WINDOWS,
        outer_config=[("conv", 4, 2), ("conv", 4, 2)],
        inner_config=[[("res", 4)], [("dense", 5)]],
        input_size=(H, W),
        latent_channels=2,
        likelihood="bernoulli",
        text_length=2,
        charset=CHARSET,
    )
    model = HVAE(**{**config, **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter *= 3
    return model


GREY = dict(input_channels=1)
KINDS = {
    "conditional": dict(),
    "grey chain": dict(inference="bottom-up", inner_config=[[("conv", 4, 2)]], **GREY),
    "one level, grey, without text": dict(text_length=None, inner_config=[], **GREY),
    "chain without text": dict(text_length=None, inference="bottom-up"),
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


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def images_for(model, n):
    """A data set of n random images with texts the model knows."""
    generator = seeded(5)
    y = model.draw_text(n, generator=generator)
    labels = torch.zeros(n, 0, dtype=torch.long) if y is None else y
    return list(zip(torch.rand(n, *model.input_shape, generator=generator), labels, strict=True))


def batch_of(model, items):
    x, y = (torch.stack(column) for column in zip(*items, strict=True))
    return x, None if model.text_length is None else y


def read_image(path):
    """A file's image as RGB, uint8 (3, H, W)."""
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def run(checkpoint, *arguments):
    generate.main(["--checkpoint", str(checkpoint), *map(str, arguments)])


def sheet(checkpoint, *arguments):
    """The sheet (3, H', W') that the command line writes, uint8."""
    run(checkpoint, *arguments, "--out", "sheet.png")
    return read_image("sheet.png")


def tiles(image, n):
    """The n images on a sheet of 16 columns, (n, 3, H, W)."""
    corners = [(2 + i // 16 * (H + 2), 2 + i % 16 * (W + 2)) for i in range(n)]
    return torch.stack([image[:, top : top + H, left : left + W] for top, left in corners])


def as_saved(images):
    """Images in [0, 1] as an RGB file holds them."""
    return (255 * images).round().byte().expand(-1, 3, -1, -1)


def pictures(figure, rows):
    """What the axes of a figure show, (rows, columns, H, W[, 3])."""
    shown = [torch.as_tensor(axis.get_images()[0].get_array().filled()) for axis in figure.axes]
    return torch.stack(shown).view(rows, -1, *shown[0].shape)


def as_shown(images):
    return images.permute(0, 2, 3, 1).squeeze(-1)


def written(folder="."):
    return sorted(path.relative_to(folder).as_posix() for path in Path(folder).rglob("*"))


# ---------------------------------------------------------------------------- sheets


@pytest.mark.parametrize("n, rows, columns", [(2, 1, 2), (16, 1, 16), (17, 2, 16), (70, 5, 16)])
def test_size_of_the_sheet(n, rows, columns, conditional, capsys):
    image = sheet(conditional, "--n", n)
    assert image.shape == (3, rows * (H + 2) + 2, columns * (W + 2) + 2)
    assert capsys.readouterr().out == f"{n} samples on sheet.png\n"
    assert written() == ["sheet.png"]


def test_sheet_of_one_image_and_default_number(conditional):
    with_or_without_a_frame = [(H, W), (H + 4, W + 4)]
    assert sheet(conditional, "--n", 1).shape[1:] in with_or_without_a_frame
    assert sheet(conditional).shape == (3, 2 * (H + 2) + 2, 16 * (W + 2) + 2)


def test_sheet_shows_the_models_samples(conditional, unconditional):
    for path in (conditional, unconditional):
        image = sheet(path, "--n", 17, "--seed", 3, "--temperature", 0.5)
        expected = HVAE.load(path).sample(17, None, 0.5, seeded(3))
        assert torch.equal(tiles(image, 17), as_saved(expected))
        frame, empty_place = image[:, :2], image[:, -H:, -W:]
        assert frame.min() == 255 and empty_place.min() == 255


def test_text_is_what_is_drawn(conditional):
    model = HVAE.load(conditional)
    images = {text: tiles(sheet(conditional, "--n", 5, "--text", text), 5) for text in ("AB", "BA")}
    for text, image in images.items():
        assert torch.equal(image, as_saved(model.sample(5, text, 1.0, seeded())))
    assert not torch.equal(images["AB"], images["BA"])


def test_seed(conditional):
    draw = lambda *seed: sheet(conditional, "--n", 3, *seed)
    first = draw("--seed", 1)
    torch.manual_seed(99)  # the global state plays no part
    assert torch.equal(draw("--seed", 1), first)
    assert not torch.equal(draw("--seed", 2), first)
    assert torch.equal(draw(), draw("--seed", 0))


def test_temperature(conditional):
    at = lambda T: tiles(sheet(conditional, "--n", 16, "--text", "AB", "--temperature", T), 16)
    spread = [at(T).float().std(0).mean() for T in (0, 0.3, 1)]
    assert spread[0] == 0 and 1 < spread[1] < spread[2]


def test_other_file_formats(conditional):
    run(conditional, "--n", 4, "--out", "sheet.jpg")
    assert read_image("sheet.jpg").shape == (3, H + 4, 4 * (W + 2) + 2)


def test_script_runs_from_another_folder(conditional, here):
    command = [sys.executable, ROOT / "generate.py", "--checkpoint", conditional]
    command += ["--n", "5", "--text", "CA"]
    result = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=900)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "5 samples on samples.png\n"
    assert written() == ["samples.png"]
    expected = sheet(conditional, "--n", 5, "--text", "CA")
    assert torch.equal(read_image("samples.png"), expected)


def test_default_checkpoint_does_not_depend_on_the_folder():
    assert generate.CHECKPOINTS["captcha"] == ROOT / "checkpoints" / "hvae.pt"


# ---------------------------------------------------------------------------- files


def test_individual_files_are_those_of_the_sheet(conditional, capsys):
    arguments = ["--n", 70, "--seed", 4]  # one batch and a part of the next
    expected = tiles(sheet(conditional, *arguments), 70)
    run(conditional, *arguments, "--individual", "out/files")
    assert capsys.readouterr().out.endswith("70 images in out/files\n")
    folder = CaptchaFolder("out/files", text_length=2, charset=CHARSET)
    assert len(folder) == 70 and len(set(folder.texts)) == 9
    index = [int(path.stem.split("_")[1]) for path in folder.paths]
    assert sorted(index) == list(range(70))
    for i, path in zip(index, folder.paths, strict=True):
        assert torch.equal(read_image(path), expected[i])
    batches = SampleBatches(HVAE.load(conditional), 70, seed=4)
    texts = [text for _, drawn in batches for text in drawn]
    assert [texts[i] for i in index] == folder.texts
    assert written()[:2] == ["out", "out/files"] and "samples.png" not in written()


def test_individual_files_are_not_mixed_with_others(conditional, capsys):
    run(conditional, "--n", 2, "--individual", "out")
    with pytest.raises(SystemExit):
        run(conditional, "--n", 2, "--seed", 1, "--individual", "out")
    assert "out has files" in capsys.readouterr().err and len(written("out")) == 3


def test_resuming_keeps_the_labels_of_other_pictures(conditional, capsys):
    run(conditional, "--n", 2, "--individual", "out")
    Path("out/labels.csv").write_text("name,text\nmine.png,AB\n")
    with pytest.raises(SystemExit):
        run(conditional, "--n", 2, "--individual", "out", "--resume")
    assert "out/labels.csv names other files" in capsys.readouterr().err
    assert Path("out/labels.csv").read_text() == "name,text\nmine.png,AB\n"


@pytest.mark.parametrize("kind", ["conditional", "unconditional"])
def test_resuming_does_not_mix_with_other_files(kind, request, capsys):
    Path("photos").mkdir()
    Path("photos/cat.png").write_text("a photograph")
    with pytest.raises(SystemExit):
        run(request.getfixturevalue(kind), "--n", 2, "--individual", "photos", "--resume")
    assert "photos has other files, such as cat.png" in capsys.readouterr().err
    assert written("photos") == ["cat.png"]


def test_held_out_renders_are_like_those_of_an_unconditional_models_training():
    texts = dict(text_length=6, shortest=5, charset="xyz", font_sizes=[20])
    data = CaptchaDataset(9, image_size=(H, W), **texts)
    model = tiny(text_length=None, input_channels=3)
    model.provenance["data"] = data.description
    held_out = generate.held_out_images(model, limit=7)
    assert held_out.description == {**data.description, "split": "test", "size": 7}


def test_titles_are_not_formulas():
    """Two dollars would be: with this in between, one that matplotlib cannot read."""
    figure = plot_samples(tiny(charset="$^"), n=2, text="$^", path="figure.png")
    plot_rows([torch.zeros(1, 1, 4, 4)], ["$^$"], "rows.png", ["$^$"])
    assert figure.axes[0].get_title() == "$^" and written() == ["figure.png", "rows.png"]


def test_individual_files_of_a_grey_model_are_grey():
    save_individual(tiny(**GREY), "out", 2)
    assert CaptchaFolder("out", text_length=2, charset=CHARSET)[0][0].shape == (1, H, W)


def test_individual_files_of_a_text(conditional):
    run(conditional, "--n", 3, "--text", "CB", "--individual", "out")
    assert written("out") == ["CB_000000.png", "CB_000001.png", "CB_000002.png", "labels.csv"]
    labels = Path("out/labels.csv").read_text()
    assert labels == "name,text\n" + "".join(f"CB_00000{i}.png,CB\n" for i in range(3))
    folder = CaptchaFolder("out", text_length=2, charset=CHARSET)
    assert folder[0][0].shape == (3, H, W) and folder[0][1].tolist() == [2, 1]


def test_individual_files_whose_texts_end_in_spaces():
    save_individual(tiny(charset="A "), "out", 16)
    texts = CaptchaFolder("out", text_length=2, charset="A ").texts
    assert all(len(text) == 2 for text in texts) and {"A ", "  "} <= set(texts)


def test_individual_files_whose_texts_have_commas():
    save_individual(tiny(charset="A,"), "out", 4)
    folder = CaptchaFolder("out", text_length=2, charset="A,")
    assert all(
        path.name.startswith(f"{text}_")
        for path, text in zip(folder.paths, folder.texts, strict=True)
    )


def test_individual_files_go_on_after_an_interruption(conditional, monkeypatch):
    """The batches that are there are kept, and the files end up as without an interruption."""
    arguments = ["--n", 150, "--seed", 4, "--individual"]
    run(conditional, *arguments, "whole")
    contents = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    expected = contents("whole")
    run(conditional, *arguments, "out")
    for name in sorted(expected, key=lambda name: name.split("_")[-1])[100:]:
        Path("out", name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in Path("out").glob("*_0000[0-5]*.png")}
    run(conditional, *arguments, "out", "--resume")
    assert contents("out") == expected
    assert len(kept) == 60 and all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_captions_stand_below_the_samples(conditional):
    """Another text, another caption; the samples themselves are as without."""
    plain, captioned = sheet(conditional, "--n", 3), sheet(conditional, "--n", 3, "--captions")
    tile = lambda image, i, h: image[:, 2 : 2 + h, 2 + i * (W + 2) : 2 + i * (W + 2) + W]
    height = H + generate.CAPTION
    for i in range(3):
        assert torch.equal(tile(captioned, i, height)[:, :H], tile(plain, i, H))
    below = [
        tile(sheet(conditional, "--n", 1, "--text", text, "--captions"), 0, height)[:, H:]
        for text in ("AB", "BA", "AB")
    ]
    assert below[0].min() < 128 < below[0].max()
    assert torch.equal(below[0], below[2]) and not torch.equal(below[0], below[1])


def test_a_text_is_upper_cased_where_the_charset_is(conditional):
    assert torch.equal(sheet(conditional, "--text", "ab"), sheet(conditional, "--text", "AB"))


def test_individual_files_without_a_text(unconditional):
    run(unconditional, "--n", 66, "--individual", "out")
    assert written("out") == [f"{i:06d}.png" for i in range(66)]
    assert len(CaptchaFolder("out")) == 66


def test_individual_files_are_numbered_without_a_progress_bar(unconditional, monkeypatch):
    monkeypatch.setattr(generate, "tqdm", partial(tqdm, disable=True))  # as TQDM_DISABLE does
    save_individual(HVAE.load(unconditional), "out", 3)
    assert written("out") == ["000000.png", "000001.png", "000002.png"]


def test_texts_that_no_file_name_holds():
    """They stand in labels.csv alone, and the folder reads back."""
    model = tiny(charset="A/.")
    save_individual(model, "out", 20)
    folder = CaptchaFolder("out", text_length=2, charset="A/.")
    assert sorted(folder.texts) == sorted(SampleBatches(model, 20).begin(0)[0])
    for path, text in zip(folder.paths, folder.texts, strict=True):
        assert path.name.startswith("AA_") == (text == "AA")
    save_individual(tiny(text_length=None), "plain", 1)  # draws no texts
    assert written("plain") == ["000000.png"]


def test_an_interrupted_set_has_its_texts(monkeypatch):
    """Names of numbers must not be taken for texts."""
    model, drawn = tiny(charset="0/"), []

    def write_three(image, path):
        if len(drawn) == 3:
            raise KeyboardInterrupt
        drawn.append(path)
        write_image(image, path)

    monkeypatch.setattr(generate, "write_image", write_three)
    with pytest.raises(KeyboardInterrupt):
        save_individual(model, "out", 20)
    with pytest.warns(UserWarning, match="no images for 17 names"):
        folder = CaptchaFolder("out", text_length=2, charset="0/")
    texts = SampleBatches(model, 20).begin(0)[0][:3]
    assert sorted(folder.texts) == sorted(texts) and set(texts) != {"00"}


PICTURES = "interpolation levels originals prior_vs_aggregate reconstructions samples temperatures"
PICTURES = [f"{name}.png" for name in PICTURES.split()]


def test_figures(conditional, capsys):
    run(conditional, "--figures", "docs/pictures")
    assert capsys.readouterr().out == "pictures in docs/pictures\n"
    assert written() == ["docs", "docs/pictures"] + [f"docs/pictures/{name}" for name in PICTURES]
    images = {name: read_image(Path("docs/pictures", name)).float() for name in PICTURES}
    assert all(image.std() > 1 for image in images.values())
    assert torch.equal(images["samples.png"], sheet(conditional).float())
    assert images["originals.png"].shape == images["samples.png"].shape


def test_figures_of_an_unconditional_model(unconditional, monkeypatch):
    draw_nothing = lambda rows, titles, path, labels=(): path.touch()  # drawing is slow
    monkeypatch.setattr(generate, "plot_rows", draw_nothing)
    monkeypatch.setattr(generate, "fit_aggregate", partial(fit_aggregate, limit=8))
    run(unconditional, "--figures", "out")
    assert written("out") == PICTURES


@contextmanager
def full_disk():
    """Files cannot grow beyond a hundred bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "target, name",
    [
        (["--out", "sheet.png"], "sheet.png"),
        (["--out", "sheet.jpg"], "sheet.jpg"),
        (["--individual", "out", "--text", "AB", "--resume"], "out/labels.csv"),
        (["--individual", "out", "--text", "AB", "--n", 2, "--resume"], "out/AB_000000.png"),
        (["--figures", "out"], "out/samples.png"),
    ],
)
def test_full_disk_leaves_no_half_written_picture(target, name, conditional, capsys):
    """What was there stays; a picture that cannot be finished is removed."""
    Path("out").mkdir()
    Path(name).write_text("an older picture")
    before = written()
    with full_disk(), pytest.raises(SystemExit) as stop:
        run(conditional, *target)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2
    assert error.endswith(f" error: {name}: could not be written (File too large)")
    labels = ["out/labels.csv"] if name == "out/AB_000000.png" else []  # short, written before
    assert written() == before + labels and Path(name).read_text() == "an older picture"


@pytest.mark.parametrize("name", ["figure.png", "figure.jpg"])
def test_full_disk_leaves_no_half_written_figure(name):
    with full_disk(), pytest.raises(OSError, match=f"{name}: .*File too large"):
        plot_samples(tiny(), n=2, path=name)
    assert written() == []


# ---------------------------------------------------------------------------- errors


def check_error(arguments, culprit, folder, capsys):
    """Exit status 2, one line that names the culprit, after the usage at most, and no new file."""
    before = written(folder)
    with pytest.raises(SystemExit) as error:
        generate.main([str(argument) for argument in arguments])
    out, err = capsys.readouterr()
    *usage, line = err.splitlines()
    program, message = line.split(": error: ")
    assert error.value.code == 2 and out == ""
    assert written(folder) == before
    assert usage in ([], [f"usage: {program} [options]"]) and err.count("error: ") == 1
    assert culprit in message


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        *[([f"--n={n}"], "--n") for n in ("0", "-3", "2.5", "many")],
        (["--n=1025"], "at most 1024 images, got 1025; see --individual"),
        *[([f"--n={n}", "--individual=out"], "--n") for n in ("0", "-3", "2.5", "many")],
        *[([f"--temperature={T}"], "temperature") for T in ("-0.1", "nan", "inf", "warm")],
        *[([f"--text={text}"], f"text {text!r}") for text in ("A?", "A", "ABC", "", "Ä€")],
        *[([f"--seed={seed}"], "seed") for seed in (2**64, -1, "first")],
        (["--device=abacus"], "abacus"),
        (["--temperature=-1", "--individual=out"], "temperature"),
        (["--text=A?", "--individual=out"], "'A?'"),
    ],
)
def test_wrong_values(arguments, culprit, conditional, here, capsys):
    check_error(["--checkpoint", conditional, *arguments], culprit, here, capsys)


def test_text_for_an_unconditional_model(unconditional, here, capsys):
    check_error(["--checkpoint", unconditional, "--text", "AB"], "unconditional", here, capsys)


@pytest.mark.parametrize("target", [[], ["--individual", "out"], ["--figures", "out"]])
def test_checkpoint_that_cannot_be_read(target, here, capsys):
    check_error(["--checkpoint", "missing.pt", *target], "missing.pt", here, capsys)
    check_error(["--checkpoint", "no such\nfile.pt", *target], "no such file.pt", here, capsys)
    check_error(["--checkpoint", here, *target], str(here), here, capsys)
    Path("notes.txt").write_text("Remember the milk.\n")
    check_error(["--checkpoint", "notes.txt", *target], "notes.txt", here, capsys)


def test_checkpoint_whose_weights_do_not_fit(here, capsys):
    model = tiny()
    model.config["outer_config"] = [("conv", 4, 2), ("conv", 5, 2)]
    model.save("other.pt")
    check_error(["--checkpoint", "other.pt"], "other.pt", here, capsys)


@pytest.mark.parametrize(
    "out, culprit",
    [
        ("nowhere/sheet.png", "nowhere/sheet.png: could not be written (No such file"),
        ("sheet.txt", ".txt"),
        ("sheet", "extension"),
        (".", ".: '' is not the extension"),
    ],
)
def test_out_that_cannot_be_written(out, culprit, conditional, here, capsys):
    check_error(["--checkpoint", conditional, "--n", 2, "--out", out], culprit, here, capsys)


def test_out_that_cannot_be_written_is_found_before_the_drawing(conditional, here, monkeypatch):
    monkeypatch.setattr(generate, "sample_sheet", lambda *a, **k: pytest.fail("it draws"))
    with pytest.raises(SystemExit):
        generate.main(["--checkpoint", str(conditional), "--out", "nowhere/sheet.png"])


def test_captions_without_texts():
    with pytest.raises(ValueError, match="captions: this model is unconditional"):
        generate.sample_sheet(tiny(text_length=None), 2, captions=True)


@pytest.mark.parametrize("option", ["--individual", "--figures"])
def test_folder_that_is_a_file(option, conditional, here, capsys):
    Path("taken").write_text("")
    check_error(["--checkpoint", conditional, option, "taken"], "taken", here, capsys)


@pytest.mark.parametrize("option", ["checkpoint", "out", "individual", "figures", "root"])
def test_empty_paths(option, here, capsys):
    check_error([f"--{option}="], f"argument --{option}: expected a path", here, capsys)


@pytest.mark.parametrize(
    "arguments, unused, cause",
    [
        (["--figures=out", "--n=3"], "n", "with --figures"),
        (["--figures=out", "--text=AB"], "text", "with --figures"),
        (["--figures=out", "--temperature", "1"], "temperature", "with --figures"),
        (["--figures=out", "--seed=0"], "seed", "with --figures"),  # the default, but given
        (["--figures=out", "--out=a.png"], "out", "with --figures"),
        (["--figures=out", "--individual=out"], "individual", "with --figures"),
        (["--figures=out", "--resume"], "resume", "with --figures"),
        (["--resume"], "resume", "without --individual"),
        (["--folder=in"], "folder", "without --figures"),
        (["--individual=out", "--out=a.png"], "out", "with --individual"),
        (["--individual=out", "--root=data"], "root", "without --figures"),
        (["--root=data"], "root", "without --figures"),
        (["--data=mnist", "--checkpoint=hvae.pt"], "data", "with --checkpoint"),
    ],
)
def test_options_without_effect(arguments, unused, cause, here, capsys):
    check_error(arguments, f"--{unused} has no effect {cause}", here, capsys)


def test_interruption_is_one_line(conditional, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hvae.pictures.to_pil_image", interrupt)
    with pytest.raises(SystemExit) as stop:
        run(conditional, "--n", 1)
    assert stop.value.code == 130 and capsys.readouterr().err == "interrupted\n"


# ---------------------------------------------------------------------------- samples


@kinds
def test_sample_sheet(kind):
    model = tiny(**KINDS[kind])
    image = sample_sheet(model, 5, columns=3)
    assert image.shape == (3, 2 * (H + 2) + 2, 3 * (W + 2) + 2)
    assert image.min() >= 0 and image.max() <= 1 and not image.requires_grad
    assert not torch.equal(image, sample_sheet(model, 5, columns=3, seed=1))
    samples = model.sample(5, None, 1.0, seeded())
    assert torch.equal(image, make_grid(samples, nrow=3, pad_value=1))


@pytest.mark.parametrize(
    "wrong, match",
    [
        ({"n": 0}, "^n: "),
        ({"n": -1}, "^n: "),
        ({"n": "3"}, "^n: "),
        ({"n": 1025}, "^n: .*1024"),
        ({"text": "?"}, r"'\?'"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "nan"),
    ],
)
def test_wrong_arguments_of_a_sheet(wrong, match):
    with pytest.raises(InputError, match=match):
        sample_sheet(tiny(), **wrong)


def test_batches_are_bounded_and_drawn_on_demand(monkeypatch):
    model, drawn = tiny(), []
    sample = model.sample
    monkeypatch.setattr(model, "sample", lambda n, *rest: drawn.append(n) or sample(n, *rest))
    batches = iter(SampleBatches(model, 10**9))
    assert drawn == []
    for count in (1, 2):
        images, texts = next(batches)
        assert len(images) == len(texts) == 64 and drawn == [64] * count
    drawn.clear()
    sizes = [(len(images), len(texts)) for images, texts in SampleBatches(model, 150)]
    assert sizes == [(64, 64), (64, 64), (22, 22)] and drawn == [64, 64, 22]


def test_batches_tell_the_texts_they_draw():
    model = tiny()
    ((images, texts),) = SampleBatches(model, 40, temperature=0.0)
    assert torch.equal(images, model.sample(40, texts, temperature=0.0)) and len(set(texts)) == 9
    texts_of = lambda model, *text: [texts for _, texts in SampleBatches(model, 66, *text)]
    assert texts_of(model, "BC") == [["BC"] * 64, ["BC"] * 2]
    assert texts_of(tiny(text_length=None)) == [[""] * 64, [""] * 2]


def test_batches_differ():
    first, second = [images for images, _ in SampleBatches(tiny(), 128, "AB")]
    assert not torch.equal(first, second)


def test_batches_of_given_texts():
    texts = ["AB", "CA"] * 40
    drawn = SampleBatches(tiny(), 80, texts)
    assert [text for _, part in drawn for text in part] == texts
    for wrong in (texts[1:], [*texts, "AB"]):
        with pytest.raises(InputError, match="80 texts"):
            SampleBatches(tiny(), 80, wrong)


def test_an_error_in_a_draw_does_not_end_the_batches_in_silence(monkeypatch):
    def draw(*_):
        raise IndexError("of a draw")

    model = tiny()
    monkeypatch.setattr(model, "sample", draw)
    with pytest.raises(IndexError, match="of a draw"):
        list(SampleBatches(model, 3))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems draw in one process")
@pytest.mark.parametrize("context", [None, (2, 2)])
def test_batches_of_all_cores_are_the_same(context, monkeypatch):
    """Whichever process draws them, in whichever order."""
    batches = SampleBatches(tiny(context=context), 150)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    loader = batches.by_all_cores([2, 0, 1])
    assert loader.num_workers == 2
    for k, (images, texts) in zip([2, 0, 1], loader, strict=True):
        expected, its_texts = batches[k]
        assert texts == its_texts and torch.equal((255 * expected).round().byte(), images)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems draw in one process")
def test_individual_files_of_several_processes(conditional, monkeypatch):
    run(conditional, "--n", 150, "--individual", "one")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    run(conditional, "--n", 150, "--individual", "two")
    contents = lambda folder: {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    assert contents("one") == contents("two") and len(contents("two")) == 151


@kinds
def test_global_random_state_is_left_alone(kind):
    model = tiny(**KINDS[kind])
    before = torch.get_rng_state()
    sample_sheet(model, 3)
    plot_samples(model, 2)
    save_individual(model, "out", 2)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------------------- figures


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
        assert shown.min() >= 0 and shown.max() <= 1


@pytest.mark.parametrize(
    "draw",
    [plot_samples, plot_reconstructions, plot_levels, plot_interpolation, plot_prior_vs_aggregate],
)
def test_path_writes_the_figure(draw):
    model = tiny()
    draw(model, *[] if draw is plot_samples else [images_for(model, 2)], n=2, path="figure.png")
    assert read_image("figure.png").float().std() > 1


@pytest.mark.parametrize("draw", [plot_samples, plot_levels, plot_prior_vs_aggregate])
def test_seed_of_a_figure(draw):
    model = tiny(text_length=None, inner_config=[[("res", 4)]])
    data_set = [] if draw is plot_samples else [images_for(model, 3)]
    shown = [pictures(draw(model, *data_set, n=2, seed=seed), 1) for seed in (0, 0, 1)]
    assert not torch.equal(shown[0], shown[2])
    assert torch.equal(shown[0], shown[1])


@pytest.mark.parametrize("draw", [plot_reconstructions, plot_levels, plot_prior_vs_aggregate])
def test_empty_data_set(draw):
    with pytest.raises(InputError, match="data set is empty"):
        draw(tiny(), [])


def test_plot_samples():
    """A row per temperature, of the texts written over the columns."""
    model = tiny()
    figure = plot_samples(model, 3, temperatures=(0.0, 1.0), seed=2)
    texts = [axis.get_title() for axis in figure.axes[:3]]
    assert len(set(texts)) > 1
    for row, t in zip(pictures(figure, 2), (0.0, 1.0), strict=True):
        torch.testing.assert_close(row, as_shown(model.sample(3, texts, t, seeded(2))))
    assert [figure.axes[i].get_ylabel() for i in (0, 3)] == ["T = 0", "T = 1"]
    assert [axis.get_title() for axis in plot_samples(model, 2, "CA", [1.0]).axes] == ["CA", "CA"]
    with pytest.raises(InputError, match="unconditional"):
        plot_samples(tiny(text_length=None), 2, "CA")


def test_plot_reconstructions():
    model = tiny()
    items = images_for(model, 2)
    x, y = batch_of(model, items)
    figure = plot_reconstructions(model, items, seed=1)
    shown = pictures(figure, 2)
    torch.testing.assert_close(shown[0], as_shown(x))
    torch.testing.assert_close(shown[1], as_shown(model.reconstruct(x, y, seeded(1))))
    texts = ["".join(CHARSET[i] for i in row) for row in y]
    assert [axis.get_title() for axis in figure.axes[:2]] == texts


@pytest.mark.parametrize("silent", [None, 0, 1, 2])
def test_each_row_of_plot_levels_changes_one_level(silent):
    """A level that has no way into the image leaves its own row without change, and no other."""
    model = tiny()
    if silent is not None:
        torch.nn.init.zeros_(model.levels[silent].from_z.weight)
    items = images_for(model, 1)
    figure = plot_levels(model, items, 2)
    rows = pictures(figure, 4)
    titles = [figure.axes[i].get_ylabel() for i in range(0, 8, 2)]
    assert titles == ["x", "z_3 anew", "z_2 anew", "z_1 anew"]
    assert torch.equal(rows[0], as_shown(items[0][0][None]).expand_as(rows[0]))
    for row, level in zip(rows[1:], (2, 1, 0), strict=True):
        assert (row.std(0).mean() > 1e-3) == (level != silent), level


def test_plot_levels_keeps_the_other_levels():
    """With priors that give the posterior's own draw, all rows show the decoded image."""
    model = tiny()
    items = images_for(model, 1)
    x, y = batch_of(model, items)
    latents = model.encode(x, y, seeded(1))
    for level, z in zip(model.levels, latents, strict=True):
        z = z.expand(2, *z.shape[1:])
        level.prior = lambda h, y, z=z: DiagonalGaussian(z, torch.full_like(z, -80.0))
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
        assert not torch.allclose(row[1], ends[0], atol=1e-3) and not torch.allclose(
            row[1], ends[1], atol=1e-3
        )
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
    zeros = torch.zeros(2, *model.levels[-1].shape)
    use = lambda mu: monkeypatch.setattr(
        generate, "fit_aggregate", lambda *_, **__: DiagonalGaussian(mu, zeros)
    )
    use(zeros)
    assert torch.equal(*draw())  # the aggregate is N(0, I)
    use(zeros + 3)
    assert not torch.allclose(*draw(temperature=0.0), atol=0.01)


@pytest.mark.parametrize("pair", [(0, 3), (-1, 0)])
def test_interpolation_between_images_that_are_not_there(pair):
    model = tiny()
    with pytest.raises(InputError, match="^pair: .* 0 to 2"):
        plot_interpolation(model, images_for(model, 3), pair)


# ---------------------------------------------------------------------------- slerp, aggregate


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
    steps = torch.stack([norms(after - before) for before, after in pairwise(path)])
    torch.testing.assert_close(steps, steps[:1].expand_as(steps), atol=1e-4, rtol=1e-3)


def test_slerp_of_a_right_angle():
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    angle = math.pi / 6
    torch.testing.assert_close(
        slerp(a, b, torch.tensor(1 / 3)), torch.tensor([[math.cos(angle), math.sin(angle)]])
    )


@pytest.mark.parametrize("distance", [0, 1e-7, 1e-5, 1e-3])
def test_slerp_of_nearly_parallel_inputs(distance):
    a, b = two((2, 3, 4))
    b = a + distance * b
    for i in range(4):
        for share in SHARES:
            torch.testing.assert_close(
                slerp(a[i : i + 1], b[i : i + 1], share),
                torch.lerp(a, b, share)[i : i + 1],
                atol=1e-4,
                rtol=1e-4,
            )


def test_slerp_of_a_batch_with_a_parallel_pair():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    torch.testing.assert_close(
        slerp(a, b, torch.tensor(0.5)), torch.tensor([[1.0, 0.0], [0.5**0.5, 0.5**0.5]])
    )


@pytest.mark.parametrize("factor", [-1, -2.5])
def test_slerp_of_opposite_inputs(factor):
    a, _ = two((2, 3, 4))
    path = torch.stack([slerp(a, factor * a, share) for share in SHARES])
    assert path.isfinite().all()
    torch.testing.assert_close(path[0], a)
    torch.testing.assert_close(path[-1], factor * a)


def test_slerp_of_zeros():
    a, b = torch.zeros(1, 3), torch.ones(1, 3)
    assert all(
        slerp(*pair, share).isfinite().all()
        for pair in [(a, a), (a, b), (b, a)]
        for share in SHARES
    )


@pytest.mark.parametrize(
    "kind, most, used",
    [*((kind, 512, 70) for kind in KINDS), ("conditional", 10, 10), ("conditional", 64, 64)],
)
def test_aggregate_is_the_mean_and_variance_of_z(kind, most, used):
    model = tiny(**KINDS[kind])
    items = images_for(model, 70)
    aggregate = fit_aggregate(model, items, 5, most, seed=1)
    generator = seeded(1)
    parts = [items[: min(64, used)], items[64:used]]  # as many at once as in the code
    draws = [model.encode(*batch_of(model, part), generator)[-1] for part in parts if part]
    z = torch.cat(draws)
    assert len(z) == used
    assert aggregate.mu.shape == aggregate.logvar.shape == (5, *model.levels[-1].shape)
    for mu, logvar in zip(*aggregate, strict=True):
        torch.testing.assert_close(mu, z.mean(0))
        torch.testing.assert_close(logvar.exp(), (z - z.mean(0)).square().mean(0))
    first, second, *_ = aggregate.sample(1.0, seeded())
    assert not torch.equal(first, second)


def test_aggregate_of_one_image_is_its_posterior():
    model = tiny(text_length=None)
    x, _ = images_for(model, 1)[0]
    q = model.infer(x[None])[1][-1].q
    aggregate = fit_aggregate(model, [(x, torch.zeros(0))] * 512, 1)
    sigma = (q.logvar / 2).exp()
    assert ((aggregate.mu - q.mu).abs() < 5 * sigma / 512**0.5).all()
    torch.testing.assert_close(aggregate.logvar, q.logvar, atol=0.35, rtol=0)


# ---------------------------------------------------------------------------- shipped checkpoint


@pytest.fixture(scope="module")
def shipped():
    if not generate.CHECKPOINTS["captcha"].is_file():
        pytest.skip("checkpoints/hvae.pt is missing")
    return HVAE.load(generate.CHECKPOINTS["captcha"])


def test_shipped_file_fits_the_default_model(shipped):
    path = generate.CHECKPOINTS["captcha"]
    assert path.stat().st_size < 20e6
    weights, _ = read_tensors(path)
    default = HVAE()
    assert shipped.config == default.config
    shapes = lambda weights: {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes(weights) == shapes(default.state_dict())
    assert all(weight.isfinite().all() for weight in weights.values())


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


def test_the_fonts_checkpoint_fits_grey_pictures():
    """It knows both cases and several lengths; of other texts only their places are new."""
    model = HVAE.load(generate.FOLDER / "fonts.pt")
    fonts = ["DroidSansMono.ttf"]
    render, _ = generate.held_out_images(model, "captcha", limit=1, fonts=fonts)[0]
    assert render.shape == model.input_shape
    assert model.sample(2, ["a7Q", "bCd4Efg"], 1.0, seeded()).shape == (2, 3, 60, 160)
    texts = dict(text_length=6, shortest=4, charset="23456789abcdefgh")
    renders = CaptchaDataset(4, image_size=(40, 120), font_sizes=(28, 34), **texts)
    pictures = [(image.mean(0, keepdim=True), label) for image, label in renders]
    kind = dict(text_length=6, lengths=renders.lengths, charset=renders.charset)
    grey, untrained = adapted(model, input_size=(40, 120), input_channels=1, **kind)
    assert all(name.endswith(".bias") for name in untrained)
    assert max(evaluate(grey.eval(), pictures)["kl"]) < 300


def test_single_grey_images_are_rounded(tmp_path):
    """As those on sheets: 0.999 is white."""
    write_image(torch.full((1, 4, 4), 0.999), tmp_path / "grey.png")
    image = Image.open(tmp_path / "grey.png")
    assert image.mode == "L" and image.getextrema() == (255, 255)
