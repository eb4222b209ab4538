"""The command that asks whether a reader gains from samples, on a tiny folder and model."""

import random
import sys

import pytest
from benchmarks import usefulness
from PIL import Image

from generate import held_out_images
from model import HVAE


@pytest.fixture
def folder(tmp_path):
    """Sixty grey pictures of 16x32, different from each other, with texts of two symbols."""
    stream = random.Random(0)
    (tmp_path / "pictures").mkdir()
    for i in range(60):
        text = "".join(stream.choices("ab", k=2))
        image = Image.frombytes("L", (32, 16), stream.randbytes(32 * 16))
        image.save(tmp_path / "pictures" / f"{text}_{i}.png")
    return tmp_path / "pictures"


def test_a_row_of_the_table(folder, tmp_path, monkeypatch, capsys):
    """Both readers' shares; the same ones again from the model that is there by then.

    A corrected text makes another model.
    """
    outer, inner = [("conv", 4, 2), ("res", 4)], [[("dense", 4)]]
    HVAE(outer, inner, (16, 32), text_length=2, charset="AB").save(tmp_path / "tiny.pt")
    options = "--length 2 --charset ab --sizes 1000 --steps 2 --samples 8 --reader-steps 2"
    files = ["--init", str(tmp_path / "tiny.pt"), "--out", str(tmp_path / "out")]
    command = ["usefulness.py", str(folder), *options.split(), *files]
    monkeypatch.setattr(sys, "argv", command)
    rows = []
    for _ in range(2):
        usefulness.main()
        rows.append(capsys.readouterr().out.splitlines()[-1].split())
    pictures, *shares = map(float, rows[0])
    assert len(shares) == 4 and all(0 <= share <= 1 for share in shares)
    assert rows[0] == rows[1]
    (run,) = (tmp_path / "out").glob(f"pictures-{pictures:.0f}-*")
    assert {"hvae.pt", "state.pt", "sheet.png"} <= {path.name for path in run.iterdir()}
    model = HVAE.load(run / "hvae.pt")
    assert model.charset == "ab"
    held_out = held_out_images(model)  # not those that it was trained on
    assert held_out.split == "test" and 0 < len(held_out) < 60
    corrected = next(name for name in sorted(folder.iterdir()) if name.name.startswith("aa"))
    (folder / "labels.csv").write_text(f"name,text\n{corrected.name},ab\n")
    usefulness.main()
    assert len(list((tmp_path / "out").iterdir())) == 2
