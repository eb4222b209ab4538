"""Rendered and stored CAPTCHAs: the same everywhere, drawn as the renderer does, never mixed up."""

import hashlib
import math
import os
import pickle
import random
import secrets
import shutil
import subprocess
import sys
import unicodedata
import warnings
from pathlib import Path

import captcha.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dataset import (
    DIGITS,
    SPLITS,
    UPPERCASE,
    CaptchaDataset,
    CaptchaFolder,
    SeededSecrets,
    decode_text,
    encode_text,
    main,
    make_loader,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no text has"),  # some symbol
    pytest.mark.filterwarnings("ignore:.*letters of both cases"),
]
ROOT = Path(__file__).resolve().parent.parent
CHARSET = DIGITS + UPPERCASE


def digest(dataset) -> str:
    parts = [image.numpy().tobytes() + label.numpy().tobytes() for image, label in dataset]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def same(a, b) -> bool:
    """Whether two datasets have the same images and labels."""
    return len(a) == len(b) and digest(a) == digest(b)


# ---------------------------------------------------------------------------- text


@given(st.text(CHARSET))
def test_decode_undoes_encode(text):
    indices = encode_text(text)
    assert indices.dtype == torch.long and indices.shape == (len(text),)
    assert decode_text(indices) == text


@given(st.text(CHARSET, max_size=5), st.characters().filter(lambda s: s not in CHARSET))
def test_encode_names_the_offending_symbol(text, symbol):
    with pytest.raises(ValueError) as error:
        encode_text(text + symbol)
    assert repr(symbol) in str(error.value)


@given(st.text(CHARSET, max_size=5), st.integers(0, 8))
def test_short_texts_end_in_blanks(text, more):
    indices = encode_text(text, CHARSET, len(text) + more)
    assert len(indices) == len(text) + more
    assert (indices[len(text) :] == len(CHARSET)).all()
    assert decode_text(indices, CHARSET) == text


def test_a_long_text_is_refused():
    with pytest.raises(ValueError, match="at most 3"):
        encode_text("ABCD", CHARSET, 3)


def test_renders_of_several_lengths():
    data = CaptchaDataset(200, image_size=(16, 40), text_length=4, shortest=2, charset="AB")
    texts = [decode_text(data[i][1], "AB") for i in range(len(data))]
    counts = [sum(len(text) == length for text in texts) for length in (2, 3, 4)]
    assert sum(counts) == 200 and min(counts) > 40
    assert all(len(label) == 4 for _, label in (data[0], data[1]))
    assert not torch.equal(data[0][0], CaptchaDataset(1, image_size=(16, 40))[0][0])
    assert data.other_split("val", 3).lengths == data.lengths == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="shortest"):
        CaptchaDataset(1, text_length=3, shortest=4)


def test_folder_of_texts_of_several_lengths(tmp_path):
    for name in ("A7.png", "B.png", "A7B_2.png"):
        save(tmp_path / name)
    data = CaptchaFolder(tmp_path, text_length=3)
    assert data.lengths == [1, 1, 1] and data.texts == ["A7", "A7B", "B"]
    assert [decode_text(label) for _, label in data] == data.texts
    assert all(label.shape == (3,) for _, label in data)
    longer = CaptchaFolder(tmp_path, text_length=4)  # for a model that knows longer texts
    assert longer.lengths == [1, 1, 1, 0] and all(label.shape == (4,) for _, label in longer)


def test_a_length_that_few_texts_have_is_told_of(tmp_path):
    for i in range(51):
        save(tmp_path / f"A7_{i}.png")
    assert CaptchaFolder(tmp_path, text_length=2).lengths is None
    save(tmp_path / "B.png")
    with pytest.warns(UserWarning, match=r"few texts have 1 symbols: 1, such as B\.png"):
        assert CaptchaFolder(tmp_path, text_length=2).lengths == [1, 51]


@pytest.mark.parametrize("indices", [[0, 37], [-1], [[0, 1]]])
def test_decode_refuses_what_is_not_a_text(indices):
    with pytest.raises(ValueError, match="outside|one text"):
        decode_text(torch.tensor(indices))


