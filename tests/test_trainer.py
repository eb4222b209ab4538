import copy
import csv
import functools
import inspect
import math
import subprocess
import sys
import warnings
from pathlib import Path

import captcha.image
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.utils import save_image

import parallel
import trainer
from dataset import CaptchaDataset, CaptchaFolder, make_loader
from model import HVAE
from runs import Clipper, read_csv, read_state
from trainer import batches, evaluate, fit_prior, hold_out, learning_rate, loss_terms, plot_history, train

pytestmark = pytest.mark.filterwarnings("ignore:.*its run goes on with")  # more steps, in many tests
TINY = dict(outer_config=[("conv-bn", 4, 2)], inner_config=[[("res", 4)]], latent_channels=2)
FIGURES = ["interpolation.png", "levels.png", "originals.png", "prior_vs_aggregate.png", "reconstructions.png",
           "temperatures.png"]
FILES = [".lock", "hvae.pt", "loss.png", "metrics.csv", "samples.png", "state.pt"]


def tiny(**arguments):
    """A seeded two-level model of 8x12 grey images; `arguments` replace any of HVAE's."""
    torch.manual_seed(0)
    data = dict(input_size=(8, 12), input_channels=1, text_length=None, charset="ABCD")
    return HVAE(**{**TINY, **data, "likelihood": "bernoulli", **arguments})


def bars(n=40, seed=0):
    """Grey 8-bit images with a bright bar in one of four places, and its number as a text of one symbol."""
    place = torch.arange(n) % 4
    x = 0.2 * torch.rand(n, 1, 8, 12, generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        x[i, :, :, 3 * place[i] : 3 * place[i] + 2] += 0.7
    return TensorDataset((255 * x).round() / 255, place[:, None])


def captchas(n=12, split="train"):
    return CaptchaDataset(n, split, image_size=(16, 32), text_length=2, charset="AB")


def fit(out, model=None, dataset=None, **arguments):
    """A short run of train()."""
    settings = dict(steps=8, batch_size=8, warmup=3, beta_steps=5, free_nats=1.0, eval_every=4, log_every=2, workers=0, device="cpu")
    return train(model or tiny(), dataset or bars(), out=out, **{**settings, **arguments})


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Runs leave an empty loss.png: drawing it takes ten times as long as everything else in a tiny run."""
    monkeypatch.setattr(trainer, "plot_history", lambda history, path: path.touch())


def same(a, b):
    """Two state dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def bar_batch(n=8):
    return torch.stack([bars(n)[i][0] for i in range(n)])


# ------------------------------------------------------------------------------------------------ train


def test_train_returns_model_and_history_and_writes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "plot_history", plot_history)
    out = tmp_path / "runs" / "first"
    model, history = fit(out)
    assert sorted(path.name for path in out.iterdir()) == sorted(FILES + ["state.previous.pt"])
    assert [name for name in FILES if (out / name).stat().st_size == 0] == [".lock"]
    assert not model.training and not any(module.training for module in model.modules())
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert [row["images"] for row in history] == [16, 32, 48, 64]
    for row in history:
        assert row["neg_elbo"] == pytest.approx(row["reconstruction"] + row["kl_1"] + row["kl_2"], rel=1e-5)
        assert ("val_neg_elbo" in row) == (row["step"] % 4 == 0)
        if "val_neg_elbo" in row:
            kl = row["val_kl_1"] + row["val_kl_2"]
            assert row["val_neg_elbo"] == pytest.approx(row["val_reconstruction"] + kl, rel=1e-5)


def test_files_hold_what_train_returns(tmp_path):
    model, history = fit(tmp_path)
    loaded = HVAE.load(tmp_path / "hvae.pt")
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.provenance == model.provenance
    assert loaded.provenance["steps"] == 8 and loaded.provenance["images_seen"] == 64
    assert -loaded.provenance["held_out"]["elbo"] == history[-1]["val_neg_elbo"]
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row.keys() for row in rows] == [row.keys() for row in history]
    for row, kept in zip(history, rows):
        assert kept == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_training_improves_held_out_elbo(inference, tmp_path):
    train_set, val_set = Subset(bars(72), range(64)), bars(24, seed=1)
    _, history = fit(tmp_path, tiny(inference=inference), train_set, val_dataset=val_set, steps=60, batch_size=16,
                     lr=1e-2, eval_every=5, log_every=5)
    held_out = [row["val_neg_elbo"] for row in history]
    assert held_out[-1] < held_out[0] - 3


def test_train_on_captchas(tmp_path):
    model = tiny(input_size=(16, 32), input_channels=3, likelihood="gaussian", text_length=2, charset="AB")
    _, history = fit(tmp_path, model, captchas(32), val_dataset=captchas(8, "val"), steps=40, lr=1e-2, eval_every=5,
                     log_every=5)
    assert history[-1]["val_neg_elbo"] < history[0]["val_neg_elbo"] - 100
    assert HVAE.load(tmp_path / "hvae.pt").provenance["data"]["renderer"] == "captcha"


@pytest.mark.parametrize("text_length", [None, 2])
def test_train_on_folder(text_length, tmp_path):
    """Without a model, train() makes one for the data; here it is made of few channels."""
    for i, text in enumerate(["AB", "BA", "AA", "BB", "AB", "BA"]):
        image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(i))
        save_image(image, write_to(tmp_path / "in", text, i))
    data = CaptchaFolder(tmp_path / "in", text_length=text_length, charset="AB")
    model, _ = fit(tmp_path / "out", trainer.model_for(data, **TINY), data, steps=2, batch_size=4)
    assert model.input_shape == (3, 16, 32) and model.text_length == text_length
    assert model.sample(2, "AB" if text_length else None).shape == (2, 3, 16, 32)
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["data"]["count"] == 6


def write_to(folder, text, i):
    folder.mkdir(exist_ok=True)
    return folder / f"{text}_{i}.png"


def test_model_for_data():
    model = trainer.model_for(captchas(), **TINY)
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")
    model = trainer.model_for(captchas(), **TINY, text_length=None)
    assert model.text_length is None
    model = trainer.model_for(bars(), **TINY, likelihood="bernoulli")
    assert (model.input_shape, model.text_length, model.likelihood) == ((1, 8, 12), None, "bernoulli")


def test_train_without_model_takes_the_default_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "model_for", functools.partial(trainer.model_for, **TINY))
    model, _ = train(dataset=captchas(), val_dataset=captchas(4, "val"), steps=1, batch_size=4, workers=0, out=tmp_path)
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")


def test_same_seed_same_run(tmp_path):
    runs = [fit(tmp_path / str(i), steps=3, seed=seed) for i, seed in enumerate([0, 0, 1])]
    assert same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert not same(runs[0][0].state_dict(), runs[2][0].state_dict())


