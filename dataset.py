"""Images to train on, and their texts: CAPTCHAs rendered on the fly (CaptchaDataset) or read from disk (CaptchaFolder),
and handwritten digits (MNIST).

Every item is a pair (image, label):

    image   float32 (3, H, W) in [0, 1]; (1, 28, 28) for MNIST
    label   int64 (T,), the text as indices into the charset

`python dataset.py` writes a sheet of rendered CAPTCHAs to captchas.png; `python dataset.py --help` tells what else.
"""

import argparse
import hashlib
import json
import operator
import os
import random
import re
import shutil
import threading
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, Sequence

import captcha.image
import numpy as np
import PIL
import torch
from PIL import Image, ImageFont, features
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler
from torchvision import datasets
from torchvision.utils import save_image
from tqdm import tqdm

from blocks import MOST_PIXELS, pixels, whole
from model import DIGITS, UPPERCASE

SPLITS = ("train", "val", "test")
SHEET_PIXELS = 10**8  # most on one sheet, which is in memory as a whole
MIN_SIDE = 8  # pixels; below, no symbol can be told from another
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # of all that Pillow reads: EPS, say, is a program to be run
SEPARATORS = "_-. "  # the text in a file's name ends at the first of them
UNSAFE = SEPARATORS + '/\\:*?"<>|'  # what a text must not contain to begin a file's name


# ------------------------------------------------------------------------------------------------ text <-> indices


def encode_text(text: str, charset: str = DIGITS + UPPERCASE) -> Tensor:
    """The text as indices into the charset, int64 (len(text),).

    Raises:
        ValueError: naming the first symbol that is not in the charset.
    """
    indices = [charset.find(symbol) for symbol in text]
    if -1 in indices:
        raise ValueError(f"text {text!r}: {text[indices.index(-1)]!r} is not in the charset {charset!r}")
    return torch.tensor(indices, dtype=torch.long)


def decode_text(indices: Tensor | Sequence[int], charset: str = DIGITS + UPPERCASE) -> str:
    """The text of indices (T,) into the charset; undoes encode_text.

    Raises:
        ValueError: the indices are not one row, or naming the first that is outside the charset.
    """
    indices = torch.as_tensor(indices)
    if indices.dim() != 1:
        raise ValueError(f"expected the indices of one text, (T,), got {tuple(indices.shape)}")
    for i in indices.tolist():
        if not 0 <= i < len(charset):
            raise ValueError(f"index {i} is outside the charset's 0..{len(charset) - 1}")
    return "".join(charset[int(i)] for i in indices.tolist())


# ------------------------------------------------------------------------------------------------ rendering