# ---------------------------------------------------------------------------- determinism


def test_items_have_the_promised_shapes_types_and_ranges():
    image, label = CaptchaDataset(3, image_size=(40, 90), text_length=5)[2]
    assert image.shape == (3, 40, 90) and image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0
    assert label.shape == (5,) and label.dtype == torch.long


def test_another_process_draws_the_same():
    code = (
        "import sys; sys.path[:0] = ['.', 'tests']\n"
        "from test_dataset import *; print(digest(CaptchaDataset(6, seed=3)))"
    )
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert there.stdout.strip() == digest(CaptchaDataset(6, seed=3)), there.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_draw_the_same(method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    dataset = CaptchaDataset(8)
    workers = 2 if method == "fork" else 1  # a spawned one takes seconds to import torch
    loader = DataLoader(dataset, None, num_workers=workers, multiprocessing_context=method)
    assert same(list(loader), dataset)


def test_an_item_does_not_depend_on_what_was_drawn_before():
    dataset = CaptchaDataset(10)
    backwards = [dataset[i] for i in reversed(range(10))]
    assert same(backwards[::-1], CaptchaDataset(10))
    assert same([dataset[i] for i in range(4)], CaptchaDataset(4))  # nor on the size


def test_splits_seeds_and_indices_differ():
    datasets = [CaptchaDataset(8, split, seed=seed) for split in SPLITS for seed in (0, 1, -1)]
    images = {image.numpy().tobytes() for dataset in datasets for image, _ in dataset}
    assert len(images) == 8 * 9


def test_the_other_split_is_of_the_same_kind():
    kind = {"image_size": (40, 90), "text_length": 3, "charset": "XYZ", "seed": 5}
    kind |= {"fonts": captcha.image.DEFAULT_FONTS, "font_sizes": [30]}
    assert same(CaptchaDataset(4, **kind).other_split("val", 3), CaptchaDataset(3, "val", **kind))


def test_the_dataset_survives_pickling():
    dataset = CaptchaDataset(3)
    assert same(pickle.loads(pickle.dumps(dataset)), dataset)


# ---------------------------------------------------------------------------- the renderer


def test_a_slice_is_no_index():
    with pytest.raises(TypeError, match="slice"):
        CaptchaDataset(5)[0:2]


def test_secrets_is_back_after_drawing():
    CaptchaDataset(1)[0]
    assert captcha.image.secrets is secrets


def test_secrets_is_back_after_an_error(monkeypatch):
    dataset = CaptchaDataset(1)

    def fail(text):
        assert captcha.image.secrets is not secrets
        raise RuntimeError("no ink")

    monkeypatch.setattr(dataset.renderer, "generate_image", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        dataset[0]
    assert captcha.image.secrets is secrets


def test_the_label_is_the_text_drawn(monkeypatch):
    dataset = CaptchaDataset(20, text_length=3, charset="xyz7")
    drawn, generate = [], dataset.renderer.generate_image
    monkeypatch.setattr(
        dataset.renderer, "generate_image", lambda text: drawn.append(text) or generate(text)
    )
    labels = [label for _, label in dataset]
    assert [decode_text(label, "xyz7") for label in labels] == drawn


def test_images_look_like_those_of_the_unpatched_renderer():
    """Their summaries agree in the mean (two-sample z-tests) and in the spread."""
    n = 200
    ours = torch.stack([image for image, _ in CaptchaDataset(n, seed=1)])
    renderer, texts = captcha.image.ImageCaptcha(160, 60), random.Random(1)
    theirs = [renderer.generate_image("".join(texts.choices(CHARSET, k=4))) for _ in range(n)]
    theirs = torch.from_numpy(np.stack([np.array(image) for image in theirs]))
    theirs = theirs.permute(0, 3, 1, 2) / 255

    def summaries(x):  # (n, 9)
        darkest, ink = x.amin((1, 2, 3)), (x.mean(1) < 0.85).float().mean((1, 2))
        edges = (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))
        singles = torch.stack([darkest, ink, edges], dim=1)
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), singles], dim=1).double()

    a, b = summaries(ours), summaries(theirs)
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
    assert z.abs().max() < 5.5, z  # a false alarm once in some millions of runs
    ratio = (a.var(0) / b.var(0)).log().abs()
    assert ratio.max() < 1.2, ratio


