"""Rendered and stored captchas: the same everywhere, like the unpatched renderer's, and never mixed up."""

import hashlib
import math
import os
import pickle
import random
import secrets
import subprocess
import sys
import types
from pathlib import Path

import captcha.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from dataset import CaptchaDataset, CaptchaFolder, SeededSecrets, decode_text, encode_text, main, make_loader
from model import DIGITS, UPPERCASE

ROOT = Path(__file__).resolve().parent.parent
CHARSET = DIGITS + UPPERCASE


def fingerprint(dataset) -> str:
    parts = [image.numpy().tobytes() + label.numpy().tobytes() for image, label in dataset]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def same(a, b) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) and torch.equal(s, t) for (x, s), (y, t) in zip(a, b))


# ------------------------------------------------------------------------------------------------ text <-> indices


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


@pytest.mark.parametrize("indices", [[0, 36], [-1], [[0, 1]]])
def test_decode_refuses_what_is_no_text(indices):
    with pytest.raises(ValueError):
        decode_text(torch.tensor(indices))


# ------------------------------------------------------------------------------------------------ determinism


def test_items_have_the_promised_shapes_types_and_ranges():
    image, label = CaptchaDataset(3, image_size=(40, 90), text_length=5)[2]
    assert image.shape == (3, 40, 90) and image.dtype == torch.float32
    assert 0 <= image.min() and image.max() <= 1 and image.std() > 0
    assert label.shape == (5,) and label.dtype == torch.long


def test_another_process_draws_the_same():
    code = ("import sys; sys.path[:0] = ['.', 'tests']\n"
            "from test_dataset import *; print(fingerprint(CaptchaDataset(6, seed=3)))")
    there = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert there.stdout.strip() == fingerprint(CaptchaDataset(6, seed=3)), there.stderr


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_draw_the_same(method, tmp_path):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")
    plain, memory, file = (CaptchaDataset(8, cache=cache) for cache in (None, "memory", tmp_path))
    workers = 2 if method == "fork" else 1  # a spawned one takes seconds to import torch
    loader = DataLoader(plain + memory + file, None, num_workers=workers, multiprocessing_context=method)
    assert same(list(loader), [*plain] * 3)
    for dataset in (memory, file):  # the workers' images have reached this process
        assert all(torch.equal(dataset.cache.get(i).float() / 255, plain[i][0]) for i in range(8))


def test_an_item_does_not_depend_on_what_was_drawn_before():
    dataset = CaptchaDataset(10)
    backwards = [dataset[i] for i in reversed(range(10))]
    assert same(backwards[::-1], CaptchaDataset(10))
    assert same([dataset[i] for i in range(4)], CaptchaDataset(4))  # nor on the size


def test_splits_seeds_and_indices_differ():
    datasets = [CaptchaDataset(8, split, seed=seed) for split in ("train", "val", "test") for seed in (0, 1, -1)]
    images = {image.numpy().tobytes() for dataset in datasets for image, _ in dataset}
    assert len(images) == 8 * 9


def test_the_dataset_survives_pickling(tmp_path):
    for cache in (None, "memory", tmp_path):
        dataset = CaptchaDataset(3, cache=cache)
        dataset[1]
        content = pickle.dumps(dataset)
        assert same(pickle.loads(content), dataset)
        if cache == tmp_path:
            assert len(content) < 20_000  # maps the file, does not copy it


# ------------------------------------------------------------------------------------------------ the renderer


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
    monkeypatch.setattr(dataset.renderer, "generate_image", lambda text: drawn.append(text) or generate(text))
    labels = [label for _, label in dataset]
    assert [decode_text(label, "xyz7") for label in labels] == drawn