def random_stream(seed: int, split: str, index: int) -> random.Random:
    """The stream that draws image `index` of a split. No two triples share one, and it is the same on every machine."""
    digest = hashlib.blake2b(f"{seed}/{split}/{index}".encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


class SeededSecrets:
    """Stands in for the module `secrets`: the three functions the renderer calls, drawn from a seeded stream.

    `secrets` itself is random.SystemRandom, which shares this code with random.Random: the distributions are the same.
    """

    def __init__(self, stream: random.Random):
        self.randbelow = stream.randrange  # uniform over 0 .. n-1
        self.randbits = stream.getrandbits  # uniform over 0 .. 2^k-1
        self.choice = stream.choice


_renderer_lock = threading.Lock()


def render(renderer: captcha.image.ImageCaptcha, text: str, stream: random.Random) -> Tensor:
    """The CAPTCHA of a text, uint8 (3, H, W), with all its random choices taken from the stream.

    The renderer offers no seed, so the name `secrets` in its module is replaced while it draws. The lock keeps
    threads from drawing from each other's streams.
    """
    with _renderer_lock:
        secrets = captcha.image.secrets
        captcha.image.secrets = SeededSecrets(stream)
        try:
            image = renderer.generate_image(text)
        finally:
            captcha.image.secrets = secrets
    return to_tensor(image)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


class CaptchaDataset(Dataset):
    """CAPTCHAs of uniformly drawn texts in the default look of the `captcha` package. Images are (3, H, W).

    Image i depends on (seed, split, i) and the arguments alone: it is the same in every process, and on every
    machine with the same versions of captcha and Pillow. The splits share no random stream and hence no image.

    Args:
        size: number of images.
        split: 'train', 'val' or 'test'.
        image_size: (H, W) in pixels.
        text_length, charset: of the texts. Symbols that the fonts lack are drawn as boxes.
        fonts: TrueType files, one drawn per symbol; None is the font of the renderer.
        font_sizes: in pixels, one drawn per symbol; None is the renderer's (42, 50, 56).
        cache: None renders an image every time it is asked for. 'memory' keeps it in RAM, shared with the workers of
            a DataLoader, and a folder keeps it in a file there, for later runs too: both cost 3 * H * W bytes an image.

    Raises:
        ValueError: naming the argument that is at fault.
        FileNotFoundError: naming the font that does not exist.
        OSError: the disk lacks the space for the cache.
    """

    def __init__(
        self,
        size: int,
        split: str = "train",
        image_size: tuple[int, int] = (60, 160),
        text_length: int = 4,
        charset: str = DIGITS + UPPERCASE,
        seed: int = 0,
        fonts: Sequence[str | Path] | None = None,
        font_sizes: Sequence[int] | None = None,
        cache: str | Path | None = None,
    ):
        if not whole(size, 0):
            raise ValueError(f"size: expected a whole number >= 0, got {size!r}")
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if not is_size(image_size, MIN_SIDE):
            raise ValueError(f"image_size: expected (height, width) of at least {MIN_SIDE} pixels, got {image_size!r}")
        if pixels(image_size) > MOST_PIXELS:
            raise ValueError(f"image_size: {image_size[0]}x{image_size[1]} has more than {MOST_PIXELS:,} pixels")
        if not whole(text_length, 1):
            raise ValueError(f"text_length: expected a positive whole number, got {text_length!r}")
        check_charset(charset)
        if not whole(seed):
            raise ValueError(f"seed: expected a whole number, got {seed!r}")
        if fonts is not None:
            check_fonts(fonts)
        if font_sizes is not None and not are_whole(font_sizes, 1):
            raise ValueError(f"font_sizes: expected a list of positive whole numbers, got {font_sizes!r}")
        if cache is not None and not (isinstance(cache, (str, Path)) and str(cache)):
            raise ValueError(f"cache: expected None, 'memory' or a folder, got {cache!r}")

        self.size, self.split, self.seed = size, split, seed
        self.image_size, self.text_length, self.charset = tuple(image_size), text_length, charset
        self.fonts = fonts = [str(font) for font in fonts] if fonts is not None else None
        self.font_sizes = font_sizes = tuple(font_sizes) if font_sizes is not None else None
        height, width = self.image_size
        self.renderer = captcha.image.ImageCaptcha(width, height, fonts, font_sizes)
        self.description = {
            "renderer": "captcha", "version": version("captcha"), "seed": seed, "split": split, "size": size,
            "image_size": [height, width], "text_length": text_length, "charset": charset,
            "fonts": [Path(font).name for font in fonts] if fonts else None,
            "font_sizes": list(font_sizes) if font_sizes else None,
        }
        self.cache = None
        if cache is not None and size > 0:
            path = None if cache == "memory" else Path(cache) / f"captcha-{split}-{self.fingerprint(fonts)}.u8"
            self.cache = Cache(size, self.image_size, path)

    def fingerprint(self, fonts: list[str] | None) -> str:
        """A hash of everything the pixels depend on, so that no other data set ever reads their file."""
        files = fonts or captcha.image.DEFAULT_FONTS
        contents = [hashlib.blake2b(Path(font).read_bytes()).hexdigest() for font in files]
        libraries = [PIL.__version__, features.version("freetype2"), features.version("raqm")]
        key = json.dumps([self.description, contents, libraries], sort_keys=True)
        return hashlib.blake2b(key.encode(), digest_size=12).hexdigest()

    def other_split(self, split: str, size: int) -> "CaptchaDataset":
        """The same kind of captchas from another split, rendered on demand."""
        return CaptchaDataset(size, split, self.image_size, self.text_length, self.charset, self.seed, self.fonts,
                              self.font_sizes)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = operator.index(i)
        if not 0 <= i < self.size:
            raise IndexError(f"index {i} is outside 0..{self.size - 1}")
        stream = random_stream(self.seed, self.split, i)
        text = "".join(stream.choice(self.charset) for _ in range(self.text_length))  # cheap, hence never cached
        image = self.cache.get(i) if self.cache else None
        if image is None:
            image = render(self.renderer, text, stream)
            if self.cache:
                self.cache.put(i, image)
        return image.float() / 255, encode_text(text, self.charset)


class Cache:
    """uint8 images (3, H, W) by index, in shared memory or, given a path, in a file. All processes see the same ones.

    Row i holds the pixels of image i and behind them a byte that turns 1 once they are complete. A file is sparse: it
    takes the disk space of the images it holds.
    """

    def __init__(self, size: int, image_size: tuple[int, int], path: Path | None = None):
        self.shape, self.path = (3, *image_size), path
        row = 3 * image_size[0] * image_size[1] + 1
        if path is None:
            shared = Path("/dev/shm")  # where Linux keeps it
            if shared.is_dir() and size * row > shutil.disk_usage(shared).free:
                raise OSError(f"cache: shared memory lacks the space for {size * row / 1e9:.1f} GB")
            self.rows = torch.zeros(size, row, dtype=torch.uint8).share_memory_()
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab") as file:  # creates the file, but leaves the content of an earlier run
            missing = size * row - 512 * getattr(os.fstat(file.fileno()), "st_blocks", 0)
            if missing > shutil.disk_usage(path.parent).free:  # writing to a map of a full disk would end the process
                raise OSError(f"cache: {path.parent} lacks the space for {missing / 1e9:.1f} GB")
            file.truncate(size * row)
        self.rows = self.map(size, row)

    def map(self, size: int, row: int) -> Tensor:
        return torch.from_numpy(np.memmap(self.path, np.uint8, "r+", shape=(size, row)))

    def get(self, i: int) -> Tensor | None:
        row = self.rows[i]
        return row[:-1].view(self.shape) if row[-1] else None

    def put(self, i: int, image: Tensor) -> None:
        row = self.rows[i]
        row[:-1] = image.flatten()
        row[-1] = 1  # after the pixels, so that whoever is interrupted leaves no half image

    def __getstate__(self) -> dict:
        """On the way to a worker process a file is not copied but mapped again."""
        return {**self.__dict__, "rows": tuple(self.rows.shape)} if self.path else self.__dict__

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        if self.path:
            self.rows = self.map(*self.rows)


# ------------------------------------------------------------------------------------------------ images on disk


class CaptchaFolder(Dataset):
    """The images under a folder, at any depth, in the order of their paths; hidden files are left out.

    The text of an image is its file's name up to the first '_', '-', '.' or space: A7KQ.png and A7KQ_0012.jpg both
    show A7KQ. It is upper-cased if the charset has no lower-case letters. Whatever a file holds becomes RGB, with
    transparency on white.

    Args:
        root: the folder.
        image_size: (H, W) to resize to; None keeps the size, which then must be that of all images.
        text_length: of the texts; None reads no texts, and the labels are empty, (0,).
        charset: of the texts; None is the digits and the upper-case letters.
        skip_bad: leave out the files that would raise, with a warning each; they are listed in `skipped`.

    Every file is read once at the start, so that a damaged one does not end a training run later.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: naming the argument at fault; or the folder, if it has no (good) images; or the file whose name is
            not a text, whose size differs, or which is no readable image.
    """

    def __init__(
        self,
        root: str | Path,
        image_size: tuple[int, int] | None = None,
        text_length: int | None = None,
        charset: str | None = None,
        skip_bad: bool = False,
    ):
        if image_size is not None and not is_size(image_size, 1):
            raise ValueError(f"image_size: expected (height, width) or None, got {image_size!r}")
        if text_length is not None and not whole(text_length, 1):
            raise ValueError(f"text_length: expected a positive whole number or None, got {text_length!r}")
        self.text_length = text_length
        self.charset = DIGITS + UPPERCASE if charset is None else charset
        check_charset(self.charset)
        self.image_size = None if image_size is None else tuple(image_size)  # None until the first image
        self.paths, self.texts, self.skipped = [], [], []
        for path in tqdm(find_images(Path(root)), desc="check", unit="image", delay=2):
            try:
                self.add(path, resizes=image_size is not None)
            except ValueError as error:
                if not skip_bad:
                    raise
                warnings.warn(f"skipped: {error}", stacklevel=2)
                self.skipped.append(path)
        if not self.paths:
            raise ValueError(f"{root}: none of its {len(self.skipped)} images is good")
        self.description = {"folder": Path(root).resolve().name, "count": len(self.paths),
                            "image_size": list(self.image_size)}

    def add(self, path: Path, resizes: bool) -> None:
        """Takes a file in, or raises ValueError if there is anything wrong with it."""
        text = self.read_text(path)
        width, height = read_image(path).size
        if self.image_size is None:
            self.image_size = (height, width)
        elif not resizes and (height, width) != self.image_size:
            raise ValueError(f"{path}: is {height}x{width} (height x width), but {self.paths[0].name} is "
                             f"{self.image_size[0]}x{self.image_size[1]}; give an image_size to resize them")
        self.paths.append(path)
        self.texts.append(text)

    def read_text(self, path: Path) -> str:
        if self.text_length is None:
            return ""
        text = re.split(f"[{re.escape(SEPARATORS)}]", path.name, maxsplit=1)[0]
        if not any(symbol.islower() for symbol in self.charset):
            text = text.upper()
        if len(text) != self.text_length or not set(text) <= set(self.charset):
            wanted = f"{self.text_length} symbols of {self.charset}"
            raise ValueError(f"{path}: its name should begin with {wanted}, got {text!r}")
        return text

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        i = operator.index(i)
        if not 0 <= i < len(self):
            raise IndexError(f"index {i} is outside 0..{len(self) - 1}")
        height, width = self.image_size
        image = read_image(self.paths[i])
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BICUBIC)  # antialiased when it shrinks
        return to_tensor(image).float() / 255, encode_text(self.texts[i], self.charset)