def chi_square(values, n: int) -> float:
    """How many standard deviations the counts of 0..n-1 lie from uniform; about N(0, 1)."""
    counts = np.bincount(values, minlength=n)
    assert len(counts) == n
    expected = len(values) / n
    return (((counts - expected) ** 2 / expected).sum() - (n - 1)) / math.sqrt(2 * (n - 1))


@pytest.mark.parametrize("n", [2, 3, 36, 61, 161])
def test_the_stand_in_is_uniform(n):
    stand_in = SeededSecrets(n)
    assert abs(chi_square([stand_in.randbelow(n) for _ in range(200 * n)], n)) < 4.5
    assert abs(chi_square([stand_in.choice(range(n)) for _ in range(200 * n)], n)) < 4.5


def test_the_stand_in_has_uniform_bits_and_the_same_limits():
    stand_in = SeededSecrets(0)
    bits = np.array([stand_in.randbits(32) for _ in range(4000)])
    assert abs(chi_square(bits >> 28, 16)) < 4.5 and abs(chi_square(bits & 15, 16)) < 4.5
    assert stand_in.randbelow(1) == 0
    with pytest.raises(ValueError):
        stand_in.randbelow(0)  # as the module does


def test_texts_are_uniform():
    dataset = CaptchaDataset(400, image_size=(8, 8), font_sizes=[8])
    labels = torch.cat([label for _, label in dataset])
    assert abs(chi_square(labels.numpy(), 36)) < 4.5


@settings(max_examples=15, deadline=None)
@given(
    st.integers(8, 90),
    st.integers(8, 90),
    st.integers(1, 7),
    st.text(CHARSET.lower() + "?!äß ", min_size=1, max_size=4),
    st.integers(),
    st.lists(st.integers(6, 60), min_size=1, max_size=3),
)
def test_every_valid_setting_renders(height, width, length, charset, seed, font_sizes):
    charset = "".join(dict.fromkeys(charset))
    size = (height, width)
    dataset = CaptchaDataset(2, "val", size, length, charset, seed, font_sizes=font_sizes)
    for image, label in dataset:
        assert image.shape == (3, height, width) and label.shape == (length,)
        assert len(decode_text(label, charset)) == length


def test_the_renderers_own_font_is_the_default():
    named = CaptchaDataset(3, fonts=captcha.image.DEFAULT_FONTS, font_sizes=(42, 50, 56))
    assert same(CaptchaDataset(3), named)


def test_fonts_that_packages_bring_need_no_path():
    """A checkpoint names them without one, so that any machine finds them; others keep theirs."""
    default = captcha.image.DEFAULT_FONTS[0]
    by_name = CaptchaDataset(3, fonts=["DroidSansMono.ttf", "DejaVuSerif.ttf"])
    by_path = CaptchaDataset(3, fonts=[default, *by_name.fonts[1:]])
    assert same(by_name, by_path) and not same(by_name, CaptchaDataset(3))
    for dataset in (by_name, by_path, by_name.other_split("val", 2)):
        assert dataset.description["fonts"] == ["DroidSansMono.ttf", "DejaVuSerif.ttf"]


def test_a_font_elsewhere_keeps_its_path(tmp_path, monkeypatch):
    """Also when a package has a file of that name."""
    shutil.copy(captcha.image.DEFAULT_FONTS[0], tmp_path / "DejaVuSans.ttf")
    monkeypatch.chdir(tmp_path)
    dataset = CaptchaDataset(3, fonts=["DejaVuSans.ttf"])
    assert dataset.description["fonts"] == [str(tmp_path / "DejaVuSans.ttf")]
    assert same(dataset, CaptchaDataset(3))


