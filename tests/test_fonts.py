"""The captchas of many looks that checkpoints/fonts.pt learns from."""

import captcha.image
import pytest
import torch
from benchmarks import fonts
from benchmarks.fonts import VariedDataset, brightness, choose_colours
from hypothesis import given, settings
from hypothesis import strategies as st

from dataset import random_stream

FONTS = ["DroidSansMono.ttf", "DejaVuSans.ttf", "DejaVuSerif.ttf", "STIXGeneral.ttf"]


@pytest.fixture(scope="module")
def data():
    return VariedDataset(40, text_length=7, shortest=3, fonts=FONTS)


def test_an_image_depends_on_its_index_alone(data):
    again = VariedDataset(40, text_length=7, shortest=3, fonts=FONTS)
    again[3]
    for one, other in zip(data[7], again[7], strict=True):
        assert torch.equal(one, other)


def test_other_splits_have_many_looks_too(data):
    assert isinstance(data.other_split("val", 40), VariedDataset)


def test_papers_are_pale_and_dark_coloured_and_grey(data):
    images = torch.stack([data[i][0] for i in range(40)])
    papers = images.flatten(2).median(2).values  # (40, 3)
    assert papers.mean(1).min() < 0.4 and papers.mean(1).max() > 0.9
    assert (papers.amax(1) - papers.amin(1)).max() > 0.3
    is_grey = (images.amax(1) == images.amin(1)).flatten(1).all(1)
    assert 1 < is_grey.sum() < 30


@settings(deadline=None)
@given(st.integers(0, 10**6))
def test_paper_and_ink_differ_in_brightness(seed):
    paper, ink = choose_colours(random_stream(seed, "train", 0))
    assert abs(brightness(paper) - brightness(ink)) >= 65  # of pale and dark


def test_pale_symbols_show_on_dark_paper(data, monkeypatch):
    """Also without lines, which are drawn with other means than symbols."""
    monkeypatch.setattr(fonts, "choose_colours", lambda stream: ((20, 20, 20), (240, 240, 240)))
    monkeypatch.setattr(fonts.VariedCaptcha, "draw_lines", lambda self, image, stream: None)
    images = torch.stack([data[i][0] for i in range(10)]).mean(1).flatten(1)
    assert (images.amax(1) - images.median(1).values > 0.15).all()


def test_some_captchas_have_symbols_of_several_inks(data, monkeypatch):
    drawn = []

    def draw_and_note(self, c, draw, color):
        drawn[-1].add(color)
        return original(self, c, draw, color)

    original = captcha.image.ImageCaptcha._draw_character
    monkeypatch.setattr(captcha.image.ImageCaptcha, "_draw_character", draw_and_note)
    for i in range(20):
        drawn.append(set())
        data[i]
    several = sum(len(inks) > 1 for inks in drawn)
    assert 0 < several < 15