def test_the_same_text_looks_the_same_by_the_renderer_itself():
    """Images of the unpatched renderer and ours agree in the mean of many summaries (two-sample z-tests)."""
    n = 200
    ours = torch.stack([image for image, _ in CaptchaDataset(n, seed=1)])
    renderer, texts = captcha.image.ImageCaptcha(160, 60), random.Random(1)
    theirs = [renderer.generate_image("".join(texts.choices(CHARSET, k=4))) for _ in range(n)]
    theirs = torch.from_numpy(np.stack([np.array(image) for image in theirs])).permute(0, 3, 1, 2) / 255

    def summaries(x):  # (n, 3 + 3 + 1 + 1 + 1)
        ink = (x.mean(1) < 0.85).float()
        return torch.cat([x.mean((2, 3)), x.std((2, 3)), x.amin((1, 2, 3))[:, None], ink.mean((1, 2))[:, None],
                          (x[..., 1:] - x[..., :-1]).abs().mean((1, 2, 3))[:, None]], dim=1).double()

    a, b = summaries(ours), summaries(theirs)
    z = (a.mean(0) - b.mean(0)) / ((a.var(0) + b.var(0)) / n).sqrt()
    assert z.abs().max() < 5.5, z  # a false alarm once in some millions of runs
    ratio = (a.var(0) / b.var(0)).log().abs()
    assert ratio.max() < 1.2, ratio  # the spread agrees too, about a factor


def chi_square(values, n: int) -> float:
    """How many standard deviations the counts of 0..n-1 lie from uniform, roughly N(0, 1) if they are."""
    counts = np.bincount(values, minlength=n)
    assert len(counts) == n
    expected = len(values) / n
    return (((counts - expected) ** 2 / expected).sum() - (n - 1)) / math.sqrt(2 * (n - 1))


@pytest.mark.parametrize("n", [2, 3, 36, 61, 161])
def test_the_stand_in_is_uniform(n):
    stand_in = SeededSecrets(random.Random(n))
    assert abs(chi_square([stand_in.randbelow(n) for _ in range(200 * n)], n)) < 4.5
    assert abs(chi_square([stand_in.choice(range(n)) for _ in range(200 * n)], n)) < 4.5


def test_the_stand_in_has_uniform_bits_and_its_edges():
    stand_in = SeededSecrets(random.Random(0))
    bits = np.array([stand_in.randbits(32) for _ in range(4000)])
    assert abs(chi_square(bits >> 28, 16)) < 4.5 and abs(chi_square(bits & 15, 16)) < 4.5
    assert stand_in.randbelow(1) == 0
    with pytest.raises(ValueError):
        stand_in.randbelow(0)  # as the module does


def test_texts_are_uniform():
    labels = torch.cat([label for _, label in CaptchaDataset(400, image_size=(8, 8), font_sizes=[8])])
    assert abs(chi_square(labels.numpy(), 36)) < 4.5


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 90), st.integers(8, 90), st.integers(1, 7),
       st.text(CHARSET.lower() + "?!äß ", min_size=1, max_size=4), st.integers(),
       st.lists(st.integers(6, 60), min_size=1, max_size=3))
def test_every_valid_setting_renders(height, width, length, charset, seed, font_sizes):
    charset = "".join(dict.fromkeys(charset))
    dataset = CaptchaDataset(2, "val", (height, width), length, charset, seed, font_sizes=font_sizes)
    for image, label in dataset:
        assert image.shape == (3, height, width) and label.shape == (length,)
        assert len(decode_text(label, charset)) == length


def test_the_renderers_own_font_is_the_default():
    assert same(CaptchaDataset(3), CaptchaDataset(3, fonts=captcha.image.DEFAULT_FONTS, font_sizes=(42, 50, 56)))


# ------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize("name, value", [
    ("size", -1), ("size", 2.0), ("split", "training"), ("image_size", (4, 160)), ("image_size", (60, 0)),
    ("image_size", 60), ("text_length", 0), ("charset", ""), ("charset", "ABA"), ("seed", "0"), ("fonts", []),
    ("fonts", [__file__]), ("font_sizes", []), ("font_sizes", [0]), ("font_sizes", 42), ("cache", 3), ("cache", ""),
])
def test_a_bad_argument_is_named(name, value):
    with pytest.raises(ValueError, match=name):
        CaptchaDataset(**{"size": 4, name: value})


def test_a_missing_font_is_named():
    with pytest.raises(FileNotFoundError, match="nowhere.ttf"):
        CaptchaDataset(4, fonts=["nowhere.ttf"])


@pytest.mark.parametrize("i", [-1, 3, 10**12])
def test_an_index_outside_is_an_index_error(i):
    with pytest.raises(IndexError):
        CaptchaDataset(3)[i]


def test_an_empty_dataset_is_fine(tmp_path):
    for cache in (None, "memory", tmp_path):
        assert list(CaptchaDataset(0, cache=cache)) == []


