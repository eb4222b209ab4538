"""Trains the second stage of checkpoints/fonts.pt, a model to begin with for captchas of your own.

    python tests/benchmarks/fonts.py --init run-fonts/hvae.pt --out run-looks

Each captcha has fonts, sizes, colours, bends, lines and noise of its own, so that what is learned
of glyphs and texts is not bound to one look. The font cmti10 needs matplotlib 3.11 or newer.
"""

import random
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import captcha.image
import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import CaptchaDataset
from hvae.cli import make_parser, one_line_errors, path_argument
from hvae.text import DIGITS, UPPERCASE
from model import HVAE
from trainer import train

FONTS = [
    "DroidSansMono.ttf",
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSansMono.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSerif.ttf",
    "DejaVuSerif-Bold.ttf",
    "STIXGeneral.ttf",
    "STIXGeneralBol.ttf",
    "STIXGeneralItalic.ttf",
    "STIXGeneralBolIta.ttf",
    "cmr10.ttf",
    "cmss10.ttf",
    "cmtt10.ttf",
    "cmti10.ttf",
    "cmb10.ttf",
]
SIZES = range(26, 64, 2)  # the middle one of a captcha's font sizes, in pixels
# of an ink drawn at random and its paper, the least difference in brightness, 0 to 255; symbols
# show less of it, because the package draws them the more transparent the darker their ink is
CONTRAST = 70
Colour = tuple[int, int, int]

open_font = lru_cache(maxsize=None)(ImageFont.truetype)


class VariedCaptcha(captcha.image.ImageCaptcha):
    """Renders each captcha in another look, with the stream that dataset.render() gives it."""

    def generate_image(self, chars: str) -> Image.Image:
        stream = captcha.image.secrets
        self.choose_shapes(stream)
        paper, ink = choose_colours(stream)
        self.inks = [ink]
        if stream.random() < 0.25:  # a colour for each symbol
            self.inks = [contrasting(paper, stream) for _ in range(4)]
        image = self.create_captcha_image(chars, ink, paper)
        self.draw_lines(image, stream)
        if stream.random() < 0.7:
            image = image.filter(ImageFilter.SMOOTH)
        if stream.random() < 0.4:
            image = uneven(image, stream)
        return image.convert("L").convert("RGB") if stream.random() < 0.25 else image

    def choose_shapes(self, stream: random.Random) -> None:
        fonts = stream.sample(self._fonts, stream.choice((1, 1, 2, 4)))
        size = stream.choice(SIZES)
        self._truefonts = [open_font(font, size + more) for font in fonts for more in (-4, 0, 4)]
        angle, warp = stream.randint(0, 35), stream.uniform(0, 0.35)
        self.character_rotate = (-angle, angle)
        self.character_warp_dx = self.character_warp_dy = (warp / 2, warp)
        self.character_offset_dy = (0, stream.randint(0, 16))  # which the package crops away
        self.word_space_probability = stream.uniform(0.3, 1)
        self.word_offset_dx = stream.uniform(0, 0.35)

    def _draw_character(self, c: str, draw: ImageDraw.ImageDraw, color: Colour) -> Image.Image:
        return super()._draw_character(c, draw, captcha.image.secrets.choice(self.inks))

    def draw_lines(self, image: Image.Image, stream: random.Random) -> None:
        """Dots, arcs and straight lines, or some of them, in the colours of the symbols."""
        if stream.random() < 0.6:
            number, width = stream.randint(5, 40), stream.randint(1, 4)
            self.create_noise_dots(image, stream.choice(self.inks), width, number)
        for _ in range(stream.choice((0, 1, 1, 2))):
            self.create_noise_curve(image, stream.choice(self.inks))
        pen, (w, h) = ImageDraw.Draw(image), image.size
        for _ in range(stream.choice((0, 0, 1, 3))):
            ends = [stream.randrange(side) for side in (w, h, w, h)]
            pen.line(ends, stream.choice(self.inks), stream.randint(1, 3))


def choose_colours(stream: random.Random) -> tuple[Colour, Colour]:
    """Of paper and ink: half dark on pale, a quarter pale on dark, a quarter any."""
    kind = stream.random()
    if kind < 0.25:
        paper = draw_colour(stream, 0, 255)
        return paper, contrasting(paper, stream)
    pale, dark = draw_colour(stream, 225, 255), draw_colour(stream, 10, 160)
    return (dark, pale) if kind < 0.5 else (pale, dark)


def draw_colour(stream: random.Random, low: int, high: int) -> Colour:
    return tuple(stream.randint(low, high) for _ in range(3))


def contrasting(paper: Colour, stream: random.Random) -> Colour:
    """A colour that is brighter or darker than the paper's."""
    while True:
        ink = draw_colour(stream, 0, 255)
        if abs(brightness(ink) - brightness(paper)) >= CONTRAST:
            return ink


def brightness(colour: Colour) -> float:
    return np.dot(colour, (0.299, 0.587, 0.114))


def uneven(image: Image.Image, stream: random.Random) -> Image.Image:
    """With a gradient from left to right and, two times of three, noise in every pixel."""
    x = np.asarray(image).astype(float)
    h, w, _ = x.shape
    x += np.linspace(stream.uniform(-30, 30), stream.uniform(-30, 30), w)[None, :, None]
    noise = np.random.default_rng(stream.getrandbits(64)).normal(size=(h, w, 1))
    x += stream.choice((0, 3, 8)) * noise
    return Image.fromarray(x.round().clip(0, 255).astype(np.uint8))


@dataclass(eq=False)
class VariedDataset(CaptchaDataset):
    """CaptchaDataset with the looks of VariedCaptcha."""

    def __post_init__(self):
        super().__post_init__()
        height, width = self.image_size
        self.renderer = VariedCaptcha(width, height, self.fonts)
        self.description["renderer"] = "captcha, in many looks"


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--init", type=path_argument, required=True, help="the model of the first stage")
    add("--steps", type=int, default=4500, help="of 16 captchas each")
    add("--out", type=path_argument, default="run-looks", help="the run's folder")
    add("--resume", action="store_true")
    args = parser.parse_args()
    with one_line_errors(parser, "; go on with --resume"):
        charset = DIGITS + UPPERCASE + UPPERCASE.lower()
        data = VariedDataset(1_000_000, text_length=7, shortest=3, charset=charset, fonts=FONTS)
        settings = dict(batch_size=16, frozen_share=0, pixel_weight=0.01, eval_every=500)
        model = HVAE.load(args.init)
        train(model, data, steps=args.steps, out=args.out, resume=args.resume, **settings)


if __name__ == "__main__":
    main()
