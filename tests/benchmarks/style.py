"""Writes a folder of captchas in a style that the package `captcha` does not have.

    python tests/benchmarks/style.py captchas --n 3000

Dark grey italics on a pale gradient, 40x120, four to six digits and lower-case letters, bent along
a sine wave, under a grid of lines. For tests/benchmarks/usefulness.py.
"""

import math
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from dataset import find_fonts
from hvae.cli import make_parser, one_line_errors, path_argument

HEIGHT, WIDTH = 40, 120
CHARSET = "23456789abcdefghkmnpqrstuvwxyz"
FONTS = find_fonts(
    ["DejaVuSans-Oblique.ttf", "DejaVuSerif-Italic.ttf", "DejaVuSansMono-BoldOblique.ttf"]
)


def draw(text: str, stream: random.Random) -> Image.Image:
    """A captcha of the text, in grey."""
    ink = Image.new("L", (WIDTH, HEIGHT), 0)
    pen, x = ImageDraw.Draw(ink), stream.uniform(3, 10)
    for symbol in text:
        font = ImageFont.truetype(stream.choice(FONTS), stream.randint(20, 25))
        pen.text((x, stream.uniform(2, 11)), symbol, 255, font)
        x += pen.textlength(symbol, font) + stream.uniform(-2, 1)
    for x in range(stream.randint(0, 12), WIDTH, 13):
        pen.line([(x, 0), (x - 8, HEIGHT)], 130)
    paper = np.linspace(stream.uniform(200, 225), stream.uniform(225, 250), WIDTH)
    darkness = np.asarray(bent(ink, stream)) / 255
    grey = paper - darkness * (paper - stream.uniform(30, 90))
    return Image.fromarray(grey.round().astype(np.uint8))


def bent(image: Image.Image, stream: random.Random) -> Image.Image:
    """Columns moved up and down along a sine wave."""
    swing, length, start = (stream.uniform(*ends) for ends in ((2, 4), (40, 80), (0, 2 * math.pi)))
    step, pieces = 4, []
    shift = lambda x: swing * math.sin(start + 2 * math.pi * x / length)
    for x in range(0, WIDTH, step):
        left, right = shift(x), shift(x + step)
        corners = (x, left, x, HEIGHT + left, x + step, HEIGHT + right, x + step, right)
        pieces.append(((x, 0, x + step, HEIGHT), corners))
    return image.transform(image.size, Image.Transform.MESH, pieces, Image.Resampling.BILINEAR)


def main() -> None:
    parser = make_parser(__doc__.splitlines()[0])
    parser.add_argument("folder", type=path_argument)
    parser.add_argument("--n", type=int, default=3000, help="captchas")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with one_line_errors(parser):
        folder, stream = Path(args.folder), random.Random(args.seed)
        folder.mkdir(parents=True, exist_ok=True)
        for i in tqdm(range(args.n), str(folder), unit="image"):
            text = "".join(stream.choices(CHARSET, k=stream.randint(4, 6)))
            draw(text, stream).save(folder / f"{text}_{i:05d}.png")


if __name__ == "__main__":
    main()