def test_the_description_is_plain():
    description = CaptchaDataset(5, "test", (50, 100), 3, "AB", 7).description
    assert description["renderer"] == "captcha" and description["image_size"] == [50, 100]
    values = [description[key] for key in ("split", "size", "text_length", "charset", "seed")]
    assert values == ["test", 5, 3, "AB", 7]


# ------------------------------------------------------------------------------------------------ caches


def no_drawing(dataset, monkeypatch):
    def fail(text):
        raise AssertionError("rendered what the cache holds")

    monkeypatch.setattr(dataset.renderer, "generate_image", fail)


@pytest.mark.parametrize("where", ["memory", "folder"])
def test_a_cache_gives_the_same_images_and_draws_each_once(where, tmp_path, monkeypatch):
    plain = CaptchaDataset(6)
    cached = CaptchaDataset(6, cache=where if where == "memory" else tmp_path)
    assert same(cached, plain)
    no_drawing(cached, monkeypatch)
    image, _ = cached[2]
    image.zero_()  # what the caller does to an item leaves the cache alone
    assert same(cached, plain)


def test_a_partly_filled_file_is_continued(tmp_path, monkeypatch):
    plain = CaptchaDataset(6)
    first = CaptchaDataset(6, cache=str(tmp_path / "new" / "folder"))
    for i in (4, 1):
        first[i]
    first.cache.rows[3, :1000] = 77  # an image that was interrupted: some pixels, no flag
    del first
    second = CaptchaDataset(6, cache=tmp_path / "new" / "folder")
    assert [second.cache.get(i) is not None for i in range(6)] == [False, True, False, False, True, False]
    assert same(second, plain)
    third = CaptchaDataset(6, cache=tmp_path / "new" / "folder")
    no_drawing(third, monkeypatch)
    assert same(third, plain)


def test_a_file_is_never_read_as_another_dataset(tmp_path):
    other_font = tmp_path / "other.ttf"
    other_font.write_bytes(Path(captcha.image.DEFAULT_FONTS[0]).read_bytes() + b"\0")
    settings = [{}, {"seed": 1}, {"split": "val"}, {"size": 5}, {"image_size": (160, 60)}, {"text_length": 5},
                {"charset": CHARSET[::-1]}, {"font_sizes": [42]}, {"font_sizes": [50]}, {"fonts": [other_font]}]
    for setting in settings:
        arguments = {"size": 4, **setting}
        assert same(CaptchaDataset(**arguments, cache=tmp_path), CaptchaDataset(**arguments))
    assert len(list(tmp_path.glob("*.u8"))) == len(settings)


def test_a_font_that_changes_under_its_name_gets_a_new_file(tmp_path):
    font = tmp_path / "font.ttf"
    for extra in (b"", b"\0"):
        font.write_bytes(Path(captcha.image.DEFAULT_FONTS[0]).read_bytes() + extra)
        CaptchaDataset(1, fonts=[font], cache=tmp_path)[0]
    assert len(list(tmp_path.glob("*.u8"))) == 2


def test_a_cache_without_space_is_refused(tmp_path):
    with pytest.raises(OSError, match="cache"):
        CaptchaDataset(10**12, cache=tmp_path)


def test_a_sparse_cache_needs_the_space_that_it_has_not_taken_yet(tmp_path, monkeypatch):
    make = lambda: CaptchaDataset(10_000, image_size=(16, 32), cache=tmp_path)
    make()[0]
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=10**6))
    with pytest.raises(OSError, match="cache"):
        make()


# ------------------------------------------------------------------------------------------------ images on disk


def test_export_and_read_back(tmp_path):
    options = "--n 5 --seed 4 --length 3 --size 40 80 --split val"
    main([*options.split(), "--export", str(tmp_path)])
    folder = CaptchaFolder(tmp_path, text_length=3)
    rendered = {int(path.stem.split("_")[1]): item for path, item in zip(folder.paths, folder)}
    assert same([rendered[i] for i in range(5)], CaptchaDataset(5, "val", (40, 80), 3, seed=4))
    assert folder.image_size == (40, 80) and folder.text_length == 3 and folder.charset == CHARSET
    assert folder.description == {"folder": tmp_path.name, "count": 5, "image_size": [40, 80]}


