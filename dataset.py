"""Images to train on, and their texts.

CaptchaDataset renders CAPTCHAs on the fly, CaptchaFolder reads them from disk, and MNIST holds
handwritten digits. Every item is a pair (image, label):

    image   float32 (3, H, W) in [0, 1]; (1, H, W) for grey folders and MNIST
    label   int64 (T,), the text as indices into the charset; a shorter one ends in blanks

`python dataset.py` writes a sheet of rendered CAPTCHAs to captchas.png; --help lists the options.
"""

import copy
import csv
import hashlib
import math
import operator
import os
import random
import re
import sys
import threading
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import captcha.image
import matplotlib
import numpy as np
import torch
from PIL import Image, ImageFont, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from hvae.cli import make_parser, one_line_errors, path_argument
from hvae.pictures import check_picture, write_image
from hvae.text import DIGITS, UPPERCASE, decode_text, encode_text, match_case, span
from hvae.validate import (
    InputError,
    is_int,
    validate_charset,
    validate_choice,
    validate_image_size,
    validate_int,
)

SPLITS = ("train", "val", "test")
DESCRIBED = ("seed", "split", "size", "text_length", "charset", "shortest")
# where fonts that are given by name alone are looked up
FONT_FOLDERS = (Path(captcha.image.DATA_DIR), Path(matplotlib.get_data_path()) / "fonts" / "ttf")
MIN_SIDE = 8  # pixels of a rendered image; below, symbols cannot be told apart
MAX_SHEET_PIXELS = 10**8  # a sheet is held in memory
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS, which runs a program
SEPARATORS = "_-. "  # the text in a file's name ends at the first of them
UNSAFE = SEPARATORS + '/\\:*?"<>|'  # symbols that a text at the start of a file's name cannot have


# ---------------------------------------------------------------------------- rendering


class SeededSecrets(random.Random):
    """A random stream with the names of the module `secrets`, which is itself a random.Random."""

    randbelow, randbits = random.Random.randrange, random.Random.getrandbits


def random_stream(seed: int, split: str, index: int) -> SeededSecrets:
    """The random numbers that draw image `index` of a split: others for every triple."""
    digest = hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=16).digest()
    return SeededSecrets(int.from_bytes(digest, "big"))


_renderer_lock = threading.Lock()


def render(renderer: captcha.image.ImageCaptcha, text: str, stream: SeededSecrets) -> Tensor:
    """The CAPTCHA of a text, uint8 (3, H, W), with all random choices taken from the stream.

    The renderer has no seed, so the name `secrets` in its module is replaced while it draws. The
    lock keeps threads from drawing from each other's streams.
    """
    with _renderer_lock:
        secrets = captcha.image.secrets
        captcha.image.secrets = stream
        try:
            image = renderer.generate_image(text)
        finally:
            captcha.image.secrets = secrets
    return pil_to_tensor(image)