def test_workers_do_not_change_the_run(tmp_path):
    runs = [fit(tmp_path / str(workers), steps=4, workers=workers) for workers in (0, 1)]
    assert same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert without_seconds(runs[0][1]) == without_seconds(runs[1][1])


def test_beta_falls_from_start_to_one(tmp_path):
    _, history = fit(tmp_path, steps=20, log_every=1, eval_every=20, beta_start=9.0, beta_steps=10)
    betas = [row["beta"] for row in history]  # row i is of step i, counted from 0
    assert betas[0] == 9 and betas[5] == pytest.approx(3, abs=1e-3)  # halfway, as an exponential
    assert betas == sorted(betas, reverse=True)
    assert betas[9] > 1 and betas[10:] == [1] * 10


def test_learning_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 10) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.51)  # halfway down the cosine
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert learning_rate(0, 100, 0) == 1
    assert 0 < learning_rate(4, 5, 200) < 0.1  # a run shorter than the warm-up


def test_optimizer_follows_the_learning_rate(tmp_path):
    fit(tmp_path, steps=8, lr=1e-2)
    group, = read_state(tmp_path / "state.pt")["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(1e-2 * learning_rate(7, 8, 3))


def test_evaluations_between_log_steps(tmp_path):
    """A held-out value stands in the row of the step at which it was measured."""
    _, history = fit(tmp_path, steps=10, log_every=4, eval_every=5)
    assert [row["step"] for row in history if "val_neg_elbo" in row] == [5, 10]


def test_arguments_out_of_range(tmp_path):
    for name in ("steps", "batch_size", "beta_steps", "eval_every", "log_every"):
        for value in (0, -1, 1.5, None):
            with pytest.raises(ValueError, match=name):
                fit(tmp_path / "out", **{name: value})
    for name, values in dict(lr=[0, -1, math.inf, math.nan], beta_start=[0, math.nan],
                             free_nats=[-1, math.nan, [1, 1, 1], [1, -1]], ema=[1, -0.1], closed_share=[1, -0.1],
                             top_share=[1.1, -0.1, math.nan]).items():
        for value in values:
            with pytest.raises(ValueError, match=name):
                fit(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model, data, message", [
    ({}, bars(8), "batch_size=8"),  # 7 without the one held out
    ({}, bars(1), "batch_size=8"),
    ({"input_size": (8, 16)}, bars(), r"\(1, 8, 12\).*\(1, 8, 16\)"),
    ({"input_channels": 3}, bars(), r"\(1, 8, 12\).*\(3, 8, 12\)"),
    ({"text_length": 2}, bars(), "1 symbols.*2"),
])
def test_data_that_do_not_fit_the_model(model, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny(**model), data)


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(12))])
def test_charset_of_the_data_is_not_the_models(wrap, tmp_path):
    """The same indices would mean other symbols, and nothing else would tell."""
    model = tiny(input_size=(16, 32), input_channels=3, text_length=2, charset="BA")
    with pytest.raises(ValueError, match="charset 'AB'.*'BA'"):
        fit(tmp_path, model, wrap(captchas()), val_dataset=captchas(4, "val"))


def test_text_symbols_that_do_not_fit_the_model(tmp_path):
    with pytest.raises(ValueError, match="charset"):
        fit(tmp_path, tiny(text_length=1, charset="AB"))


# ------------------------------------------------------------------------------------------------ resume


def interrupt(monkeypatch, name, call):
    """From its `call`-th call on, the function trainer.<name> is interrupted as by Ctrl-C."""
    function, calls = getattr(trainer, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) >= call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    monkeypatch.setattr(trainer, name, interrupted)


def interrupted_and_resumed(out, monkeypatch, name, call, **arguments):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, name, call)
        fit(out, **arguments)
    fit(out, resume=True, **arguments)


def assert_same_run(one, two):
    """Weights, average, and metrics except for the time are bitwise those of the other folder's run."""
    states = [read_state(out / "state.pt") for out in (one, two)]
    assert same(states[0]["model"], states[1]["model"])
    assert same(states[0]["average"], states[1]["average"])
    models = [HVAE.load(out / "hvae.pt") for out in (one, two)]
    assert same(models[0].state_dict(), models[1].state_dict())
    rows = [read_csv(out / "metrics.csv") for out in (one, two)]
    assert [row["step"] for row in rows[1]] == sorted({row["step"] for row in rows[1]})
    assert without_seconds(rows[0]) == without_seconds(rows[1])