def test_the_sheet(tmp_path, capsys):
    path = tmp_path / "sheet.png"
    main(["--n", "8", "--out", str(path)])
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as sheet:
        assert sheet.size == (4 * 162 + 2, 2 * 62 + 2)


@pytest.mark.parametrize("arguments, named", [
    ("--charset AA", "charset"), ("--export x --charset A_", "'_'"), ("--n 0", "--n"), ("--length 0", "text_length"),
    ("--size 4 160", "image_size"), ("--fonts nowhere.ttf", "nowhere.ttf"), ("--out nowhere/a.png", "nowhere/a.png"),
    ("--out a.xyz", ".xyz"), ("--split dev", "dev"),
])
def test_bad_input_is_one_line_and_status_2(arguments, named, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments.split())
    *usage, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(usage) <= 1 and ": error: " in line and named in line
    assert not list(tmp_path.iterdir())


def save(path: Path, mode: str = "RGB", color=0, size=(20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def test_folder_reads_texts_from_names_in_order_of_paths(tmp_path):
    for name in ("b/A7KQ.png", "a/Z9.x.bmp", "a/Z8 1.JPG", "c7-3.png", "D6_0012.webp"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("not an image")
    (tmp_path / "._D6.png").write_text("hidden")
    (tmp_path / "b/A7KQ.png").rename(tmp_path / "b/A7.png")
    folder = CaptchaFolder(tmp_path, text_length=2)
    assert [decode_text(label) for _, label in folder] == ["D6", "Z8", "Z9", "A7", "C7"]


def test_folder_keeps_case_where_the_charset_has_it(tmp_path):
    save(tmp_path / "aB.png")
    assert CaptchaFolder(tmp_path, text_length=2, charset="abAB")[0][1].tolist() == [0, 3]


def test_folder_without_texts_has_empty_labels(tmp_path):
    save(tmp_path / "anything at all.png")
    image, label = CaptchaFolder(tmp_path)[0]
    assert image.shape == (3, 10, 20) and label.shape == (0,) and label.dtype == torch.long


@pytest.mark.parametrize("mode, color, rgb", [
    ("L", 51, (51, 51, 51)), ("1", 1, (255, 255, 255)), ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
    ("RGBA", (255, 0, 0, 51), (255, 204, 204)), ("LA", (0, 51), (204, 204, 204)), ("I;16", 51 * 257, (51, 51, 51)),
    ("I", 51 * 257, (51, 51, 51)), ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
])
def test_any_image_becomes_rgb(tmp_path, mode, color, rgb):
    save(tmp_path / f"A.{'tif' if mode in ('CMYK', 'I') else 'png'}", mode, color)
    image, _ = CaptchaFolder(tmp_path)[0]
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
    assert image.shape == (3, 10, 16)
    assert (image[:, :, 2:-2] - 0.5).abs().max() < 0.1  # without antialiasing they would stay stripes


def test_folder_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CaptchaFolder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no images"):
        CaptchaFolder(tmp_path)
    good = save(tmp_path / "A7.png")
    with pytest.raises(ValueError, match="not a folder"):
        CaptchaFolder(good)
    for name, value in [("image_size", (0, 5)), ("text_length", 0), ("charset", "AA")]:
        with pytest.raises(ValueError, match=name):
            CaptchaFolder(tmp_path, **{name: value})
    with pytest.raises(ValueError, match="A7.png.*3 symbols"):
        CaptchaFolder(tmp_path, text_length=3)
    with pytest.raises(ValueError, match="A7.png"):
        CaptchaFolder(tmp_path, text_length=2, charset="AB")
    with pytest.raises(IndexError):
        CaptchaFolder(tmp_path)[-1]
    other = save(tmp_path / "B8.png", size=(30, 10))
    with pytest.raises(ValueError, match="B8.png.*10x30"):
        CaptchaFolder(tmp_path, text_length=2)
    assert len(CaptchaFolder(tmp_path, (10, 20), 2)) == 2
    other.write_bytes(b"no image")
    with pytest.raises(ValueError, match="B8.png"):
        CaptchaFolder(tmp_path, (10, 20), 2)


def hostile_folder(folder):
    """Two good images among files that are damaged, huge, of odd kinds or no images at all."""
    noise = np.random.default_rng(0).integers(0, 255, (50, 50, 3), np.uint8)
    Image.fromarray(noise).save(folder / "A7_whole.png")
    Image.fromarray(noise).save(folder / "A7_animated.gif", save_all=True, append_images=[Image.fromarray(noise)] * 3)
    whole = (folder / "A7_whole.png").read_bytes()
    (folder / "A7_cut.png").write_bytes(whole[:3000])  # its header is fine
    (folder / "A7_empty.png").write_bytes(b"")
    (folder / "A7_text.jpg").write_bytes(b"no image")
    (folder / "notes.txt").write_text("not even by name")
    flipped = bytearray(whole)
    flipped[len(flipped) // 2] ^= 255
    (folder / "A7_flipped.png").write_bytes(flipped)
    Image.new("1", (12_000, 9_000)).save(folder / "A7_huge.png")
    Image.new("F", (50, 50)).save(folder / "A7_real.tiff")
    Image.fromarray(noise).save(folder / "misnamed.png")
    return {"A7_whole.png", "A7_animated.gif"}


def test_bad_files_of_a_folder_are_skipped_once_and_named(tmp_path):
    good = hostile_folder(tmp_path)
    with pytest.warns(UserWarning) as warned:
        folder = CaptchaFolder(tmp_path, text_length=2, skip_bad=True)
    assert {path.name for path in folder.paths} == good and len(folder) == 2
    bad = ["A7_cut.png", "A7_empty.png", "A7_flipped.png", "A7_huge.png", "A7_real.tiff", "A7_text.jpg", "misnamed.png"]
    assert [path.name for path in folder.skipped] == bad
    messages = [str(w.message) for w in warned]
    assert all(sum(name in message for message in messages) == 1 for name in bad)
    assert all(image.shape == (3, 50, 50) and decode_text(label) == "A7" for image, label in folder)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """Whatever a file calls itself, no other program gets to see it."""
    script = tmp_path / "bin" / "gs"
    script.parent.mkdir()
    script.write_text(f"#!/bin/sh\ntouch {tmp_path / 'run'}\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(script.parent), prepend=os.pathsep)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 8\n%%EndComments\nshowpage\n%%EOF\n")
    with pytest.raises(ValueError, match="a.png: not a readable image"):
        CaptchaFolder(tmp_path / "in")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["A7_cut.png", "A7_flipped.png", "A7_huge.png", "A7_empty.png"])
def test_a_damaged_image_is_named_before_training_starts(name, tmp_path):
    hostile_folder(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != name:
            path.unlink()
    with pytest.raises(ValueError, match=name):
        CaptchaFolder(tmp_path)
    with pytest.warns(UserWarning, match=name), pytest.raises(ValueError, match="none of its 1 images is good"):
        CaptchaFolder(tmp_path, skip_bad=True)


# ------------------------------------------------------------------------------------------------ loader


def epochs(workers: int, seed: int, n: int = 2) -> list[torch.Tensor]:
    dataset = CaptchaDataset(24, image_size=(12, 16), text_length=8, font_sizes=[8])  # texts long enough to differ
    loader = make_loader(dataset, 5, workers=workers, seed=seed)
    return [torch.cat([labels for _, labels in loader]) for _ in range(n)]


def test_an_epoch_holds_each_index_once_and_its_order_is_the_seeds():
    expected = sorted(label.tolist() for _, label in CaptchaDataset(24, image_size=(12, 16), text_length=8))
    alone, with_workers, other = epochs(0, seed=1), epochs(2, seed=1), epochs(0, seed=2)
    for epoch in with_workers:
        assert sorted(epoch.tolist()) == expected
    assert all(torch.equal(a, b) for a, b in zip(alone, with_workers))
    assert not torch.equal(alone[0], alone[1]) and not torch.equal(alone[0], other[0])


def test_the_loader_keeps_order_and_drops_the_rest_when_told():
    dataset = CaptchaDataset(7)
    batches = list(make_loader(dataset, 3, shuffle=False, workers=0, drop_last=True, pin_memory=False))
    assert [len(images) for images, _ in batches] == [3, 3]
    assert torch.equal(torch.cat([images for images, _ in batches]), torch.stack([dataset[i][0] for i in range(6)]))


def test_the_default_loader_works():
    images, labels = next(iter(make_loader(CaptchaDataset(4), 2)))
    assert images.shape == (2, 3, 60, 160) and labels.shape == (2, 4)