@dataclass(eq=False)
class CaptchaDataset(Dataset):
    """CAPTCHAs of uniformly drawn texts in the default look of the `captcha` package.

    Image i depends on (seed, split, i) and the arguments alone: it is the same in every process,
    and on every machine with the same versions of captcha and Pillow. The splits share no random
    stream and hence no image.

    Args:
        size: number of images.
        split: 'train', 'val' or 'test'.
        image_size: (H, W) in pixels.
        text_length, charset: of the texts. Symbols that the fonts lack are drawn as boxes.
        shortest: fewest symbols; each length up to text_length is as frequent. None is text_length.
        fonts: TrueType files, one drawn per symbol; None is the font of the renderer. Those that
            come with captcha and matplotlib need no path: "DroidSansMono.ttf", "DejaVuSans.ttf".
        font_sizes: in pixels, one drawn per symbol; None is the renderer's (42, 50, 56).

    Raises:
        ValueError: naming the argument at fault.
        FileNotFoundError: naming the font that does not exist.
    """

    size: int
    split: str = "train"
    image_size: tuple[int, int] = (60, 160)
    text_length: int = 4
    charset: str = DIGITS + UPPERCASE
    seed: int = 0
    fonts: Sequence[str | Path] | None = None
    font_sizes: Sequence[int] | None = None
    shortest: int | None = None

    def __post_init__(self):
        validate_int("size", self.size, 0, sys.maxsize)
        validate_choice("split", self.split, SPLITS)
        validate_image_size("image_size", self.image_size, MIN_SIDE)
        validate_int("text_length", self.text_length, 1)
        if self.shortest is not None:
            validate_int("shortest", self.shortest, 1, self.text_length)
        validate_charset(self.charset)
        validate_int("seed", self.seed)
        if self.fonts is not None:
            self.fonts = find_fonts(self.fonts)
        sizes = self.font_sizes
        is_list = isinstance(sizes, (tuple, list)) and len(sizes) > 0
        if sizes is not None and not (is_list and all(is_int(n, 1) for n in sizes)):
            raise InputError(f"font_sizes: expected a list of whole numbers >= 1, got {sizes!r}")

        self.image_size = tuple(self.image_size)
        height, width = self.image_size
        self.renderer = captcha.image.ImageCaptcha(width, height, self.fonts, self.font_sizes)
        self.description = {
            "renderer": "captcha",
            "version": version("captcha"),
            **{name: getattr(self, name) for name in DESCRIBED},
            "image_size": [height, width],
            "fonts": [font_name(font) for font in self.fonts] if self.fonts else None,
            "font_sizes": list(self.font_sizes) if self.font_sizes else None,
        }

    @property
    def lengths(self) -> list[int] | None:
        """How frequent texts of 1, 2, ... symbols are; None: all are the longest."""
        if self.shortest is None:
            return None
        shorter = self.shortest - 1
        return [0] * shorter + [1] * (self.text_length - shorter)

    def other_split(self, split: str, size: int) -> "CaptchaDataset":
        """CAPTCHAs of the same kind from another split."""
        return replace(self, split=split, size=size)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = range(self.size)[operator.index(i)]  # or IndexError
        stream = random_stream(self.seed, self.split, i)
        length = self.text_length
        if self.shortest is not None:
            length = stream.randint(self.shortest, length)
        text = "".join(stream.choice(self.charset) for _ in range(length))
        image = render(self.renderer, text, stream)
        return image.float() / 255, encode_text(text, self.charset, self.text_length)


def find_fonts(fonts: Sequence[str | Path]) -> list[str]:
    """The paths of fonts, which are paths already, or names of files in FONT_FOLDERS."""
    if not isinstance(fonts, (tuple, list)) or not fonts:
        raise InputError(f"fonts: expected a list of font files, got {fonts!r}")
    found = []
    for font in fonts:
        places = [Path(font), *(folder / font for folder in FONT_FOLDERS)]
        path = next((str(place) for place in places if place.is_file()), None)
        if path is None:
            raise FileNotFoundError(f"fonts: no such file: {font}")
        try:
            ImageFont.truetype(path, 10)
        except OSError as error:
            raise InputError(f"fonts: {font} is not a readable font ({error})") from error
        found.append(path)
    return found


def font_name(path: str) -> str:
    """How a checkpoint names a font, so that other machines find it, too."""
    font = Path(path)
    return font.name if font.parent in FONT_FOLDERS else str(font.resolve())


def validate_path(name: str, path: str | Path) -> None:
    if not isinstance(path, (str, Path)) or path == "":
        raise InputError(f"{name}: expected a path, got {path!r}")


# ---------------------------------------------------------------------------- images on disk


class ImageFile(NamedTuple):
    """What CaptchaFolder knows of a file."""

    path: Path
    text: str
    hash: str  # of its content
    size: tuple[int, int]  # (H, W)
    is_grey: bool