def find_images(root: Path) -> list[Path]:
    """The files under root that have the extension of an image, sorted."""
    if not root.exists():
        raise FileNotFoundError(f"{root}: no such folder")
    if not root.is_dir():
        raise ValueError(f"{root}: not a folder")
    extensions = {extension for extension, name in Image.registered_extensions().items() if name in FORMATS}
    paths = [path for path in root.rglob("*")
             if path.suffix.lower() in extensions and not path.name.startswith(".") and path.is_file()]
    if not paths:
        raise ValueError(f"{root}: no images in this folder")
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())


def read_image(path: Path) -> Image.Image:
    """A file's (first) image as RGB.

    Raises:
        ValueError: it is not readable, or has more pixels than Pillow thinks safe (89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about oddities that do not keep Pillow from reading
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                return to_rgb(image)
    except Exception as error:  # Pillow's decoders raise errors of many kinds
        raise ValueError(f"{path}: not a readable image ({error})") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Any image as 8-bit RGB, with transparency on white.

    Raises:
        ValueError: the pixels are real numbers, whose range nobody knows.
    """
    if image.mode == "F":
        raise ValueError("its pixels are real numbers")
    if image.mode.startswith("I"):  # 16 bits of grey, which Pillow would clip at 255
        values = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(values.round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


# ------------------------------------------------------------------------------------------------ MNIST


class MNIST(Dataset):
    """Handwritten digits: image (1, 28, 28) in [0, 1], label (1,) the digit.

    The split 'train' is the first 55,000 of the official 60,000 training images, 'val' the last 5,000, and 'test' the
    official 10,000. Images stay grey; train() and evaluate() binarise them on request.

    Args:
        split: 'train', 'val' or 'test'.
        root: the folder that holds MNIST/raw; the data are downloaded into it if it does not.
        text_length: 1 offers the digit to the model as its text; None leaves it out.

    Raises:
        ValueError: the split or the text length does not exist.
        OSError: the data are neither there nor to be downloaded.
    """

    charset = DIGITS
    image_size = (28, 28)

    def __init__(self, split: str = "train", root: str | Path = "data", text_length: int | None = None):
        if split not in SPLITS:
            raise ValueError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        if text_length not in (None, 1):
            raise ValueError(f"text_length: a digit is a text of length 1, or None, got {text_length!r}")
        source = open_mnist(root, train=split != "test")
        end = len(source.data) * 11 // 12
        part = {"train": slice(end), "val": slice(end, None), "test": slice(None)}[split]
        self.images, self.digits = source.data[part], source.targets[part]
        self.split, self.root, self.text_length = split, root, text_length
        self.description = {"data": "MNIST", "split": split, "size": len(self.images)}

    def other_split(self, split: str, size: int) -> Dataset:
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
        return datasets.MNIST(root, train, download=True)  # which downloads only what is not there
    except Exception as error:  # of many kinds: no network, no right to write, a damaged file
        raise OSError(f"MNIST is not in {root}/MNIST/raw, or damaged, and could not be downloaded ({type(error).__name__}). "
                      f"Name the folder that holds MNIST/raw, or remove what is in it and connect to a network.") from None


# ------------------------------------------------------------------------------------------------ checks, loader


def are_whole(ns, lowest: float) -> bool:
    return isinstance(ns, (tuple, list)) and len(ns) > 0 and all(whole(n, lowest) for n in ns)


def is_size(size, lowest: int) -> bool:
    return are_whole(size, lowest) and len(size) == 2


def check_charset(charset: str) -> None:
    if not isinstance(charset, str) or not charset or len(set(charset)) != len(charset):
        raise ValueError(f"charset: expected a string of different symbols, got {charset!r}")


def check_fonts(fonts: Sequence[str | Path]) -> None:
    if isinstance(fonts, (str, Path)) or not len(fonts):
        raise ValueError(f"fonts: expected a list of font files, got {fonts!r}")
    for font in fonts:
        if not Path(font).is_file():
            raise FileNotFoundError(f"fonts: no such file: {font}")
        try:
            ImageFont.truetype(str(font), 10)
        except OSError as error:
            raise ValueError(f"fonts: {font} is not a readable font ({error})") from error


def make_loader(
    dataset: Dataset,
    batch_size: int,
    shuffle: bool = True,
    workers: int | None = None,
    seed: int = 0,
    drop_last: bool = False,
    pin_memory: bool | None = None,
) -> DataLoader:
    """Batches (images (B, 3, H, W), labels (B, T)); every epoch holds each index once, shuffled anew.

    Args:
        workers: processes that load; None takes up to two and leaves a core to the caller, 0 for few images.
        seed: of the orders. Two loaders with the same seed give the same epochs, whatever their workers.
        pin_memory: None pins if there is a CUDA device.
    """
    if workers is None:
        few = len(dataset) < 1000  # sooner rendered than two processes are started
        workers = 0 if few else min(2, (os.cpu_count() or 1) - 1)
    # the sampler has a generator of its own: from the loader's, the number of draws depends on the workers
    sampler = RandomSampler(dataset, generator=torch.Generator().manual_seed(seed)) if shuffle else None
    return DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, drop_last=drop_last, persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available() if pin_memory is None else pin_memory,
        generator=torch.Generator().manual_seed(seed),
    )