@pytest.mark.parametrize("name, call", [
    ("loss_terms", 2),  # before the first checkpoint
    ("loss_terms", 7),  # between two checkpoints
    ("evaluate", 2),
    ("save_samples", 2),  # the metrics are already written
    ("save_state", 2),  # the model, too
])
def test_resume_is_bitwise(name, call, tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    interrupted_and_resumed(tmp_path / "cut", monkeypatch, name, call)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_between_log_steps(tmp_path, monkeypatch):
    """A row averages over all its steps, though the interruption fell among them."""
    fit(tmp_path / "whole", log_every=3)
    interrupted_and_resumed(tmp_path / "cut", monkeypatch, "loss_terms", 6, log_every=3)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


class Unplugged(Dataset):
    """Bars that can be read only so many times."""

    def __init__(self, reads):
        self.bars, self.reads = bars(), reads

    def __len__(self):
        return len(self.bars)

    def __getitem__(self, i):
        self.reads -= 1
        if self.reads < 0:
            raise OSError("the disk is gone")
        return self.bars[i]


def test_resume_after_the_data_failed(tmp_path):
    val_set = bars(4, seed=1)
    fit(tmp_path / "whole", val_dataset=val_set)
    reads = 1 + 40 + 6 * 8  # to check the data, to set the output level, and for six steps
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path / "cut", dataset=Unplugged(reads), val_dataset=val_set)
    assert [row["step"] for row in read_csv(tmp_path / "cut" / "metrics.csv")] == [2, 4]
    assert read_state(tmp_path / "cut" / "state.pt")["step"] == 6  # saved on the way out
    fit(tmp_path / "cut", val_dataset=val_set, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_remembers_the_checkpoint_it_began_with(tmp_path, monkeypatch):
    """Also when the run is cut before its first evaluation."""
    def model():
        begun = tiny()
        begun.provenance = {"steps": 7, "began_with": {"steps": 3}}
        return begun

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(parallel, "any_signal", lambda *_: 15)
        fit(tmp_path, model())
    resumed, _ = fit(tmp_path, model(), resume=True)
    assert resumed.provenance["steps"] == 15 and resumed.provenance["began_with"] == model().provenance


def test_resume_with_workers_and_text(tmp_path, monkeypatch):
    model = lambda: tiny(text_length=1, inference="bottom-up")
    fit(tmp_path / "whole", model(), workers=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "loss_terms", 6)
        fit(tmp_path / "cut", model(), workers=1)
    fit(tmp_path / "cut", model(), workers=0, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resume_ignores_the_weights_given(tmp_path, monkeypatch):
    fit(tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, "loss_terms", 6)
        fit(tmp_path / "cut")
    other = tiny()
    nn.init.ones_(other.to_image.weight)
    torch.randn(5)
    fit(tmp_path / "cut", other, resume=True)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model, history = fit(tmp_path, steps=4)
    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    again, rows = fit(tmp_path, steps=4, resume=True)
    assert same(model.state_dict(), again.state_dict()) and not again.training
    assert [row["step"] for row in rows] == [row["step"] for row in history]
    assert {name: (tmp_path / name).read_bytes() for name in FILES} == before
    assert again.provenance == model.provenance


def test_resume_can_extend_a_run(tmp_path):
    fit(tmp_path, steps=4)
    with pytest.warns(UserWarning, match="goes on with steps = 8 instead of 4$"):
        _, history = fit(tmp_path, steps=8, resume=True)
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert HVAE.load(tmp_path / "hvae.pt").provenance["steps"] == 8


def test_run_is_not_overwritten(tmp_path):
    fit(tmp_path, steps=2)
    before = (tmp_path / "state.pt").read_bytes()
    with pytest.raises(ValueError, match="resume"):
        fit(tmp_path, steps=2)
    assert (tmp_path / "state.pt").read_bytes() == before


def test_model_without_a_run_is_not_overwritten(tmp_path):
    tiny().save(tmp_path / "hvae.pt")
    with pytest.raises(ValueError, match="another folder"):
        fit(tmp_path, steps=2)
    assert [path.name for path in tmp_path.iterdir()] == ["hvae.pt"]


def test_resume_tells_what_is_different(tmp_path):
    fit(tmp_path, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(tmp_path, steps=4, resume=True)
    with pytest.warns(UserWarning, match=r"lr = 0.001 instead of 0.002, free_nats = \[2.0, 3.0\] instead of \[1.0, 1.0\]$"):
        fit(tmp_path, steps=4, resume=True, lr=1e-3, free_nats=[2, 3])


def test_model_without_a_run_cannot_be_resumed(tmp_path):
    """--fit-prior writes such a folder; resuming would train from the beginning and replace the model."""
    tiny().save(tmp_path / "hvae.pt")
    before = (tmp_path / "hvae.pt").read_bytes()
    with pytest.raises(ValueError, match="no run that could be resumed"):
        fit(tmp_path, steps=2, resume=True)
    assert (tmp_path / "hvae.pt").read_bytes() == before


def test_resume_with_fewer_steps_than_there_are(tmp_path):
    fit(tmp_path, steps=4)
    with pytest.raises(ValueError, match="holds 4 steps, more than steps=3"):
        fit(tmp_path, steps=3, resume=True)


def test_numbers_of_numpy_do_not_spoil_the_files(tmp_path):
    fit(tmp_path, steps=4, lr=np.float64(1e-3), beta_start=np.float32(2), ema=np.float64(0.9), binarise=np.bool_(True))
    assert HVAE.load(tmp_path / "hvae.pt").provenance["binarised"] is True
    assert len(fit(tmp_path, steps=6, resume=True)[1]) == 3


@pytest.mark.parametrize("change, message", [
    (dict(val_dataset=TensorDataset(torch.zeros(0, 1, 8, 12), torch.zeros(0, 0))), "no images"),
    (dict(val_dataset=TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, 0))), r"\(1, 8, 8\)"),
    (dict(warmup=math.nan), "warmup"), (dict(lr="fast"), "lr"), (dict(ema=None), "ema"), (dict(seed=True), "seed"),
    (dict(closed_levels=0.5), "closed_levels"), (dict(workers=0.5), "workers")])
def test_nothing_is_begun_that_would_fail_later(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "out", **change)
    assert not (tmp_path / "out").exists()


def test_description_that_no_file_can_keep(tmp_path):
    dataset = bars()
    dataset.description = {"folder": tmp_path}  # a Path
    with pytest.raises(ValueError, match="description"):
        fit(tmp_path / "out", dataset=dataset)


def test_ruined_weights_are_not_saved(tmp_path):
    fit(tmp_path, steps=4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(FloatingPointError, match="step 8: the held-out ELBO"):
        fit(tmp_path, steps=40, lr=1e30, warmup=1, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_resume_with_another_architecture(tmp_path):
    fit(tmp_path, steps=2)
    with pytest.raises(ValueError, match="latent_channels"):
        fit(tmp_path, tiny(latent_channels=3), steps=4, resume=True)


@pytest.mark.parametrize("damage", [
    lambda content: b"", lambda content: b"hello", lambda content: bytes(1000),
    lambda content: content[: len(content) // 2]])
def test_damaged_state(damage, tmp_path):
    fit(tmp_path, steps=1)
    path = tmp_path / "state.pt"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="state.pt"):
        fit(tmp_path, steps=2, resume=True)


@pytest.mark.parametrize("content", [[1, 2], {}, {"config": {}}, {"config": tiny().config}])
def test_other_file_as_state(content, tmp_path):
    torch.save(content, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt"):
        fit(tmp_path, steps=2, resume=True)


# ------------------------------------------------------------------------------------------------ loss


def loss_by_hand(model, x, y, beta, free_nats, closed):
    """(loss, neg_elbo), image by image, from torch.distributions and the same draws as loss_terms."""
    torch.manual_seed(1)
    p_x, draws = model.infer(x, y, closed)
    reconstruction = -p_x.log_prob(x)
    normal = lambda n: torch.distributions.Normal(n.mu, (0.5 * n.logvar).exp())
    loss, neg_elbo = reconstruction.mean(), reconstruction[closed == 0].mean()
    for l, (q, p, z) in enumerate(draws):
        if model.top_down or l + 1 == len(model.levels):
            kl = torch.distributions.kl_divergence(normal(q), normal(p))
        else:
            kl = normal(q).log_prob(z) - normal(p).log_prob(z) - normal(q).log_prob(z) - normal(q).entropy()
        kl = kl.flatten(1).sum(1)
        rows = [kl[i] for i in range(len(x)) if closed[i] <= l]  # the images in which this level is open
        mean = sum(rows) / len(rows)
        loss = loss + beta * len(rows) / len(x) * (max(mean, torch.tensor(free_nats)) if free_nats else mean)
        neg_elbo = neg_elbo + mean
    return loss, neg_elbo


@pytest.mark.parametrize("beta, free_nats", [(1.0, 0.0), (7.0, 0.0), (1.0, 1e4), (3.0, None)])
@pytest.mark.parametrize("inference, closed", [
    ("top-down", [0, 0, 0, 0]), ("top-down", [1, 0, 1, 0]), ("top-down", [2, 1, 1, 0]), ("bottom-up", [0, 0, 0, 0])])
def test_loss_by_hand(inference, closed, beta, free_nats):
    model = tiny(inference=inference, inner_config=[[("res", 4)], [("conv", 4, 2)]], text_length=1).eval()
    x, y, closed = bar_batch(4), bars(4)[:][1], torch.tensor(closed)
    if free_nats is None:  # a floor above the KL of some levels and below that of others
        torch.manual_seed(1)
        _, terms = loss_terms(model, x, y, beta, 0.0, closed)
        free_nats = sum(sorted(terms[f"kl_{l}"] for l in (1, 2, 3))[:2]) / 2
    torch.manual_seed(1)
    loss, terms = loss_terms(model, x, y, beta, free_nats, closed)
    expected, neg_elbo = loss_by_hand(model, x, y, beta, free_nats, closed)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert terms["neg_elbo"] == pytest.approx(neg_elbo.item(), rel=1e-5)
    total = terms["reconstruction"] + sum(terms[f"kl_{l}"] for l in (1, 2, 3))
    assert terms["neg_elbo"] == pytest.approx(total, rel=1e-5)
    assert ("reconstruction_closed" in terms) == bool(closed.any())


def test_open_loss_is_the_negative_elbo():
    model, x = tiny().eval(), bar_batch()
    torch.manual_seed(1)
    loss, terms = loss_terms(model, x, None, 1.0, 0.0, torch.zeros(8, dtype=torch.long))
    torch.manual_seed(1)
    assert loss.item() == pytest.approx(-model(x).elbo.mean().item(), rel=1e-5)
    assert terms["neg_elbo"] == pytest.approx(loss.item(), rel=1e-5)


def test_negative_term_of_a_chain_counts(monkeypatch):
    """As z_2 is drawn from z_1, -H(q) - log p(z_1|z_2) can be negative; without free nats the loss is the -ELBO even so."""
    model, x = tiny(inference="bottom-up").eval(), bar_batch()
    kl = model.kl
    monkeypatch.setattr(model, "kl", lambda *arguments: kl(*arguments) - 100)
    torch.manual_seed(1)
    loss, terms = loss_terms(model, x, None, 1.0, torch.zeros(2), torch.zeros(8, dtype=torch.long))
    torch.manual_seed(1)
    assert terms["kl_1"] < 0
    assert loss.item() == pytest.approx(-model(x).elbo.mean().item(), rel=1e-5)
    loss.backward()
    assert model.levels[0].q.out.weight.grad.abs().sum() > 0


def posterior_gradients(beta, free_nats):
    """Gradients of the loss to the posteriors of the two levels, and their KL."""
    model, x = tiny().eval(), bar_batch()
    torch.manual_seed(1)
    loss, terms = loss_terms(model, x, None, beta, free_nats, torch.zeros(8, dtype=torch.long))
    loss.backward()
    return [torch.cat([p.grad.flatten() for p in level.q.parameters()]) for level in model.levels], terms


def test_free_nats_have_no_gradient():
    """Below the floor a level's KL, whatever its weight, adds nothing to the gradient of its posterior."""
    _, terms = posterior_gradients(1.0, 0.0)
    kl = [terms["kl_1"], terms["kl_2"]]
    assert min(kl) > 0
    for free_nats, unchanged in [(2 * max(kl), [True, True]), (0.0, [False, False])]:
        one, ten = posterior_gradients(1.0, free_nats)[0], posterior_gradients(10.0, free_nats)[0]
        assert [torch.equal(a, b) for a, b in zip(one, ten)] == unchanged


# ------------------------------------------------------------------------------------------------ closed levels


def test_closed_levels_by_default():
    closed = lambda levels: trainer.check_closed(tiny(inner_config=[[("res", 4)]] * (levels - 1)), None)
    assert [closed(levels) for levels in (1, 2, 3, 5, 6)] == [0, 1, 2, 3, 3]


def test_closed_level_takes_the_priors_mean():
    model, x = tiny().eval(), bar_batch(4)
    _, draws = model.infer(x, None, torch.tensor([0, 1, 2, 0]))
    for l, (q, p, z) in enumerate(draws):
        shut = torch.tensor([0, 1, 2, 0]) > l
        assert torch.equal(z[shut], p.mu[shut]) and torch.equal(q.mu[shut], p.mu[shut])
        assert not torch.isclose(z[~shut], p.mu[~shut]).all()
    kl = model(x, None, torch.tensor([0, 1, 2, 0])).kl
    assert ((kl == 0) == torch.tensor([[False, False], [True, False], [True, True], [False, False]])).all()


def test_closed_images_do_not_use_the_posterior():
    """Another posterior of z_1 changes the open images only."""
    model, x, closed = tiny().eval(), bar_batch(4), torch.tensor([0, 1, 0, 1])
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        results.append(model.infer(x, None, closed)[0].parameters.detach())
        nn.init.normal_(model.levels[0].q.out.weight)
    changed = (results[0] != results[1]).flatten(1).any(1)
    assert changed.tolist() == [True, False, True, False]


def test_closed_images_give_the_posterior_no_gradient():
    model, x = tiny().eval(), bar_batch(4)
    for closed in (0, 1, 2):
        model.zero_grad(set_to_none=True)
        terms = model(x, None, torch.full((4,), closed))
        (terms.reconstruction.sum() + terms.kl.sum()).backward()
        for l, level in enumerate(model.levels):
            reached = any(p.grad is not None and bool((p.grad != 0).any()) for p in level.q.parameters())
            assert reached == (l >= closed)


def test_fully_closed_images_do_not_see_x():
    model, x = tiny().eval(), bar_batch(4)
    closed = torch.full((4,), 2)
    p_x, _ = model.infer(x, None, closed)
    p_other, _ = model.infer(1 - x, None, closed)
    assert torch.equal(p_x.parameters, p_other.parameters)


def test_train_closes_levels(tmp_path):
    cases = [({}, True), ({"closed_levels": 0}, False), ({"closed_share": 0.0}, False)]
    for i, (arguments, closes) in enumerate(cases):
        _, history = fit(tmp_path / str(i), steps=1, **arguments)
        assert ("reconstruction_closed" in history[0]) == closes
    for i, arguments in enumerate([{"inference": "bottom-up"}, {"inner_config": []}]):
        _, history = fit(tmp_path / f"none{i}", tiny(**arguments), steps=1)
        assert "reconstruction_closed" not in history[0]


def test_closings_of_a_batch():
    """Half of the batch is closed, and in half of that all levels but the top are."""
    model = tiny(inner_config=[[("res", 4)]] * 4)
    assert trainer.closings(model, 8, 3, 0.5, 0.5).tolist() == [4, 4, 3, 3, 0, 0, 0, 0]
    assert trainer.closings(model, 8, 3, 0.5, 0.0).tolist() == [3, 3, 3, 3, 0, 0, 0, 0]
    assert trainer.closings(model, 8, 3, 0.25, 1.0).tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
    assert trainer.closings(model, 8, 0, 0.5, 0.5).tolist() == [0] * 8


def test_only_the_top_is_open_in_the_first_third(tmp_path, monkeypatch):
    seen, loss_terms = [], trainer.loss_terms
    monkeypatch.setattr(trainer, "loss_terms", lambda *args: seen.append(args[-1].tolist()) or loss_terms(*args))
    fit(tmp_path, tiny(inner_config=[[("res", 4)]] * 3), steps=6, batch_size=4)
    assert seen == [[3, 2, 0, 0]] * 2 + [[2, 2, 0, 0]] * 4


@pytest.mark.parametrize("inference, closed_levels", [("bottom-up", 1), ("top-down", 2), ("top-down", -1)])
def test_impossible_closed_levels(inference, closed_levels, tmp_path):
    with pytest.raises(ValueError, match="closed_levels"):
        fit(tmp_path, tiny(inference=inference), closed_levels=closed_levels)


# ------------------------------------------------------------------------------------------------ fitting p(z_L)

VECTOR_TOP = dict(inner_config=[[("dense", 6)]], latent_channels=(2, 4))


def test_fit_prior_changes_the_flow_alone_and_lowers_the_top_kl():
    model = tiny(**VECTOR_TOP, flow=3)
    nn.init.normal_(model.levels[-1].q.out.bias[:4], std=2.0)  # q(z_2) far from N(0, I)
    before, kl = copy.deepcopy(model.state_dict()), evaluate(model, bars(seed=1))["kl"]
    fitted = fit_prior(model, bars(), steps=200, batch_size=32, lr=5e-3, workers=0)
    assert fitted is model and not model.training
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed and all(name.startswith("levels.1.flow.couplings") for name in changed)
    after = evaluate(model, bars(seed=1))["kl"]
    assert after[1] < kl[1] - 1 and after[0] == pytest.approx(kl[0], rel=0.05)
    assert model.provenance["prior_fit"] == {"images": 40, "steps": 200, "batch_size": 32}


def test_fit_prior_uses_as_many_images_as_it_is_told():
    model = fit_prior(tiny(**VECTOR_TOP, flow=1), bars(), images=12, steps=1, batch_size=4, workers=0)
    assert model.provenance["prior_fit"]["images"] == 12


@pytest.mark.parametrize("binarise", [False, True])
def test_fit_prior_encodes_images_as_they_were_in_training(binarise):
    model, seen = tiny(**VECTOR_TOP, flow=1), []
    model.infer, infer = lambda x, *rest: seen.append(x) or infer(x, *rest), model.infer
    fit_prior(model, bars(), steps=1, batch_size=4, workers=0, binarise=binarise)
    assert bool(((seen[0] == 0) | (seen[0] == 1)).all()) is binarise


def test_no_flow_to_fit():
    with pytest.raises(ValueError, match="no flow"):
        fit_prior(tiny(**VECTOR_TOP, flow=0), bars())


def test_another_flow_leaves_the_rest():
    model = tiny(**VECTOR_TOP, flow=1)
    model.provenance = {"steps": 3}
    changed = trainer.with_flow(model, 2)
    assert len(changed.levels[-1].flow.couplings) == 2 and changed.provenance == {"steps": 3}
    rest = lambda m: {name: weight for name, weight in m.state_dict().items() if ".flow." not in name}
    assert same(rest(changed), rest(model))


# ------------------------------------------------------------------------------------------------ optimisation


def step_with_gradient(clip, module, value):
    module.weight.grad = torch.full_like(module.weight, value)
    return clip(module)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_clipper_skips_gradients_that_are_not_finite(value):
    module, clip = nn.Linear(4, 4, bias=False), Clipper()
    assert not step_with_gradient(clip, module, value)  # even the very first
    assert step_with_gradient(clip, module, 1.0)
    mean = clip.mean
    assert not step_with_gradient(clip, module, value)
    assert clip.skipped == 2 and clip.mean == mean == 4.0
    assert step_with_gradient(clip, module, 1.0)


def test_clipper_clips_to_the_running_mean():
    module, clip = nn.Linear(4, 4, bias=False), Clipper()
    assert step_with_gradient(clip, module, 1.0) and clip.last == 4.0
    assert torch.equal(module.weight.grad, torch.ones(4, 4))  # the first norm is the mean
    assert step_with_gradient(clip, module, 10.0) and clip.last == 40.0
    assert module.weight.grad.norm().item() == pytest.approx(4.0, rel=1e-4)
    assert clip.mean == pytest.approx(0.98 * 4 + 0.02 * 8)  # a spike counts as twice the mean
    assert step_with_gradient(clip, module, 0.5)
    assert torch.equal(module.weight.grad, torch.full((4, 4), 0.5))


def test_clipper_skips_spikes_once_it_knows_the_norm():
    module, clip = nn.Linear(4, 4, bias=False), Clipper()
    for _ in range(301):
        assert step_with_gradient(clip, module, 1.0)
    assert not step_with_gradient(clip, module, 21.0)
    assert step_with_gradient(clip, module, 19.0)
    assert clip.skipped == 1


def test_clipper_takes_norms_that_stay_high():
    module, clip = nn.Linear(4, 4, bias=False), Clipper()
    for _ in range(301):
        step_with_gradient(clip, module, 1.0)
    taken = [step_with_gradient(clip, module, 100.0) for _ in range(200)]
    assert not any(taken[:50]) and all(taken[100:])


@pytest.mark.parametrize("binarise", [False, True])
def test_broken_images_cost_their_steps_alone(binarise, tmp_path):
    """Also where they are among the first, which set the output's level."""
    x, y = bars().tensors
    x[5, 0, 2, 3] = math.nan
    averaged, history = fit(tmp_path, dataset=TensorDataset(x, y), val_dataset=bars(4, seed=1), steps=5, binarise=binarise)
    assert history[-1]["skipped"] == 1  # five batches of eight are the forty images
    assert all(p.isfinite().all() for p in averaged.parameters())


def test_training_survives_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    kept, calls = [], []
    model = tiny()

    def nan_at_third_step(*args):
        calls.append(1)
        loss, terms = loss_terms(*args)
        if len(calls) in (3, 4):
            kept.append(copy.deepcopy(dict(model.named_parameters())))
        return (loss * math.nan if len(calls) == 3 else loss), terms

    monkeypatch.setattr(trainer, "loss_terms", nan_at_third_step)
    averaged, history = fit(tmp_path, model, steps=6)
    assert [row["skipped"] for row in history] == [0, 1, 1]
    assert same(*kept)  # before and after the third step
    assert all(p.isfinite().all() for p in averaged.parameters())
    assert all(p.isfinite().all() for p in model.parameters())


def test_update_average():
    average, model = tiny(), tiny()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for buffer in model.buffers():
        buffer.fill_(7)
    before = copy.deepcopy(average)
    trainer.update_average(average, model, 0.75)
    for mine, old, theirs in zip(average.parameters(), before.parameters(), model.parameters()):
        assert torch.allclose(mine, 0.75 * old + 0.25 * theirs)
    assert all((buffer == 7).all() for buffer in average.buffers())
    trainer.update_average(average, model, 0.0)
    assert same(dict(average.named_parameters()), dict(model.named_parameters()))


def test_without_ema_the_average_is_the_model(tmp_path):
    model = tiny()
    averaged, _ = fit(tmp_path, model, steps=4, ema=0.0)
    assert averaged is not model
    for mine, theirs in zip(averaged.parameters(), model.parameters()):
        assert torch.allclose(mine, theirs, atol=1e-6)


# ------------------------------------------------------------------------------------------------ data


def test_batches_hold_every_index_once_an_epoch():
    drawn = list(batches(12, 4, seed=0, start=0, steps=9))
    epochs = [sum(drawn[i : i + 3], []) for i in (0, 3, 6)]
    assert len(drawn) == 9 and all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_leave_an_epochs_rest_out():
    first = sum(batches(14, 4, seed=0, start=0, steps=3), [])
    assert len(first) == len(set(first)) == 12
    assert set(sum(batches(14, 4, seed=0, start=0, steps=60), [])) == set(range(14))  # another rest every time


def test_batches_resume_the_sequence():
    drawn = list(batches(14, 4, seed=3, start=0, steps=10))
    for start in range(11):
        assert list(batches(14, 4, seed=3, start=start, steps=10)) == drawn[start:]


def test_batches_of_seeds_differ():
    sequences = [list(batches(12, 4, seed, 0, 3)) for seed in (0, 1, 2, 3)]
    assert len({str(sequence) for sequence in sequences}) == 4


@pytest.mark.parametrize("n, held", [(2, 1), (19, 1), (40, 4), (6000, 512)])
def test_hold_out_is_disjoint_and_complete(n, held):
    data = TensorDataset(torch.arange(n), torch.arange(n))
    train_set, val_set = hold_out(data, 0)
    assert len(val_set) == held
    assert sorted(train_set.indices + val_set.indices) == list(range(n))
    assert hold_out(data, 0)[1].indices == val_set.indices
    if n > 2:
        assert hold_out(data, 1)[1].indices != val_set.indices


def test_hold_out_of_captchas_is_another_split():
    data = captchas()
    train_set, val_set = hold_out(data, 0, most=5)
    assert train_set is data and val_set.split == "val" and len(val_set) == 5
    assert (val_set.image_size, val_set.text_length, val_set.charset) == ((16, 32), 2, "AB")
    assert not torch.equal(data[0][0], val_set[0][0])


# ------------------------------------------------------------------------------------------------ evaluate


def recorded(model):
    """The list in which everything that model(x, y) returns from now on is kept."""
    results, forward = [], model.forward

    def record(x, y=None, closed=None, draws=1):
        results.append(forward(x, y, closed, draws))
        return results[-1]

    model.forward = record
    return results


@pytest.mark.parametrize("inference, text_length", [("top-down", None), ("bottom-up", 1)])
def test_evaluate_is_the_average_over_images(inference, text_length):
    """Also where the last batch is short."""
    model, data = tiny(inference=inference, text_length=text_length).eval(), bars(10)
    results = recorded(model)
    metrics = evaluate(model, data, batch_size=4)
    assert [len(result.elbo) for result in results] == [4, 4, 2]
    mean = lambda name: torch.cat([getattr(result, name) for result in results]).mean(0).tolist()
    assert metrics["elbo"] == pytest.approx(mean("elbo"), rel=1e-5)
    assert metrics["reconstruction"] == pytest.approx(mean("reconstruction"), rel=1e-5)
    assert metrics["kl"] == pytest.approx(mean("kl"), rel=1e-5)
    assert metrics["log_likelihood"] == pytest.approx(mean("log_weight"), rel=1e-5)
    assert metrics["elbo"] == pytest.approx(-metrics["reconstruction"] - sum(metrics["kl"]), rel=1e-5)
    assert (metrics["images"], metrics["importance_samples"]) == (10, 1)


def test_evaluate_sees_the_images_and_texts():
    """By the KL of z_2, which no other draw changes in a top-down model."""
    model, data = tiny(text_length=1).eval(), bars(10)
    kl = model(*data[:]).kl[:, 1].mean().item()
    assert evaluate(model, data, batch_size=4)["kl"][1] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("batch_size, calls", [(15, 1), (6, 3), (2, 10)])  # draws may come in more than one call
def test_importance_weighted_bound_by_hand(batch_size, calls):
    model = tiny().eval()
    results = recorded(model)
    metrics = evaluate(model, bars(5), 3, batch_size=batch_size)
    weights = torch.cat([result.log_weight for result in results]).double().exp().view(5, 3)  # image by image
    assert len(results) == calls
    assert metrics["log_likelihood"] == pytest.approx(weights.mean(1).log().mean().item(), rel=1e-5)
    assert metrics["bounds"][1] == pytest.approx(weights.log().mean().item(), rel=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_disturbs_nothing(training):
    model = tiny().train(training)
    weights, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = evaluate(model, bars(5), batch_size=2)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training == training for module in model.modules())
    assert same(model.state_dict(), weights)  # batch norm's statistics, too
    assert all(p.grad is None for p in model.parameters())
    torch.randn(3)
    assert evaluate(model, bars(5), batch_size=2) == first
    assert evaluate(model, bars(5), batch_size=2, seed=1) != first


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "logistic"])
def test_bits_per_dim(likelihood):
    metrics = evaluate(tiny(likelihood=likelihood), bars(6), importance_samples=2)
    if likelihood == "logistic":
        assert metrics["bits_per_dim"] == pytest.approx(-metrics["log_likelihood"] / (8 * 12 * math.log(2)))
    else:
        assert metrics["bits_per_dim"] is None


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_bound_rises_with_importance_samples(inference, tmp_path):
    model, _ = fit(tmp_path, tiny(inference=inference), steps=10, lr=1e-2, eval_every=10)
    one, fifty = evaluate(model, bars(40), 1), evaluate(model, bars(40), 50)
    assert fifty["log_likelihood"] > one["log_likelihood"] + 0.1
    assert fifty["log_likelihood"] > fifty["elbo"] and fifty["importance_samples"] == 50
    assert fifty["elbo"] == pytest.approx(one["elbo"], abs=1)  # the ELBO has the same mean for any number of draws


def test_evaluate_refuses():
    with pytest.raises(ValueError, match="empty"):
        evaluate(tiny(), Subset(bars(), []))
    for samples in (0, -1, 1.5, None):
        with pytest.raises(ValueError, match="importance_samples"):
            evaluate(tiny(), bars(4), samples)


# ------------------------------------------------------------------------------------------------ history


def rows(held_out):
    history = [{"step": 10 * i, "images": 320 * i, "seconds": 1.5 * i, "beta": 2.0, "neg_elbo": 100.0 - i,
                "reconstruction": 80.0 - i, "reconstruction_closed": 90.0 - i, "kl_1": 5.0, "kl_2": 15.0,
                "grad_norm": 3.25, "skipped": 0} for i in range(1, 7)]
    if held_out:
        history[2].update(val_neg_elbo=101.5, val_reconstruction=81.5, val_kl_1=5.0, val_kl_2=15.0)
    return history


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("held_out", [True, False])
def test_plot_history(held_out, tmp_path):
    history = rows(held_out)
    figure = plot_history(history, tmp_path / "loss.png")
    assert isinstance(figure, Figure) and (tmp_path / "loss.png").stat().st_size > 1000
    curves = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
    assert list(curves["training"].get_ydata()) == [row["neg_elbo"] for row in history]
    assert list(curves["held out"].get_xdata()) == ([0.96] if held_out else [])
    assert {"z_1", "z_2"} <= set(curves)


@pytest.mark.parametrize("held_out", [True, False])
def test_history_through_csv(held_out, tmp_path):
    history = rows(held_out)
    trainer.write_csv(tmp_path / "metrics.csv", history)
    again = read_csv(str(tmp_path / "metrics.csv"))
    assert again == history
    assert all(isinstance(row[name], int) for row in again for name in ("step", "images", "skipped"))
    assert isinstance(plot_history(again), Figure)


@pytest.mark.filterwarnings("ignore:No artists")
def test_plot_of_an_empty_history():
    assert isinstance(plot_history([]), Figure)


def test_csv_is_a_plain_table(tmp_path):
    fit(tmp_path, steps=2)
    with open(tmp_path / "metrics.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0][:2] == ["step", "images"] and {"neg_elbo", "kl_1", "val_neg_elbo", "seconds"} <= set(table[0])
    assert all(len(row) == len(table[0]) for row in table)


# ------------------------------------------------------------------------------------------------ command line

OPTIONS = """--data --folder --skip-bad --root --config --init --binarise --keep --size --length --charset --fonts --images --cache
    --workers --inference --likelihood --sigma --mixtures --neighbours --flow --unconditional --steps --batch-size --lr --warmup --beta-start --beta-steps --free-nats --closed-levels
    --closed-share --top-share --ema --eval-every --device --seed --out --resume --fit-prior --evaluate --importance-samples""".split()


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Default models of a few channels, and a folder of images; returns the options to train on it."""
    monkeypatch.setattr(trainer, "model_for", functools.partial(trainer.model_for, **TINY))
    for i in range(12):
        image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(i))
        save_image(image, write_to(tmp_path / "in", ["AB", "BA"][i % 2], i))
    return ["--folder", str(tmp_path / "in"), "--workers", "0", "--steps", "2", "--batch-size", "4", "--device", "cpu",
            "--out", str(tmp_path / "out")]


def test_help():
    script = Path(trainer.__file__)
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert all(option in done.stdout for option in OPTIONS)
    assert f"default: {inspect.signature(train).parameters['steps'].default})" in done.stdout


def test_command_line_on_folder(small, tmp_path, capsys):
    trainer.main(small + ["--length", "2", "--charset", "AB"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES + FIGURES)
    assert str(tmp_path / "out") in capsys.readouterr().out
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")


def test_command_line_leaves_out_bad_files(small, tmp_path, capsys):
    (Path(small[1]) / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(SystemExit):
        trainer.main(small)
    assert "broken.png" in capsys.readouterr().err.splitlines()[-1]
    with pytest.warns(UserWarning, match="broken.png"):
        trainer.main(small + ["--skip-bad"])
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["data"]["count"] == 12


def test_command_line_names_a_file_that_breaks_later(small, capsys, monkeypatch):
    """In a worker process, whose errors come with their traceback."""
    data = CaptchaFolder(small[1])
    data.paths[3].write_bytes(b"")
    monkeypatch.setattr(trainer, "make_dataset", lambda args: data)
    monkeypatch.setattr(trainer, "hold_out", lambda *_: (data, data))
    with pytest.raises(SystemExit) as stop:
        trainer.main([*small, "--steps", "4", "--workers", "1"])
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and "error: " in last and data.paths[3].name in last


def test_command_line_keeps_every_model(small, tmp_path):
    trainer.main(small + ["--eval-every", "1", "--keep"])
    kept = [HVAE.load(tmp_path / "out" / f"hvae-{step:06d}.pt").provenance["steps"] for step in (1, 2)]
    assert kept == [1, 2]


def test_command_line_model_options(small, tmp_path):
    trainer.main(small + ["--length", "2", "--unconditional", "--inference", "bottom-up", "--likelihood", "logistic",
                          "--mixtures", "2", "--neighbours", "--size", "8", "12"])
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length) == ((3, 8, 12), None)
    assert (model.top_down, model.likelihood, model.mixtures, model.neighbours) == (False, "logistic", 2, True)


def test_command_line_on_captchas(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "hold_out", functools.partial(hold_out, most=4))
    trainer.main(small[2:] + ["--images", "8", "--size", "16", "40", "--length", "3", "--charset", "XYZ", "--cache",
                              "memory", "--steps", "1"])
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 40), 3, "XYZ")
    assert model.provenance["data"]["size"] == 8


def test_command_line_resumes(small, tmp_path, capsys):
    trainer.main(small)
    with pytest.raises(SystemExit):
        trainer.main(small)
    trainer.main(small + ["--steps", "4", "--resume"])
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["steps"] == 4
    assert [row["step"] for row in read_csv(tmp_path / "out" / "metrics.csv")] == [2, 4]


def test_command_line_evaluates(small, tmp_path, capsys):
    model = tiny(input_size=(16, 32), input_channels=3, likelihood="logistic", text_length=2, charset="AB")
    model.save(tmp_path / "model.pt")
    options = small[:2] + ["--evaluate", str(tmp_path / "model.pt"), "--importance-samples", "3", "--device", "cpu"]
    trainer.main(options + ["--out", str(tmp_path / "out")])
    printed = capsys.readouterr().out
    metrics = evaluate(model.eval(), CaptchaFolder(small[1], text_length=2, charset="AB"), 3)
    for number in (-metrics["elbo"], metrics["reconstruction"], *metrics["kl"], -metrics["log_likelihood"]):
        assert f"{number:,.2f}" in printed
    assert f"{metrics['bits_per_dim']:.3f}" in printed
    assert not (tmp_path / "out").exists()  # nothing is trained


def test_command_line_begins_with_a_checkpoint(small, tmp_path, capsys):
    model = tiny(input_size=(16, 32), input_channels=3, text_length=2, charset="AB", likelihood="gaussian", sigma=0.3)
    model.provenance = {"steps": 7}
    model.save(tmp_path / "model.pt")
    init = ["--length", "2", "--charset", "AB", "--init", str(tmp_path / "model.pt")]
    trainer.main(small + ["--lr", "1e-12"] + init)
    trained = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert trained.config == model.config
    assert trained.provenance["steps"] == 9 and trained.provenance["began_with"] == {"steps": 7}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, atol=1e-6, rtol=1e-5)
    with pytest.raises(SystemExit):  # the data have no texts
        trainer.main(small + init[-2:] + ["--out", str(tmp_path / "other")])


def test_command_line_adds_neighbours_to_a_checkpoint(small, tmp_path):
    """They change nothing until they are trained."""
    model = tiny(outer_config=[("conv", 4, 2)], input_size=(16, 32), input_channels=3, likelihood="logistic", mixtures=2).eval()
    model.provenance = {"steps": 7}
    model.save(tmp_path / "model.pt")
    trainer.main(small + ["--init", str(tmp_path / "model.pt"), "--neighbours", "--lr", "1e-12"])
    trained = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert trained.config == {**model.config, "neighbours": True} and trained.provenance["steps"] == 9
    x, _ = next(iter(make_loader(CaptchaFolder(small[1]), 4)))
    elbos = []
    for either in (model, trained):
        torch.manual_seed(0)
        elbos.append(either(x).elbo)
    torch.testing.assert_close(*elbos, rtol=1e-5, atol=1e-2)


def test_command_line_fits_the_prior(small, tmp_path, monkeypatch):
    model = tiny(**VECTOR_TOP, flow=0, input_size=(16, 32), input_channels=3)
    model.save(tmp_path / "model.pt")
    monkeypatch.setattr(trainer, "fit_prior", functools.partial(trainer.fit_prior, steps=2, batch_size=4))
    trainer.main(small + ["--fit-prior", str(tmp_path / "model.pt"), "--flow", "2"])
    fitted_to, held_out = hold_out(CaptchaFolder(small[1]), 0)
    fitted = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert fitted.config == {**model.config, "flow": 2} and fitted.provenance["prior_fit"]["steps"] == 2
    assert fitted.provenance["prior_fit"]["images"] == len(fitted_to)  # and none of those it is measured on
    assert fitted.provenance["held_out"]["images"] == len(held_out)
    assert not (tmp_path / "out" / "state.pt").exists()
    before = (tmp_path / "out" / "hvae.pt").read_bytes()
    for options in (["--out", str(tmp_path / "other")], ["--flow", "2"]):  # no flow to fit; a model is there already
        with pytest.raises(SystemExit):
            trainer.main(small + ["--fit-prior", str(tmp_path / "model.pt"), *options])
    assert (tmp_path / "out" / "hvae.pt").read_bytes() == before


def test_evaluation_is_on_what_the_command_line_names(small):
    model = tiny(text_length=2, input_size=(30, 80), input_channels=3)
    options = lambda *words: trainer.parse(["--evaluate", "any.pt", *words])[1]
    assert len(trainer.test_set_for(tiny(), options(*small[:2], "--images", "3"))) == 3
    font = captcha.image.DEFAULT_FONTS[0]
    assert trainer.test_set_for(model, options("--fonts", font)).fonts == [font]


def test_command_line_names_a_killed_worker(small, monkeypatch):
    def killed(*args, **kwargs):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")  # as torch says it

    monkeypatch.setattr(trainer, "train", killed)
    with pytest.raises(SystemExit, match="DataLoader worker.*killed.*--resume"):
        trainer.main(small)


def test_command_line_seed_sets_the_weights(small, tmp_path):
    models = []
    for i, seed in enumerate("001"):
        torch.manual_seed(100 + i % 2)  # whatever was drawn before
        trainer.main(small + ["--steps", "1", "--lr", "1e-9", "--seed", seed, "--out", str(tmp_path / str(i))])
        models.append(HVAE.load(tmp_path / str(i) / "hvae.pt").levels[0].q.hidden.weight)
    assert torch.equal(models[0], models[1])
    assert not torch.allclose(models[0], models[2], atol=1e-3)


@pytest.mark.parametrize("options, message", [
    (["--steps", "0"], "steps"), (["--steps", "many"], "--steps"), (["--batch-size", "100"], "batch_size=100"),
    (["--lr", "-1"], "lr"), (["--closed-levels", "9"], "closed_levels"), (["--inference", "sideways"], "--inference"),
    (["--inference", "bottom-up", "--closed-levels", "1"], "closed_levels"), (["--sigma", "-1"], "sigma"),
    (["--mixtures", "0"], "mixtures"), (["--neighbours"], "neighbours"), (["--flow", "2"], "flow"), (["--length", "3"], "3 symbols"), (["--size", "0", "5"], "image_size"),
    (["--charset", ""], "charset"), (["--workers", "-1"], "workers: expected a whole number"), (["--eval-every", "0"], "eval_every"),
    (["--folder", "no/such/folder"], "no/such/folder"), (["--device", "toaster"], "toaster"), (["--device", "meta"], "meta"),
    (["--seed", "-1"], "seed"), (["--seed", str(2**64)], "seed"), (["--wings"], "--wings"),
    (["--folder", "", "--images", "0"], "images"), (["--folder", "", "--images", str(10**20)], "int"),
    (["--folder", "", "--images", str(10**12), "--cache", "memory"], "shared memory"), (["--folder", "", "--length", "0"], "length"),
    (["--evaluate", "no/such/model.pt"], "no/such/model.pt"), (["--init", "no/such/model.pt"], "no/such/model.pt"),
    (["--init", "some.pt", "--sigma", "1", "--unconditional"], "sigma, text_length"),
    (["--init", "some.pt", "--no-neighbours"], "neighbours"), (["--folder", "", "--fonts", "no.ttf"], "no.ttf")])
def test_command_line_errors(options, message, small, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "hold_out", functools.partial(hold_out, most=4))
    with pytest.raises(SystemExit) as stop:
        trainer.main(small + options)
    assert stop.value.code == 2
    *usage, line = capsys.readouterr().err.splitlines()
    assert len(usage) <= 1 and "error:" in line and message in line