class CaptchaFolder(Dataset):
    """The images under a folder, at any depth, sorted by path; hidden files are left out.

    The text of an image stands in the folder's labels.csv (columns name and text), or else it is
    the file's name up to the first '_', '-', '.' or space: A7KQ.png and A7KQ_0012.jpg both show
    A7KQ. It is upper-cased if the charset has no lower-case letters. Transparency becomes white,
    and photographs are turned as their EXIF orientation says.

    Every file is read once at the start, so that a damaged one does not end a training run later.

    Args:
        root: the folder.
        image_size: (H, W) to resize to; None keeps the size, which all images must share.
        text_length: of the longest texts; None reads no texts, and the labels are empty, (0,).
        shortest: fewest symbols of a text.
        charset: of the texts; None is the digits and the upper-case letters, and warns of those
            that no text has.
        skip_bad: leave out files that would raise, with a warning each, and list them in `skipped`.
        channels: 3 (RGB) or 1 (grey); None is 1 if all files are grey.
        split: 'train' (four fifths), 'val' or 'test' (a tenth each), by a hash of a file's
            content, so that a new file moves no other. None is all of them.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: naming the argument at fault; the folder, if it has no (good) images; or the
            file whose name is not a text, whose size differs, or which is not a readable image.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: tuple[int, int] | None = None,
        text_length: int | None = None,
        charset: str | None = None,
        skip_bad: bool = False,
        channels: int | None = None,
        split: str | None = None,
        shortest: int = 1,
    ):
        self.charset = DIGITS + UPPERCASE if charset is None else charset
        validate_path("root", root)
        validate_charset(self.charset)
        if image_size is not None:
            validate_image_size("image_size", image_size)
        if text_length is not None:
            validate_int("text_length", text_length, 1)
            validate_int("shortest", shortest, 1, text_length)
        validate_choice("channels", channels, (None, 1, 3))
        validate_choice("split", split, (None, *SPLITS))
        self.root, self.text_length, self.split = Path(root), text_length, split
        self.shortest, self.skip_bad = shortest, skip_bad
        self.image_size = tuple(image_size) if image_size else None  # None until all are read
        self.labels = {} if text_length is None else read_labels(self.root / "labels.csv")
        self.skipped: list[Path] = []
        files = self.of_one_size(self.read_files())
        if not files:
            raise InputError(f"{root}: none of its {len(self.skipped)} images is good")
        self.paths = [file.path for file in files]
        self.texts = [match_case(file.text, self.charset) for file in files]
        self.hashes = [file.hash for file in files]
        self.channels = channels or (1 if all(file.is_grey for file in files) else 3)
        self.lengths = None if text_length is None else self.count_lengths()
        if text_length is not None and charset is None:
            self.warn_of_default_charset(set("".join(file.text for file in files)))
        self.order = self.indices(split)
        self.description = {
            "folder": self.root.resolve().name,
            "path": str(self.root.resolve()),
            "content": hashlib.blake2b("".join(sorted(self.hashes)).encode()).hexdigest()[:16],
            "count": len(self),
            "image_size": list(self.image_size),
            "split": split,
            "skip_bad": skip_bad,
        }

    def read_files(self) -> list[ImageFile]:
        """The good images of the folder; others raise InputError, or are left out."""
        files, paths = [], find_images(self.root)
        self.check_labels({self.name_of(path) for path in paths})
        for path in tqdm(paths, desc="check", unit="image", delay=2):
            try:
                text, image = self.read_text(path), read_image(path)
            except InputError as error:
                self.leave_out(path, error)
                continue
            digest = hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()
            files.append(ImageFile(path, text, digest, image.size[::-1], image.mode == "L"))
        return files

    def check_labels(self, names: set[str]) -> None:
        """Warns of rows of labels.csv that have no image; raises InputError if none has."""
        missing = sorted(self.labels.keys() - names)
        if missing and len(missing) == len(self.labels):
            raise InputError(
                f"{self.root}/labels.csv: no file is named {next(iter(self.labels))!r}, nor as in "
                f"any other row; names are like {min(names)!r}"
            )
        if missing:
            warnings.warn(
                f"{self.root}/labels.csv: no images for {len(missing)} names, such as {missing[0]}",
                stacklevel=4,
            )

    def of_one_size(self, files: list[ImageFile]) -> list[ImageFile]:
        """The files of the commonest size, unless all are resized; others raise as above."""
        if self.image_size is not None or not files:
            return files
        ((self.image_size, _),) = Counter(file.size for file in files).most_common(1)
        usual = "{}x{}".format(*self.image_size)
        for file in files:
            if file.size != self.image_size:
                message = "is {}x{} (height x width)".format(*file.size)
                message += f", but most images are {usual}; give an image_size to resize them "
                message += "(--size), or leave such files out with skip_bad (--skip-bad)"
                self.leave_out(file.path, InputError(f"{file.path}: {message}"))
        return [file for file in files if file.size == self.image_size]

    def leave_out(self, path: Path, error: InputError) -> None:
        """Raises the error, or with skip_bad only warns of it."""
        if not self.skip_bad:
            raise error
        warnings.warn(f"skipped: {error}", stacklevel=4)
        self.skipped.append(path)

    def name_of(self, path: Path) -> str:
        """A file's path below the folder, as in labels.csv; macOS writes accents apart."""
        return unicodedata.normalize("NFC", path.relative_to(self.root).as_posix())

    def read_text(self, path: Path) -> str:
        """The text of a file, by labels.csv or its name; '' if the dataset has no texts."""
        if self.text_length is None:
            return ""
        name = self.name_of(path)
        text = self.labels.get(name)
        if text is not None and not set(text) <= set(self.charset):
            text = unicodedata.normalize("NFC", text.strip())
        source = "its text in labels.csv should be"
        if text is None:
            text = re.split(f"[{re.escape(SEPARATORS)}]", Path(name).name, maxsplit=1)[0]
            source = "its name should begin with"
        symbols = match_case(text, self.charset)
        fits = self.shortest <= len(symbols) <= self.text_length
        if not (fits and set(symbols) <= set(self.charset)):
            lengths = range(self.shortest, self.text_length + 1)
            expected = f"{span(lengths)} symbols of {self.charset}"
            raise InputError(f"{path}: {source} {expected}, got {text!r}")
        return text

    def count_lengths(self) -> list[int] | None:
        """How many texts have 1, 2, ... symbols; None if all are the longest."""
        lengths = [len(text) for text in self.texts]
        counts = Counter(lengths)
        for length, count in sorted(counts.items()):
            if 50 * count < len(lengths):
                name = self.paths[lengths.index(length)].name
                warnings.warn(
                    f"{self.root}: few texts have {length} symbols: {count}, such as {name}",
                    stacklevel=3,
                )
        if counts[self.text_length] == len(lengths):
            return None
        return [counts[n] for n in range(1, self.text_length + 1)]

    def warn_of_default_charset(self, written: set[str]) -> None:
        """Warns if letters of both cases become one, or of symbols that no text has."""
        used = set("".join(self.texts))
        unused = [symbol for symbol in self.charset if symbol not in used]
        if any(map(str.islower, written)) and any(map(str.isupper, written)):
            problem, used = "letters of both cases count as upper-case", written
        elif unused:
            problem = f"no text has {''.join(unused)}, but samples may"
        else:
            return
        occurring = "".join(sorted(used))
        warnings.warn(
            f"{self.root}: {problem}; what occurs is the charset {occurring} (--charset)",
            stacklevel=3,
        )

    def indices(self, split: str | None) -> list[int]:
        """The images of a split. Where chance leaves it none, the nearest hash is taken."""
        if split is None:
            return list(range(len(self.paths)))
        places = [int(digest, 16) / 2**64 for digest in self.hashes]
        split_of = ["val" if at < 0.1 else "test" if at < 0.2 else "train" for at in places]
        by_place = sorted(range(len(places)), key=places.__getitem__)
        for rank, name in ((2, "train"), (0, "val"), (1, "test")):
            if len(places) >= 3 and name not in split_of:
                split_of[by_place[rank]] = name
        chosen = [i for i, name in enumerate(split_of) if name == split]
        if not chosen:
            raise InputError(f"{self.root}: {len(places)} images are too few for a split {split!r}")
        return chosen

    def other_split(self, split: str | None, size: int) -> "CaptchaFolder":
        """`size` images of another split, or of all if it is None: those with the lowest hashes.

        The first by name would not do, because names begin with the texts.
        """
        other = copy.copy(self)
        by_hash = sorted(self.indices(split), key=self.hashes.__getitem__)
        other.split, other.order = split, sorted(by_hash[:size])
        other.description = {**self.description, "split": split, "count": len(other)}
        return other

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = self.order[i]
        height, width = self.image_size
        image = read_image(self.paths[i]).convert("L" if self.channels == 1 else "RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)  # with antialiasing
        label = encode_text(self.texts[i], self.charset, self.text_length)
        return pil_to_tensor(image).float() / 255, label


def read_labels(path: Path) -> dict[str, str]:
    """The texts of labels.csv by the files' names, relative to its folder; {} without the file."""
    if not path.is_file():
        return {}
    labels = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            for row in csv.DictReader(file, restval=""):
                name = unicodedata.normalize("NFC", row["name"].strip())
                if labels.setdefault(name, row["text"]) != row["text"]:
                    raise InputError(f"{path}: {name} has two texts: {labels[name]}, {row['text']}")
    except (KeyError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: expected rows of name,text below that heading, in UTF-8"
        ) from error
    return labels


def find_images(root: Path) -> list[Path]:
    """The files under a folder that have an image's extension, sorted by path, none hidden.

    Links to folders elsewhere are followed, to each folder once.
    """
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise InputError(f"{root}: not a folder")
    extensions = {end for end, name in Image.registered_extensions().items() if name in FORMATS}
    is_hidden = lambda name: name.startswith(".")
    paths, seen, top = [], set(), root.resolve()
    for folder, folders, names in os.walk(root, followlinks=True):
        real, by_name = Path(folder).resolve(), top / Path(folder).relative_to(root)
        if real in seen or (real != by_name and real.is_relative_to(top)):
            folders.clear()  # a link to what is found without it, which may lead round and round
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        paths += [Path(folder, name) for name in names if not is_hidden(name)]
    paths = [path for path in paths if path.suffix.lower() in extensions and path.is_file()]
    if not paths:
        raise InputError(f"{root}: no images in this folder")
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def read_image(path: Path) -> Image.Image:
    """The (first) image in a file, upright, as RGB, or as grey if it is.

    Raises:
        ValueError: it is not readable, or has more pixels than Pillow deems safe (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities that Pillow can read in spite of
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return to_8_bits(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise InputError(f"{path}: not a readable image ({error})") from error


def to_8_bits(image: Image.Image) -> Image.Image:
    """Any image with 8 bits a channel, grey (L) or RGB, with transparency on white."""
    if image.mode == "F":  # whose range is unknown
        raise InputError("its pixels are real numbers")
    is_grey = image.mode in ("1", "L", "LA") or image.mode.startswith("I")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        values = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("L" if is_grey else "RGB")


# ---------------------------------------------------------------------------- MNIST


class MNIST(Dataset):
    """Handwritten digits: image (1, 28, 28) in [0, 1], label (1,) the digit.

    The split 'train' is the first 55,000 of the official 60,000 training images, 'val' the last
    5,000, and 'test' the official 10,000. Images stay grey; train() and evaluate() binarise them
    on request.

    Args:
        split: 'train', 'val' or 'test'.
        root: the folder that holds MNIST/raw; the data are downloaded into it if it does not.
        text_length: 1 offers the digit to the model as its text; None does not.

    Raises:
        ValueError: naming the argument at fault.
        OSError: the data are not there and cannot be downloaded.
    """

    charset = DIGITS

    def __init__(
        self, split: str = "train", root: str | Path = "data", text_length: int | None = None
    ):
        validate_choice("split", split, SPLITS)
        validate_path("root", root)
        validate_choice("text_length", text_length, (None, 1))
        source = open_mnist(root, train=split != "test")
        end = len(source.data) * 11 // 12
        part = {"train": slice(end), "val": slice(end, None), "test": slice(None)}[split]
        self.images, self.digits = source.data[part], source.targets[part]
        self.split, self.root, self.text_length = split, root, text_length
        self.description = {"data": "MNIST", "split": split, "size": len(self.images)}

    def other_split(self, split: str, size: int) -> "MNIST":
        """The first `size` images of another split."""
        other = MNIST(split, self.root, self.text_length)
        other.images, other.digits = other.images[:size], other.digits[:size]
        return other

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.images[i][None].float() / 255, self.digits[i][None].long()


def open_mnist(root: str | Path, train: bool) -> datasets.MNIST:
    """torchvision's MNIST from a folder, or from the network."""
    try:
        return datasets.MNIST(root, train, download=True)  # downloads only what is missing
    except Exception as error:  # of many kinds: no network, no right to write, a damaged file
        raise OSError(
            f"MNIST is not in {root}/MNIST/raw, or damaged, and could not be downloaded "
            f"({type(error).__name__}). Name the folder that holds MNIST/raw, or remove what is "
            "in it and connect to a network."
        ) from error


# ---------------------------------------------------------------------------- loader


def make_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = True,
    workers: int | None = None,
    seed: int = 0,
) -> DataLoader:
    """Batches (images (B, C, H, W), labels (B, T)); every epoch has each index once.

    Args:
        workers: processes that load. None takes up to two and leaves a core to the caller; for
            fewer than 1000 images, which load sooner than a process starts, it takes none.
        shuffle: in another order in each epoch.
        seed: of the orders. Loaders with the same seed give the same epochs, with any workers.
    """
    if workers is None:
        workers = min(2, (os.cpu_count() or 1) - 1) if len(dataset) >= 1000 else 0
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle, num_workers=workers, generator=generator)