# ------------------------------------------------------------------------------------------------ command line


def export(dataset: CaptchaDataset, folder: Path) -> None:
    """Writes every image as TEXT_INDEX.png, which CaptchaFolder reads back.

    Raises:
        ValueError: the charset has a symbol that ends the text in a file's name or that a name cannot hold.
    """
    unsafe = sorted(set(dataset.charset) & set(UNSAFE))
    if unsafe:
        raise ValueError(f"charset: {unsafe[0]!r} cannot be part of a text in a file's name")
    folder.mkdir(parents=True, exist_ok=True)
    for i in tqdm(range(len(dataset)), desc=str(folder), unit="image"):
        image, label = dataset[i]
        save_image(image, folder / f"{decode_text(label, dataset.charset)}_{i:06d}.png")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]", description="Renders CAPTCHAs: a sheet of them, or with --export a folder of single images."
    )
    option = parser.add_argument
    option("--out", default="captchas.png", metavar="FILE", help="the sheet, 4 images in a row (%(default)s)")
    option("--export", metavar="DIR", help="write single images TEXT_INDEX.png into this folder instead of a sheet")
    option("--n", type=int, default=32, help="number of images (%(default)s)")
    option("--seed", type=int, default=0, help="another seed gives other images (%(default)s)")
    option("--split", choices=SPLITS, default="train", help="the splits of a seed share no image (%(default)s)")
    option("--length", type=int, default=4, help="symbols in a text (%(default)s)")
    option("--charset", default=DIGITS + UPPERCASE, help="the symbols to draw from (%(default)s)")
    option("--size", type=int, nargs=2, default=(60, 160), metavar=("H", "W"), help="of an image, in pixels (60 160)")
    option("--fonts", nargs="+", metavar="FILE", help="TrueType files to draw from (the renderer's own)")
    args = parser.parse_args(arguments)
    if args.n < 1:
        parser.error(f"argument --n: expected at least 1, got {args.n}")
    if not args.export and args.n * max(pixels(args.size), 1) > SHEET_PIXELS:
        parser.error(f"argument --n: {args.n} images are too many for one sheet; --export writes any number")
    try:
        dataset = CaptchaDataset(args.n, args.split, tuple(args.size), args.length, args.charset, args.seed, args.fonts)
        if args.export:
            export(dataset, Path(args.export))
            print(f"{args.n} images in {args.export}")
        else:
            save_image(torch.stack([image for image, _ in dataset]), args.out, nrow=4, pad_value=1)
            print(f"{args.n} images on {args.out}")
    except (ValueError, OSError) as error:
        refuse(parser, one_line(error))
    except KeyboardInterrupt:
        parser.exit(130, "interrupted\n")


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Adds its default to an option's help; one that is None is told there in words."""

    def _get_help_string(self, action: argparse.Action) -> str:
        return action.help if action.default is None else super()._get_help_string(action)


def refuse(parser: argparse.ArgumentParser, message: str) -> NoReturn:
    """Ends a command line with status 2 and one line that says what is wrong, without the usage."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")


def one_line(error: Exception) -> str:
    """Its message; of an error from a data worker, which sends its traceback, the last line."""
    text = str(error) or type(error).__name__
    return " ".join((text.splitlines()[-1] if text.startswith("Caught ") else text).split())


if __name__ == "__main__":
    main()