# ---------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    "name, values",
    [
        ("size", [-1, 2.0]),
        ("split", ["training"]),
        ("image_size", [(4, 160), (60, 0), 60]),
        ("text_length", [0]),
        ("charset", ["", "ABA"]),
        ("seed", ["0"]),
        ("fonts", [[], "font.ttf", [__file__]]),
        ("font_sizes", [[], [0], 42]),
    ],
)
def test_a_bad_argument_is_named(name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            CaptchaDataset(**{"size": 4, name: value})


def test_a_missing_font_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.ttf"):
        CaptchaDataset(4, fonts=["nowhere.ttf"])


@pytest.mark.parametrize("i", [-4, 3, 10**12])
def test_an_index_outside_is_an_index_error(i):
    with pytest.raises(IndexError):
        CaptchaDataset(3)[i]


def test_an_empty_dataset_is_fine():
    assert list(CaptchaDataset(0)) == []


def test_the_description_is_plain():
    description = CaptchaDataset(5, "test", (50, 100), 3, "AB", 7).description
    assert description["renderer"] == "captcha" and description["image_size"] == [50, 100]
    values = [description[key] for key in ("split", "size", "text_length", "charset", "seed")]
    assert values == ["test", 5, 3, "AB", 7]


# ---------------------------------------------------------------------------- command line


def test_export_and_read_back(tmp_path):
    options = "--n 5 --seed 4 --length 3 --size 40 80 --split val"
    main([*options.split(), "--export", str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 5
    folder = CaptchaFolder(tmp_path, text_length=3)
    order = sorted(range(5), key=lambda i: folder.paths[i].stem.split("_")[1])
    assert same([folder[i] for i in order], CaptchaDataset(5, "val", (40, 80), 3, seed=4))
    assert folder.image_size == (40, 80) and folder.text_length == 3 and folder.charset == CHARSET
    assert folder.description == {
        "folder": tmp_path.name,
        "path": str(tmp_path.resolve()),
        "content": CaptchaFolder(tmp_path).description["content"],
        "count": 5,
        "image_size": [40, 80],
        "split": None,
        "skip_bad": False,
    }


def test_the_sheet(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    main(["--n", "8", "--out", str(path)])
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 162 + 2, 2 * 62 + 2)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("--charset AA", "charset"),
        ("--export x --charset A_", "'_'"),
        ("--n 0", "--n"),
        ("--n 100000", "--export"),
        ("--length 0", "text_length"),
        ("--size 4 160", "image_size"),
        ("--fonts nowhere.ttf", "nowhere.ttf"),
        ("--out nowhere/a.png", "nowhere/a.png"),
        ("--out a.xyz", ".xyz"),
        ("--out a.gif --n 1 --size 66000 8", "a.gif"),  # higher than a GIF can be
        ("--split dev", "dev"),
        ("--out a.png --export x", "--export: not allowed with argument --out"),
        ("--out captchas.png --export x", "--export: not allowed with argument --out"),
        ("--out ''", "--out"),
        ("--export ''", "--export"),
        ("--fonts ''", "--fonts"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main([argument.strip("'") for argument in arguments.split()])
    *usage, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(usage) <= 1 and ": error: " in line and named in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", ["--out", "--export"])
def test_an_interrupted_picture_leaves_nothing_behind(option, tmp_path, monkeypatch, capsys):
    def interrupted(path, content):
        with open(path, "wb") as file:
            file.write(content[: len(content) // 2])
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    Path("old").mkdir()
    Path("old/A.png").write_bytes(b"an earlier picture")
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([option, "old/A.png" if option == "--out" else "old"])
    assert stop.value.code == 130 and "interrupted" in capsys.readouterr().err
    assert [path.name for path in Path("old").iterdir()] == ["A.png"]
    assert Path("old/A.png").read_bytes() == b"an earlier picture"


# ---------------------------------------------------------------------------- images on disk


def save(path: Path, mode: str = "RGB", color=0, size=(20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def test_folder_reads_texts_from_names_in_order_of_paths(tmp_path):
    for name in ("b/A7KQ.png", "a/Z9.x.bmp", "a/Z8 1.JPG", "c7-3.png", "D6_0012.webp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._D6.png").write_text("hidden")
    (tmp_path / ".thumbs").mkdir()
    (tmp_path / ".thumbs" / "D7.png").write_text("in a hidden folder")
    (tmp_path / "b/A7KQ.png").rename(tmp_path / "b/A7.png")
    folder = CaptchaFolder(tmp_path, text_length=2)
    assert [decode_text(label) for _, label in folder] == ["D6", "Z8", "Z9", "A7", "C7"]


def test_folder_follows_links_once(tmp_path):
    save(tmp_path / "elsewhere" / "A1.png")
    save(tmp_path / "images" / "part" / "B2.png")
    links = tmp_path / "images" / "links"
    links.mkdir()
    (links / "there").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (links / "up").symlink_to(tmp_path / "images", target_is_directory=True)
    assert CaptchaFolder(tmp_path / "images", text_length=2).texts == ["A1", "B2"]


def test_a_link_does_not_rename_what_is_found_without_it(tmp_path):
    image = save(tmp_path / "z" / "B2.png")
    for folder in (".hidden", "a"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "link").symlink_to(tmp_path / "z", target_is_directory=True)
    assert CaptchaFolder(tmp_path, text_length=2).paths == [image]


def test_folder_keeps_case_where_the_charset_has_it(tmp_path):
    save(tmp_path / "aB.png")
    assert CaptchaFolder(tmp_path, text_length=2, charset="abAB")[0][1].tolist() == [0, 3]


def test_folder_without_texts_has_empty_labels(tmp_path):
    save(tmp_path / "anything at all.png")
    image, label = CaptchaFolder(tmp_path)[0]
    assert image.shape == (3, 10, 20) and label.shape == (0,) and label.dtype == torch.long


@pytest.mark.parametrize(
    "mode, color, rgb",
    [
        ("L", 51, (51, 51, 51)),
        ("1", 1, (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 51), (255, 204, 204)),
        ("LA", (0, 51), (204, 204, 204)),
        ("I;16", 51 * 257, (51, 51, 51)),
        ("I", 51 * 257, (51, 51, 51)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
    ],
)
def test_any_image_becomes_rgb(tmp_path, mode, color, rgb):
    save(tmp_path / f"A.{'tif' if mode in ('CMYK', 'I') else 'png'}", mode, color)
    image, _ = CaptchaFolder(tmp_path, channels=3)[0]
    assert (image * 255).round().flatten(1).T.unique(dim=0).tolist() == [list(rgb)]


def test_a_palette_becomes_rgb(tmp_path):
    image = Image.new("RGB", (20, 10), (10, 200, 30)).quantize(4)
    image.save(tmp_path / "A.png")
    image.save(tmp_path / "B.png", transparency=image.getpixel((0, 0)))
    a, b = (item[0][:, 0, 0] * 255 for item in CaptchaFolder(tmp_path))
    assert a.round().tolist() == [10, 200, 30] and b.round().tolist() == [255, 255, 255]


def test_resizing_averages(tmp_path):
    stripes = np.zeros((40, 80), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "A.png")
    image, _ = CaptchaFolder(tmp_path, image_size=(10, 16))[0]
    assert image.shape == (1, 10, 16)
    assert (image[:, :, 2:-2] - 0.5).abs().max() < 0.1  # without antialiasing: still stripes


def test_a_grey_folder_is_grey_and_a_mixed_one_is_not(tmp_path):
    save(tmp_path / "A.png", "L", 51)
    save(tmp_path / "B.png", "I;16", 102 * 257)
    grey = CaptchaFolder(tmp_path)
    assert grey.channels == 1 and [round(255 * x.mean().item()) for x, _ in grey] == [51, 102]
    save(tmp_path / "C.png", "RGB", (255, 0, 0))
    assert CaptchaFolder(tmp_path)[0][0].shape == (3, 10, 20)
    assert round(255 * CaptchaFolder(tmp_path, channels=1)[2][0].mean().item()) == 76


def test_a_photograph_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "white")
    image.paste("black", (0, 0, 20, 5))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "A.png", exif=exif)
    x, _ = CaptchaFolder(tmp_path)[0]
    assert x.shape == (3, 20, 10)
    assert x[:, :, 6:].max() == 0 and x[:, :, :4].min() == 1


def test_the_commonest_size_counts(tmp_path):
    """Not that of the first file; without skip_bad, the odd one is named."""
    odd = save(tmp_path / "A0.png", size=(7, 7))
    for i in range(3):
        save(tmp_path / f"B{i}.png", "L")
    with pytest.raises(ValueError, match=r"A0\.png: is 7x7 .*most images are 10x20"):
        CaptchaFolder(tmp_path)
    with pytest.warns(UserWarning, match="skipped"):
        data = CaptchaFolder(tmp_path, skip_bad=True)
    assert (data.image_size, len(data), data.skipped) == ((10, 20), 3, [odd])
    assert data.channels == 1  # the odd file was the only one in colour


def test_labels_csv_is_not_read_without_texts(tmp_path):
    save(tmp_path / "A0.png")
    (tmp_path / "labels.csv").write_text("file,label\nA0.png,AB\n")
    assert len(CaptchaFolder(tmp_path)) == 1
    with pytest.raises(ValueError, match=r"labels\.csv"):
        CaptchaFolder(tmp_path, text_length=2)


def test_labels_csv_stands_beside_names(tmp_path):
    for name in ("one.png", "sub/two.png", "XY_3.png"):
        save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("name,text\none.png,ab\nsub/two.png, CD\n")
    folder = CaptchaFolder(tmp_path, text_length=2)
    texts = {path.name: text for path, text in zip(folder.paths, folder.texts, strict=True)}
    assert texts == {"one.png": "AB", "two.png": "CD", "XY_3.png": "XY"}
    (tmp_path / "labels.csv").write_text("name,text\none.png,AB\nsub/two.png,CD\ngone.png,AB\n")
    with pytest.warns(UserWarning, match=r"no images for 1 names, such as gone\.png"):
        assert len(CaptchaFolder(tmp_path, text_length=2)) == 3
    (tmp_path / "labels.csv").write_text("file,text\none.png,AB\n")
    with pytest.raises(ValueError, match=r"labels\.csv: expected rows of name,text"):
        CaptchaFolder(tmp_path, text_length=2)
    (tmp_path / "labels.csv").write_text("name,text\none.png,ABC\n")
    with pytest.raises(ValueError, match=r"one\.png: its text in labels\.csv"):
        CaptchaFolder(tmp_path, text_length=2)


@pytest.mark.parametrize(
    "rows, message",
    [
        ("one,AB\nelse,CD\n", r"labels\.csv: no file is named 'one'.*names are like 'one\.png'"),
        ("one.png,AB\none.png,AC\n", r"labels\.csv: one\.png has two texts: AB, AC"),
        ("one.png,AB\ntwo.png\n", r"two\.png: its text in labels\.csv should be .*, got ''"),
        ("one.png;AB\n", r"labels\.csv: no file is named 'one\.png;AB'"),
    ],
)
def test_labels_csv_that_would_be_misread(tmp_path, rows, message):
    """As names of six symbols would be taken for texts."""
    for name in ("one.png", "two.png"):
        save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("name,text\n" + rows)
    with pytest.raises(ValueError, match=message):
        CaptchaFolder(tmp_path, text_length=3)
    assert len(CaptchaFolder(tmp_path)) == 2


def test_accents_that_stand_apart_in_names(tmp_path):
    """As macOS writes names: a letter, then its accent."""
    apart = unicodedata.normalize("NFD", "йё")
    assert len(apart) == 4
    save(tmp_path / f"{apart}_1.png")
    save(tmp_path / f"{apart}_2.png")
    (tmp_path / "labels.csv").write_text("name,text\nйё_2.png,ёй\n", encoding="utf-8")
    assert CaptchaFolder(tmp_path, text_length=2, charset="ёй").texts == ["йё", "ёй"]


def test_letters_of_both_cases_are_told_of(tmp_path):
    """The default charset has no lower-case letters, so two glyphs would be one symbol."""
    for text in ("aB", "Ab"):
        save(tmp_path / f"{text}.png")
    with pytest.warns(UserWarning, match="both cases count as upper-case.*charset ABab "):
        assert CaptchaFolder(tmp_path, text_length=2).texts == ["AB", "AB"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = CaptchaFolder(tmp_path, text_length=2, charset="ABab")
    assert data.texts == ["Ab", "aB"]


def test_symbols_that_no_text_has(tmp_path):
    """Samples would ask for them, so the charset that would not is named."""
    for text in ("AB", "B2"):
        save(tmp_path / f"{text}.png")
    with pytest.warns(UserWarning, match="no text has 013.*charset 2AB "):
        CaptchaFolder(tmp_path, text_length=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CaptchaFolder(tmp_path, text_length=2, charset="AB2C")
        CaptchaFolder(tmp_path)


def test_a_new_file_moves_no_other_to_another_split(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i:03d}.png", "RGB", (i, 0, 0))
    names = lambda split: {
        folder.paths[i].name
        for folder in [CaptchaFolder(tmp_path, split=split)]
        for i in folder.order
    }
    before = {split: names(split) for split in ("train", "val", "test")}
    assert sum(map(len, before.values())) == 60 and set.union(*before.values()) == names(None)
    assert all(before.values())
    for i in range(60, 90):
        save(tmp_path / f"{i - 70:03d}_new.png", "RGB", (i, 0, 0))
    assert all(before[split] <= names(split) for split in before)


@pytest.mark.parametrize("n", [3, 4, 10])
def test_a_handful_of_images_still_has_all_splits(tmp_path, n):
    for i in range(n):
        save(tmp_path / f"{i}.png", "RGB", (i, 0, 0))
    folder = CaptchaFolder(tmp_path)
    sizes = [len(folder.other_split(split, n)) for split in ("train", "val", "test")]
    assert min(sizes) >= 1 and sum(sizes) == n


@pytest.mark.parametrize("hashes", ["001", "0ff", "111", "fff", "01f"])
def test_three_images_make_three_splits(hashes, tmp_path):
    """A hash from 0 to f stands for val (0), test (1: 0.19) or train."""
    for i in range(3):
        save(tmp_path / f"{i}.png", "RGB", (i, 0, 0))
    folder = CaptchaFolder(tmp_path)
    folder.hashes = [{"1": "3"}.get(digit, digit) * 16 for digit in hashes]
    assert [folder.other_split(split, 3).order for split in SPLITS].count([]) == 0


def test_a_part_of_a_split_has_texts_of_all_kinds(tmp_path):
    """Names begin with texts, so the first by name would share their first symbol."""
    for i in range(200):
        save(tmp_path / f"{'ABCDEFGHIJ'[i // 20]}_{i}.png", "RGB", (i, 0, 0))
    folder = CaptchaFolder(tmp_path, text_length=1)
    few, more = (folder.other_split("train", n).order for n in (40, 80))
    assert len(few) == 40 and set(few) < set(more) and more == sorted(more)
    assert len({folder.texts[i] for i in few}) >= 8


def test_folder_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CaptchaFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="root"):
        CaptchaFolder("")
    with pytest.raises(ValueError, match="no images"):
        CaptchaFolder(tmp_path)
    good = save(tmp_path / "A7.png")
    with pytest.raises(ValueError, match="not a folder"):
        CaptchaFolder(good)
    for name, value in [("image_size", (0, 5)), ("text_length", 0), ("charset", "AA")]:
        with pytest.raises(ValueError, match=name):
            CaptchaFolder(tmp_path, **{name: value})
    with pytest.raises(ValueError, match=r"A7\.png.*1 symbols"):
        CaptchaFolder(tmp_path, text_length=1)
    with pytest.raises(ValueError, match=r"A7\.png.*3 to 4 symbols"):
        CaptchaFolder(tmp_path, text_length=4, shortest=3)
    with pytest.raises(ValueError, match=r"A7\.png"):
        CaptchaFolder(tmp_path, text_length=2, charset="AB")
    with pytest.raises(IndexError):
        CaptchaFolder(tmp_path)[1]
    other = save(tmp_path / "B8.png", size=(30, 10))
    with pytest.raises(ValueError, match=r"B8\.png.*10x30"):
        CaptchaFolder(tmp_path, text_length=2)
    assert len(CaptchaFolder(tmp_path, (10, 20), 2)) == 2
    other.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"B8\.png"):
        CaptchaFolder(tmp_path, (10, 20), 2)


BAD = "A7_cut.png A7_empty.png A7_flipped.png A7_huge.png A7_real.tiff A7_text.jpg misnamed.png"


def hostile_folder(folder: Path) -> None:
    """Two good images among files that are damaged, huge, of odd kinds or not images at all."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8))
    image.save(folder / "A7_good.png")
    image.save(folder / "A7_animated.gif", save_all=True, append_images=[image] * 3)
    content = (folder / "A7_good.png").read_bytes()
    (folder / "A7_cut.png").write_bytes(content[:3000])  # its header is fine
    (folder / "A7_empty.png").write_bytes(b"")
    (folder / "A7_text.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not even by name")
    flipped = bytearray(content)
    flipped[len(flipped) // 2] ^= 255
    (folder / "A7_flipped.png").write_bytes(flipped)
    Image.new("1", (12_000, 9_000)).save(folder / "A7_huge.png")
    Image.new("F", (50, 50)).save(folder / "A7_real.tiff")
    image.save(folder / "misnamed.png")


def test_bad_files_of_a_folder_are_skipped_once_and_named(tmp_path):
    hostile_folder(tmp_path)
    with pytest.warns(UserWarning) as warned:
        folder = CaptchaFolder(tmp_path, text_length=2, skip_bad=True)
    assert [path.name for path in folder.paths] == ["A7_animated.gif", "A7_good.png"]
    assert [path.name for path in folder.skipped] == BAD.split()
    messages = [str(w.message) for w in warned]
    assert all(sum(name in message for message in messages) == 1 for name in BAD.split())
    assert len(folder) == len(list(folder)) == 2
    assert all(image.shape == (3, 50, 50) and decode_text(label) == "A7" for image, label in folder)


@pytest.mark.parametrize("name", ["A7_cut.png", "A7_flipped.png", "A7_huge.png", "A7_empty.png"])
def test_a_damaged_image_is_named_before_training_starts(name, tmp_path):
    hostile_folder(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != name:
            path.unlink()
    with pytest.raises(ValueError, match=name):
        CaptchaFolder(tmp_path)
    none_good = pytest.raises(ValueError, match="none of its 1 images is good")
    with pytest.warns(UserWarning, match=name), none_good:
        CaptchaFolder(tmp_path, skip_bad=True)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Whatever a file calls itself, no other program gets to see it."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    (tmp_path / "in").mkdir()
    postscript = (
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 8\n%%EndComments\nshowpage\n%%EOF\n"
    )
    (tmp_path / "in" / "a.png").write_text(postscript)
    with pytest.raises(ValueError, match=r"a\.png: not a readable image"):
        CaptchaFolder(tmp_path / "in")
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------- loader


def test_an_epoch_holds_each_index_once_and_its_order_is_the_seeds():
    # texts that are long enough to differ
    dataset = CaptchaDataset(24, image_size=(12, 16), text_length=8, font_sizes=[8])

    def two_epochs(workers: int, seed: int) -> list[torch.Tensor]:
        loader = make_loader(dataset, 5, workers=workers, seed=seed)
        return [torch.cat([labels for _, labels in loader]) for _ in range(2)]

    expected = sorted(label.tolist() for _, label in dataset)
    alone, with_workers, other = two_epochs(0, 1), two_epochs(2, 1), two_epochs(0, 2)
    assert all(sorted(epoch.tolist()) == expected for epoch in with_workers)
    assert all(map(torch.equal, alone, with_workers))
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], other[0])


def test_the_loader_keeps_order_when_told():
    dataset = CaptchaDataset(7)
    loader = make_loader(dataset, 3, shuffle=False, workers=0)
    batches = [images for images, _ in loader]
    assert [len(images) for images in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), torch.stack([dataset[i][0] for i in range(7)]))


def test_the_default_loader_works():
    images, labels = next(iter(make_loader(CaptchaDataset(4), 2)))
    assert images.shape == (2, 3, 60, 160) and labels.shape == (2, 4)
