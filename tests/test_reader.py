"""The shipped reader, the ruler of quality.py: does it read renders, and only texts it knows?"""

import pytest
import torch
from benchmarks.reader import RULER, load_reader

from dataset import CaptchaDataset
from hvae.validate import InputError
from model import HVAE

SMALL = dict(outer_config=[("conv", 4, 4)], inner_config=[], context=None, prior_context=None)


def test_the_shipped_reader_reads_renders():
    reader = load_reader(RULER, HVAE(**SMALL)).cpu()
    images, labels = map(torch.stack, zip(*CaptchaDataset(200, split="test"), strict=True))
    right = reader(images).argmax(2) == labels
    assert 0.94 < right.float().mean() < 1


def test_a_reader_of_other_texts_is_not_used():
    with pytest.raises(InputError, match="reader.pt reads .* name another --reader"):
        load_reader(RULER, HVAE(**SMALL, charset="abc"))