# ---------------------------------------------------------------------------- command line


def export(dataset: CaptchaDataset, folder: str | Path) -> None:
    """Writes every image as TEXT_INDEX.png, which CaptchaFolder reads back.

    Raises:
        ValueError: naming a symbol of the charset that cannot be in the text of a file's name.
        OSError: naming the file that could not be written.
    """
    for symbol in dataset.charset:
        if symbol in UNSAFE:
            raise InputError(f"charset: {symbol!r} cannot be part of a text in a file's name")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(len(dataset)), desc=str(folder), unit="image"):
        image, label = dataset[i]
        name = f"{decode_text(label, dataset.charset)}_{i:06d}.png"
        write_image(image, folder / name)


def write_sheet(dataset: Dataset, path: str | Path) -> None:
    """Writes all images of a dataset into one picture, four in a row."""
    if len(dataset) * math.prod(dataset.image_size) > MAX_SHEET_PIXELS:
        raise InputError(f"--n: {len(dataset)} images are too many for one sheet; try --export")
    write_image(make_grid([image for image, _ in dataset], nrow=4, pad_value=1), path)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(
        "Renders CAPTCHAs: a sheet of them, or with --export a folder of single images."
    )
    option = parser.add_argument
    output = parser.add_mutually_exclusive_group().add_argument
    output("--out", type=path_argument, default="captchas.png", metavar="FILE", help="the sheet")
    output("--export", type=path_argument, metavar="DIR", help="write images TEXT_INDEX.png here")
    option("--n", type=int, default=32, help="number of images")
    option("--seed", type=int, default=0, help="another seed gives other images")
    option("--split", choices=SPLITS, default="train", help="the splits of a seed share no image")
    option("--length", type=int, default=4, help="symbols in the longest text")
    option("--shortest", type=int, help="symbols in the shortest text; as many as in the longest")
    option("--charset", default=DIGITS + UPPERCASE, help="the symbols to draw from")
    option("--size", type=int, nargs=2, default=(60, 160), metavar=("H", "W"), help="in pixels")
    option("--fonts", type=path_argument, nargs="+", metavar="FILE", help="font files, or names")
    args = parser.parse_args(arguments)
    with one_line_errors(parser):
        validate_int("--n", args.n, 1)
        look = (args.size, args.length, args.charset, args.seed, args.fonts)
        dataset = CaptchaDataset(args.n, args.split, *look, shortest=args.shortest)
        if args.export:
            export(dataset, args.export)
        else:
            check_picture(args.out)  # errors come before the drawing
            write_sheet(dataset, args.out)
        print(f"{args.n} images: {args.export or args.out}")


if __name__ == "__main__":
    main()
