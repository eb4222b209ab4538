import copy
import csv
import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import contextmanager
from pathlib import Path

import captcha.image
import numpy as np
import pytest
import torch
from benchmarks import fit_prior as fit_prior_script
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import Dataset, Subset, TensorDataset
from torchvision.utils import save_image

import generate
import trainer
from dataset import CaptchaDataset, CaptchaFolder
from generate import held_out_images, save_figures
from hvae.checkpoint import read_tensors, write_csv, write_tensors
from hvae.fit_prior import fit_prior
from hvae.run import GradientClipper, ema_with_warmup
from model import CONFIGS, HVAE, WITHOUT_WINDOWS
from trainer import (
    Hyperparameters,
    batch_means,
    batches,
    begin_with,
    evaluate,
    hold_out,
    objective,
    plot_history,
    shifted,
    train,
    warped,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*resuming with"),  # more steps, often
    pytest.mark.filterwarnings("ignore:.*no text has"),  # some symbol
]
TINY = dict(outer_config=[("conv-bn", 4, 2)], inner_config=[[("res", 4)]], latent_channels=2)
VECTOR_TOP = dict(inner_config=[[("dense", 6)]], latent_channels=(2, 4))
FILES = [".lock", "hvae.pt", "loss.png", "metrics.csv", "samples.png", "state.pt"]
FIGURES = ["interpolation", "levels", "originals", "prior_vs_aggregate", "reconstructions"]
FIGURES = [f"{name}.png" for name in (*FIGURES, "temperatures")]


def tiny(**arguments):
    """A seeded two-level model of 8x12 grey images; `arguments` replace any of HVAE's."""
    torch.manual_seed(0)
    data = dict(input_size=(8, 12), input_channels=1, text_length=None, charset="ABCD")
    return HVAE(**{**TINY, **WITHOUT_WINDOWS, **data, "likelihood": "bernoulli", **arguments})


def tiny_captcha(**arguments):
    """The same for the 16x32 colour images of captchas()."""
    data = dict(input_size=(16, 32), input_channels=3, text_length=2, charset="AB")
    return tiny(**{**data, "likelihood": "gaussian", **arguments})


def bars(n=40, seed=0):
    """Grey 8-bit images with a bright bar in one of four places, and its number as the text."""
    place = torch.arange(n) % 4
    x = 0.2 * torch.rand(n, 1, 8, 12, generator=torch.Generator().manual_seed(seed))
    for i in range(n):
        x[i, :, :, 3 * place[i] : 3 * place[i] + 2] += 0.7
    return TensorDataset((255 * x).round() / 255, place[:, None])


def captchas(n=12, split="train"):
    return CaptchaDataset(n, split, image_size=(16, 32), text_length=2, charset="AB")


def image_folder(folder, texts):
    """Random images, each named after its text."""
    folder.mkdir()
    for i, text in enumerate(texts):
        image = torch.rand(3, 16, 32, generator=torch.Generator().manual_seed(i))
        save_image(image, folder / f"{text}_{i}.png")
    return folder


def read_csv(path: str | Path) -> list[dict]:
    """A history that train() wrote: a list of rows of numbers."""
    whole_numbers = ("step", "images", "skipped")
    with open(path, newline="") as file:
        return [
            {k: int(v) if k in whole_numbers else float(v) for k, v in row.items() if v != ""}
            for row in csv.DictReader(file)
        ]


def fit(out, model=None, dataset=None, **arguments):
    """A short run of train()."""
    schedule = dict(steps=8, batch_size=8, warmup=3, beta_steps=5, eval_every=4, log_every=2)
    settings = dict(**schedule, free_nats=1.0, workers=0, device="cpu")
    dataset = bars() if dataset is None else dataset
    return train(model or tiny(), dataset, out=out, **{**settings, **arguments})


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Leaves pictures undrawn: they take ten times as long as the rest of a tiny run."""
    monkeypatch.setattr(trainer, "plot_history", lambda history, path: path.touch())
    monkeypatch.setattr(trainer, "save_figures", lambda *_: None)


def same(a, b):
    """Two state dicts, bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def without_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def bar_batch(n=8):
    return bars(n).tensors[0]


# ---------------------------------------------------------------------------- train


def test_train_returns_model_and_history_and_writes_files(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "plot_history", plot_history)
    out = tmp_path / "runs" / "first"
    model, history = fit(out)
    assert sorted(content(out)) == sorted(FILES)
    assert [name for name in FILES if (out / name).stat().st_size == 0] == [".lock"]
    assert not any(module.training for module in model.modules())
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert [row["images"] for row in history] == [16, 32, 48, 64]
    for row in history:
        assert ("val_neg_elbo" in row) == (row["step"] % 4 == 0)
        for prefix in ["", "val_"][: 1 + ("val_neg_elbo" in row)]:
            terms = [row[prefix + name] for name in ("reconstruction", "kl_1", "kl_2")]
            assert row[f"{prefix}neg_elbo"] == pytest.approx(sum(terms), rel=1e-5)


def test_files_hold_what_train_returns(tmp_path):
    model, history = fit(tmp_path)
    loaded = HVAE.load(tmp_path / "hvae.pt")
    assert same(loaded.state_dict(), model.state_dict())
    assert loaded.provenance == model.provenance
    assert loaded.provenance["steps"] == 8 and loaded.provenance["images_seen"] == 64
    assert -loaded.provenance["held_out"]["elbo"] == history[-1]["val_neg_elbo"]
    rows = read_csv(tmp_path / "metrics.csv")
    assert [row.keys() for row in rows] == [row.keys() for row in history]
    for row, kept in zip(history, rows, strict=True):
        assert kept == pytest.approx(row, abs=1e-4)


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_training_improves_held_out_elbo(inference, tmp_path):
    train_set, val_set = Subset(bars(72), range(64)), bars(24, seed=1)
    settings = dict(steps=60, batch_size=16, lr=1e-2, eval_every=5, log_every=5)
    model = tiny(inference=inference)
    _, history = fit(tmp_path, model, train_set, val_dataset=val_set, **settings)
    assert history[-1]["val_neg_elbo"] < history[0]["val_neg_elbo"] - 3


def test_train_on_captchas(tmp_path):
    settings = dict(steps=40, lr=1e-2, eval_every=5, log_every=5)
    val_set = captchas(8, "val")
    _, history = fit(tmp_path, tiny_captcha(), captchas(32), val_dataset=val_set, **settings)
    assert history[-1]["val_neg_elbo"] < history[0]["val_neg_elbo"] - 100
    assert HVAE.load(tmp_path / "hvae.pt").provenance["data"]["renderer"] == "captcha"


@pytest.mark.parametrize("text_length", [None, 2])
def test_train_on_folder(text_length, tmp_path):
    folder = image_folder(tmp_path / "in", ["AB", "BA", "AA", "BB", "AB", "BA"])
    data = CaptchaFolder(folder, text_length=text_length, charset="AB")
    model, _ = fit(tmp_path / "out", trainer.model_for(data, **TINY), data, steps=2, batch_size=4)
    assert model.input_shape == (3, 16, 32) and model.text_length == text_length
    assert model.sample(2, "AB" if text_length else None).shape == (2, 3, 16, 32)
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["data"]["count"] == 6


def test_model_for_data():
    model = trainer.model_for(captchas(), **TINY)
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")
    assert trainer.model_for(captchas(), **TINY, text_length=None).text_length is None
    model = trainer.model_for(bars(), **TINY, likelihood="bernoulli")
    assert (model.input_shape, model.text_length) == ((1, 8, 12), None)
    assert model.config["likelihood"] == "bernoulli"


def test_train_without_model_takes_the_default_one(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "model_for", functools.partial(trainer.model_for, **TINY))
    settings = dict(val_dataset=captchas(4, "val"), steps=1, batch_size=4, workers=0)
    model, _ = train(dataset=captchas(), out=tmp_path, **settings)
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")


def test_same_seed_same_run(tmp_path):
    runs = [fit(tmp_path / str(i), steps=3, seed=seed) for i, seed in enumerate([0, 0, 1])]
    assert same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert not same(runs[0][0].state_dict(), runs[2][0].state_dict())


def test_workers_do_not_change_the_run(tmp_path):
    runs = [fit(tmp_path / str(workers), steps=4, workers=workers) for workers in (0, 1)]
    assert same(runs[0][0].state_dict(), runs[1][0].state_dict())
    assert without_seconds(runs[0][1]) == without_seconds(runs[1][1])


def test_output_level_is_set_only_for_a_fresh_model(tmp_path):
    """Weights from load_state_dict keep their bias, although nothing says where they come from."""
    white = TensorDataset(torch.ones(16, 1, 8, 12), torch.zeros(16, 0))
    fresh, filled = tiny(), tiny()
    weights = {**tiny().state_dict(), "to_image.bias": torch.tensor([0.5])}
    filled.load_state_dict(weights)
    biases = []
    for name, model in (("fresh", fresh), ("filled", filled)):
        model, _ = fit(tmp_path / name, model, white, steps=1, lr=1e-12)
        biases.append(model.to_image.bias.item())
    assert biases == pytest.approx([math.log(99), 0.5], rel=1e-5)


def test_beta_falls_from_start_to_one(tmp_path):
    settings = dict(log_every=1, eval_every=20, beta_start=9.0, beta_steps=10)
    _, history = fit(tmp_path, steps=20, **settings)
    betas = [row["beta"] for row in history]  # row i is of step i, counted from 0
    assert betas[0] == 9 and betas[5] == pytest.approx(3, abs=1e-3)  # halfway, as an exponential
    assert betas == sorted(betas, reverse=True)
    assert betas[9] > 1 and betas[10:] == [1] * 10


def test_beta_reaches_one_in_a_short_run_too():
    hp = Hyperparameters(steps=100, beta_start=0.1, beta_steps=2_000)
    hp.fit_to(tiny())
    assert hp.beta_at(0) == 0.1 and hp.beta_at(59) < 1 and hp.beta_at(60) == 1


@given(st.integers(2, 60), st.floats(0, 1), st.floats(0, 1))
def test_free_nats_fall_to_none(steps, share, until):
    share, until = sorted((share, until))
    hp = Hyperparameters(steps=steps, free_nats=[2.0, 6.0], free_share=share, free_until=until)
    free = torch.stack([hp.free_nats_at(step) for step in range(steps + 1)])
    assert (free.diff(dim=0) <= 1e-6).all() and (free >= 0).all()
    assert not free[math.ceil(until * steps) :].any()
    if until > share + 0.01:
        assert torch.allclose(free[: math.ceil(share * steps)], torch.tensor([2.0, 6.0]))
        middle = (share + until) / 2 * steps
        assert torch.allclose(hp.free_nats_at(middle), torch.tensor([1.0, 3.0]), atol=1e-4)


def test_free_nats_cannot_end_before_they_become_fewer():
    with pytest.raises(ValueError, match="free_share.*0.6"):
        Hyperparameters(free_share=0.7)


def test_a_kl_counts_once_the_free_nats_are_fewer(tmp_path):
    """Nats a little above the first KL: at the second of three steps they have fallen below it."""
    settings = dict(steps=3, beta_start=1.0, closed_share=0.0, log_every=1, eval_every=1, keep=True)
    first = fit(tmp_path / "first", free_nats=0.0, **settings)[1][0]
    settings["free_nats"] = [1.2 * first["kl_1"], 1.2 * first["kl_2"]]
    for name, share in (("kept", 1.0), ("fallen", 0.0)):
        fit(tmp_path / name, free_share=share, free_until=1.0, **settings)
    kept, fallen = (
        [HVAE.load(tmp_path / name / f"hvae-00000{n}.pt").state_dict() for n in (1, 2)]
        for name in ("kept", "fallen")
    )
    assert same(kept[0], fallen[0]) and not same(kept[1], fallen[1])


def test_learning_rate_rises_and_falls():
    hp = Hyperparameters(steps=100, warmup=10, lr=1.0)
    rates = [hp.lr_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1 and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.51)  # halfway down the cosine
    assert rates[-1] == pytest.approx(0.02, abs=1e-3)
    assert Hyperparameters(steps=100, warmup=0, lr=1.0).lr_at(0) == 1
    assert 0 < Hyperparameters(steps=5, warmup=200, lr=1.0).lr_at(4) < 0.1


def with_context(**arguments):
    """A tiny model for 8-bit images, with batch normalisation on both sides."""
    outer = [("conv-bn", 4), ("conv-bn", 4, 2)]
    context = dict(likelihood="logistic", context=(2, 2), mixtures=2)
    return tiny(outer_config=outer, **context, **arguments)


@pytest.mark.parametrize("images", [40, 6000])  # a tenth is held out
def test_the_last_phase_leaves_latents_as_they_are(tmp_path, images):
    """It begins with the averaged weights, and gives the model back whole."""
    model = with_context(**VECTOR_TOP, prior_context=(1, 1), flow=2)
    fit(tmp_path, model, bars(images), frozen_share=0.5, keep=True, ema=0.5)  # of eight steps
    models = [HVAE.load(tmp_path / f"hvae-00000{n}.pt") for n in (4, 8)]
    before, after = (kept.state_dict() for kept in models)
    learned = {name for name, w in before.items() if not torch.equal(w, after[name])}
    p_x = ("generation.0.", "to_image.", "context.")
    priors = ("levels.0.window.", "levels.0.prior_features.", "levels.1.flow.couplings.")
    priors = priors if images > 5000 else ()  # few images would be learned by heart
    assert learned == {n for n in before if n.startswith((*p_x, *priors))}
    assert all(any(n.startswith(part) for n in learned) for part in (*p_x, *priors))
    frozen = model.state_dict().keys() - learned
    assert all(torch.equal(model.state_dict()[name], after[name]) for name in frozen)
    assert all(p.requires_grad for p in model.parameters())
    x, of = bar_batch(), []
    for kept in models:
        _, levels = kept.infer(x, generator=torch.Generator().manual_seed(0))
        of.append([torch.cat([level.q.mu, level.q.logvar]) for level in levels])
    assert all(map(torch.equal, *of))


def test_priors_come_nearer_to_q_in_the_last_phase(tmp_path):
    """Even where the KL was free before."""
    model = with_context(**VECTOR_TOP, prior_context=(1, 1), flow=2)
    for level in model.levels:
        nn.init.normal_(level.q.out.bias, std=2.0)
    before = evaluate(model, bars())["kl"]
    settings = dict(steps=60, frozen_share=1, lr=1e-2, free_nats=1e4, eval_every=60)
    after = evaluate(fit(tmp_path, model, bars(6000), **settings)[0], bars())["kl"]
    assert all(kl < before_it - 1 for kl, before_it in zip(after, before, strict=True))


def test_the_last_phase_leaves_as_it_is_what_was_frozen_before(tmp_path):
    model = with_context()
    model.set_output_level(bar_batch())  # which a run would do first
    model.to_image.requires_grad_(False)
    before = copy.deepcopy(model.to_image.state_dict())
    fit(tmp_path, model, frozen_share=0.5)
    assert same(model.to_image.state_dict(), before)
    assert not any(p.requires_grad for p in model.to_image.parameters())
    assert all(p.requires_grad for p in model.context.parameters())


def test_the_last_phase_has_parts_of_two_images_or_more(tmp_path):
    """A map of 1x1 has one value for each image, and batch normalisation needs two."""
    data = TensorDataset(torch.rand(40, 3, 8, 8), torch.zeros(40, 0))
    outer = [("conv-bn", 4, 2)] * 3 + [("conv-bn", 4)]
    model = HVAE(outer, [], (8, 8), text_length=None)
    fit(tmp_path, model, data, batch_size=5, frozen_share=0.5)


def test_the_schedules_of_both_phases():
    """The learning rate rises and falls in each; beta is 1 and levels are open in the last."""
    hp = Hyperparameters(steps=4000, frozen_share=0.25, lr=1.0)
    hp.fit_to(HVAE())
    rates = [hp.lr_at(step) for step in range(4000)]
    assert rates[200] == rates[3200] == 1
    assert rates[2999] == pytest.approx(0.02, abs=1e-3)
    assert rates[3999] == pytest.approx(0.02, abs=1e-3)
    assert hp.beta_at(1799) > 1 and hp.beta_at(1800) == 1
    assert hp.closed_at(999, 5).any() and not hp.closed_at(1000, 5).any()
    assert hp.free_nats_at(1000).tolist() == [40, 40, 40, 40, 80]
    assert hp.free_nats_at(1400).tolist() == pytest.approx([20, 20, 20, 20, 40])
    assert not hp.free_nats_at(1800).any() and not hp.free_nats_at(3999).any()
    only_last = Hyperparameters(steps=1000, frozen_share=1, free_nats=[40.0])
    assert not only_last.free_nats_at(0).any()
    assert hp.pixel_weight_at(2999) == 0.01 and hp.pixel_weight_at(3000) == 0.3
    hp = Hyperparameters(steps=1000, frozen_share=0.1, lr=1.0)
    hp.fit_to(HVAE(**CONFIGS["mnist-hvae"]))
    assert hp.pixel_weight_at(950) == 1  # it has risen, and stays
    assert max(hp.lr_at(step) for step in range(900, 1000)) == 1


@pytest.mark.parametrize(
    "steps, changes, share",
    [
        (2000, {}, 0.2),
        (1999, {}, 0),
        (2000, dict(likelihood="bernoulli"), 0),
        (2000, dict(likelihood="gaussian", context=None), 0),
    ],
)
def test_when_there_is_a_last_phase(steps, changes, share):
    hp = Hyperparameters(steps=steps)
    hp.fit_to(HVAE(**{**TINY, "input_size": (8, 12), **changes}))
    assert hp.frozen_share == share


def test_optimizer_follows_the_learning_rate(tmp_path):
    fit(tmp_path, steps=8, lr=1e-2)
    expected = Hyperparameters(steps=8, warmup=3, lr=1e-2).lr_at(7)
    for (group,) in read_tensors(tmp_path / "state.pt")[1]["optimizers"]:
        assert group["lr"] == pytest.approx(expected)


def test_evaluations_between_log_steps(tmp_path):
    """A held-out value stands in the row of the step at which it was measured."""
    _, history = fit(tmp_path, steps=10, log_every=4, eval_every=5)
    assert [row["step"] for row in history if "val_neg_elbo" in row] == [5, 10]


OUT_OF_RANGE = {
    **dict.fromkeys(("steps", "batch_size", "eval_every", "log_every"), [0, -1, 1.5, None]),
    "beta_steps": [0, -1, 1.5],
    "pixel_weight": [-0.1, 1.1],
    "pixel_rise": [-0.1, 1.1],
    "warmup": [-1, math.nan],
    "lr": [0, -1, math.inf, math.nan, "fast"],
    "beta_start": [0, math.nan],
    "free_nats": [-1, math.nan, [1, 1, 1], [1, -1]],
    "ema": [1, -0.1, None],
    "closed_share": [1, -0.1],
    "top_share": [1.1, -0.1, math.nan],
    "closed_levels": [0.5],
    "frozen_share": [1.1, -0.1, math.nan, math.inf, "half"],
    "shift": [-1, 0.5],
    "warp": [-1, math.nan],
    "window_noise": [-0.1, 1.1],
    "seed": [True, -1, 2**32],
    "workers": [-1, 0.5],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_arguments_out_of_range(name, tmp_path):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=name):
            fit(tmp_path / "out", **{name: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "model, data, message",
    [
        ({}, bars(8), "batch_size=8"),  # 7 without the one held out
        ({}, bars(1), "batch_size=8"),
        ({}, Subset(bars(), []), "batch_size=8"),
        ({"input_size": (8, 16)}, bars(), r"\(1, 8, 12\).*\(1, 8, 16\)"),
        ({"input_channels": 3}, bars(), r"\(1, 8, 12\).*\(3, 8, 12\)"),
        ({"text_length": 2}, bars(), "1 symbols.*2"),
        ({"text_length": 1, "charset": "AB"}, bars(), "charset"),  # the texts go up to 3
        ({}, [(2 * x - 1, y) for x, y in bars()], r"in \[0, 1\]"),
        ({"text_length": 1}, [(x, int(y)) for x, y in bars()], "text_length=None"),
    ],
)
def test_data_that_do_not_fit_the_model(model, data, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, tiny(**model), data)


def test_texts_may_be_arrays(tmp_path):
    data = [(x, y.numpy()) for x, y in bars()]
    fit(tmp_path, tiny(text_length=1), data)


@pytest.mark.parametrize(
    "shape, message", [((0, 1, 8, 12), "no images"), ((4, 1, 8, 8), r"\(1, 8, 8\)")]
)
def test_held_out_data_that_do_not_fit(shape, message, tmp_path):
    val_set = TensorDataset(torch.zeros(shape), torch.zeros(shape[0], 0))
    with pytest.raises(ValueError, match=message):
        fit(tmp_path / "out", val_dataset=val_set)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrap", [lambda data: data, lambda data: Subset(data, range(12))])
def test_charset_of_the_data_is_not_the_models(wrap, tmp_path):
    """The same indices would mean other symbols, and nothing else would tell."""
    with pytest.raises(ValueError, match="'AB'.*'BA'"):
        val_set = captchas(4, "val")
        fit(tmp_path, tiny_captcha(charset="BA"), wrap(captchas()), val_dataset=val_set)


# ---------------------------------------------------------------------------- resume


@contextmanager
def interruption(target, call):
    """From its `call`-th call on, a function ("module.name") is interrupted as by Ctrl-C."""
    module, name = target.rsplit(".", 1)
    function, calls = getattr(sys.modules[module], name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) >= call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, interrupted)
        yield


@contextmanager
def signal_in_step(step, number):
    """This process receives a signal in the middle of that step."""
    training_step = trainer.training_step

    def with_signal(run, x, y):
        if run.step == step - 1:
            os.kill(os.getpid(), number)
        return training_step(run, x, y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "training_step", with_signal)
        yield


def assert_same_run(one, two):
    """Two folders' weights, averages, and metrics without the time are equal, bit for bit."""
    (tensors, state), (others, other) = (read_tensors(out / "state.pt") for out in (one, two))
    assert same(tensors, others)
    assert state["step"] == other["step"] and state["clip"] == other["clip"]
    models = [HVAE.load(out / "hvae.pt") for out in (one, two)]
    assert same(models[0].state_dict(), models[1].state_dict())
    rows = [read_csv(out / "metrics.csv") for out in (one, two)]
    assert [row["step"] for row in rows[1]] == sorted({row["step"] for row in rows[1]})
    assert without_seconds(rows[0]) == without_seconds(rows[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """The folder of a run that fit() made in one piece."""
    out = tmp_path_factory.mktemp("uninterrupted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "plot_history", lambda history, path: path.touch())
        fit(out)
    return out


@pytest.mark.parametrize(
    "target, call",
    [
        ("trainer.training_step", 2),  # before the first checkpoint
        ("trainer.training_step", 7),  # between two checkpoints
        ("trainer.evaluate", 2),
        ("trainer.sample_sheet", 2),  # the metrics are already written
        ("hvae.run.write_tensors", 2),  # the model, too
    ],
)
def test_resume_is_bitwise(target, call, uninterrupted, tmp_path):
    with interruption(target, call):
        fit(tmp_path)
    fit(tmp_path, resume=True)
    assert_same_run(uninterrupted, tmp_path)


def test_resume_between_log_steps(tmp_path):
    """A row averages over all its steps, though the interruption fell among them."""
    fit(tmp_path / "unbroken", log_every=3)
    with signal_in_step(5, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "cut", log_every=3)
    fit(tmp_path / "cut", log_every=3, resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


def test_resume_of_wide_layers_is_bitwise(tmp_path):
    """The state has the momentum of Muon, too."""
    wide = lambda: tiny(outer_config=[("conv", 16, 2), ("res", 16)])
    fit(tmp_path / "unbroken", wide())
    tensors = read_tensors(tmp_path / "unbroken" / "state.pt")[0]
    assert any(name.startswith("Muon.") for name in tensors)
    with interruption("trainer.training_step", 7):
        fit(tmp_path / "cut", wide())
    fit(tmp_path / "cut", wide(), resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


@pytest.mark.parametrize("call", [3, 5, 7])  # before the last phase, at its start, within it
def test_resume_with_a_last_phase_is_bitwise(call, tmp_path):
    phases = dict(frozen_share=0.5, eval_every=2, warp=1.0)
    fit(tmp_path / "unbroken", with_context(), **phases)
    with interruption("trainer.training_step", call):
        fit(tmp_path / "cut", with_context(), **phases)
    fit(tmp_path / "cut", with_context(), resume=True, **phases)
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


@pytest.mark.parametrize("steps", [8, 14])
def test_a_last_phase_that_moves_begins_with_the_averages(steps, tmp_path):
    """Resumed with other steps, a run may be within the last phase at once, or no longer in it."""
    fit(tmp_path, with_context(), steps=10, frozen_share=0.3, eval_every=7, keep=True)
    state = read_tensors(tmp_path / "state.pt")[1]
    assert state["is_frozen"] and state["step"] == 10
    shutil.rmtree(tmp_path)
    with interruption("trainer.training_step", 7):
        fit(tmp_path, with_context(), steps=10, frozen_share=0.3)
    average = read_tensors(tmp_path / "state.pt")[0]
    fit(tmp_path, with_context(), steps=steps, frozen_share=0.5, eval_every=steps, resume=True)
    last = read_tensors(tmp_path / "state.pt")[0]
    names = [name for name in last if name.startswith("average.module.levels.")]
    kept = [torch.equal(last[name], average[name]) for name in names]
    assert all(kept) if steps == 8 else not any(kept)


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
    fit(tmp_path / "unbroken", val_dataset=val_set)
    reads = 1 + 40 + 6 * 8  # to check the data, to set the output level, and for six steps
    with pytest.raises(OSError, match="the disk is gone"):
        fit(tmp_path / "cut", dataset=Unplugged(reads), val_dataset=val_set)
    assert [row["step"] for row in read_csv(tmp_path / "cut" / "metrics.csv")] == [2, 4]
    assert read_tensors(tmp_path / "cut" / "state.pt")[1]["step"] == 6  # saved on the way out
    fit(tmp_path / "cut", val_dataset=val_set, resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


def test_resume_without_the_closed_levels_of_before(tmp_path):
    """Steps since the last row of the history have other terms than those that follow."""
    settings = dict(log_every=4, eval_every=8, steps=8)
    with signal_in_step(2, signal.SIGTERM), pytest.raises(SystemExit):
        fit(tmp_path, **settings, closed_share=0.5)
    _, history = fit(tmp_path, **settings, closed_share=0.0, resume=True)
    assert [row["step"] for row in history] == [4, 8]
    assert "reconstruction_closed" in history[0] and "reconstruction_closed" not in history[1]


def test_resume_remembers_the_checkpoint_it_began_with(tmp_path):
    """Also when the run is cut before its first evaluation."""
    began_with = {"steps": 7, "began_with": {"steps": 3}}
    models = [tiny(), tiny()]
    for model in models:
        model.provenance = began_with
    with signal_in_step(1, signal.SIGTERM), pytest.raises(SystemExit):
        fit(tmp_path, models[0])
    resumed, _ = fit(tmp_path, models[1], resume=True)
    assert resumed.provenance["steps"] == 15
    assert resumed.provenance["began_with"] == began_with


def test_resume_with_workers_and_text(tmp_path):
    model = lambda: tiny(text_length=1, inference="bottom-up")
    fit(tmp_path / "unbroken", model(), workers=1)
    with interruption("trainer.training_step", 6):
        fit(tmp_path / "cut", model(), workers=1)
    fit(tmp_path / "cut", model(), workers=0, resume=True)
    assert_same_run(tmp_path / "unbroken", tmp_path / "cut")


def test_resume_ignores_the_weights_given(uninterrupted, tmp_path):
    with interruption("trainer.training_step", 6):
        fit(tmp_path)
    other = tiny()
    nn.init.ones_(other.to_image.weight)
    torch.randn(5)
    fit(tmp_path, other, resume=True)
    assert_same_run(uninterrupted, tmp_path)


def test_resuming_a_finished_run_changes_nothing(tmp_path):
    model, history = fit(tmp_path, steps=4)
    before = content(tmp_path)
    again, rows = fit(tmp_path, steps=4, resume=True)
    assert same(model.state_dict(), again.state_dict()) and not again.training
    assert [row["step"] for row in rows] == [row["step"] for row in history]
    assert content(tmp_path) == before
    assert again.provenance == model.provenance


def test_resume_can_extend_a_run(tmp_path):
    fit(tmp_path, steps=4)
    changes = "steps = 8 instead of 4, beta_steps = 5 instead of 2"
    with pytest.warns(UserWarning, match=f"resuming with {changes}$"):
        _, history = fit(tmp_path, steps=8, resume=True)
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert HVAE.load(tmp_path / "hvae.pt").provenance["steps"] == 8


def test_resuming_with_other_data_is_told(tmp_path):
    def resume(folder):
        return fit(tmp_path / "out", model, CaptchaFolder(folder), batch_size=4, resume=True)

    first, other = (image_folder(tmp_path / str(n), ["AB"] * n) for n in (12, 16))
    model = trainer.model_for(CaptchaFolder(first), **TINY, **WITHOUT_WINDOWS, text_length=None)
    with signal_in_step(2, signal.SIGINT), pytest.raises(KeyboardInterrupt):
        resume(first)
    moved = first.rename(tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resume(moved)
    with pytest.warns(UserWarning, match="other data"):
        resume(other)


def test_resume_of_a_state_with_other_layers(tmp_path):
    """As an earlier version of this code may have written."""
    out = tmp_path / "run"
    fit(out, steps=2)
    tensors, metadata = read_tensors(out / "state.pt")
    tensors.pop("model.to_image.bias")
    write_tensors(out / "state.pt", tensors, metadata)
    with pytest.raises(ValueError, match="state.pt: another version"):
        fit(out, steps=4, resume=True)


def test_resume_tells_what_is_different(tmp_path):
    fit(tmp_path, steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(tmp_path, steps=4, resume=True)
    changes = r"lr = 0.001 instead of 0.002, free_nats = \[2.0, 3.0\] instead of \[1.0, 1.0\]$"
    with pytest.warns(UserWarning, match=changes):
        fit(tmp_path, steps=4, resume=True, lr=1e-3, free_nats=[2, 3])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "resume"),
        ({"resume": True, "steps": 3}, "holds 4 steps, more than steps=3"),
        ({"resume": True, "model": tiny(latent_channels=3)}, "latent_channels"),
    ],
)
def test_run_is_not_overwritten(arguments, message, tmp_path):
    fit(tmp_path, steps=4)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, **{"steps": 4, **arguments})
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    "resume, message", [(False, "choose another"), (True, "no run that could be resumed")]
)
def test_model_without_a_run_is_not_overwritten(resume, message, tmp_path):
    tiny().save(tmp_path / "hvae.pt")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, steps=2, resume=resume)
    assert content(tmp_path) == before


def test_out_is_a_file(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(ValueError, match="out is not a folder"):
        fit(tmp_path / "out")


def test_numbers_of_numpy_do_not_spoil_the_files(tmp_path):
    numbers = dict(lr=np.float64(1e-3), beta_start=np.float32(2), ema=np.float64(0.9))
    fit(tmp_path, steps=4, binarise=np.bool_(True), **numbers)
    assert HVAE.load(tmp_path / "hvae.pt").provenance["binarised"] is True
    assert len(fit(tmp_path, steps=6, resume=True)[1]) == 3


def test_description_that_no_file_can_keep(tmp_path):
    dataset = bars()
    dataset.description = {"folder": tmp_path}  # a Path
    with pytest.raises(ValueError, match="description"):
        fit(tmp_path / "out", dataset=dataset)


def test_ruined_weights_are_not_saved(tmp_path):
    fit(tmp_path, steps=4)
    before = content(tmp_path)
    with pytest.raises(FloatingPointError, match="step 8: the held-out ELBO"):
        fit(tmp_path, steps=40, lr=1e30, warmup=1, resume=True)
    assert content(tmp_path) == before


@pytest.mark.parametrize("damaged", [b"", b"hello", bytes(1000), "half", [1, 2], {"config": {}}])
def test_something_else_as_the_only_state(damaged, tmp_path):
    path = tmp_path / "state.pt"
    if damaged == "half":
        fit(tmp_path, steps=1)
        damaged = path.read_bytes()[: path.stat().st_size // 2]
    if isinstance(damaged, bytes):
        path.write_bytes(damaged)
    else:
        torch.save(damaged, path)
    with pytest.raises(ValueError, match="state.pt"):
        fit(tmp_path, steps=2, resume=True)


# ---------------------------------------------------------------------------- loss


def loss_and_means(model, x, y=None, beta=1.0, free_nats=0.0, closed=(0,) * 8):
    """objective() and batch_means(), of the same draws at every call."""
    torch.manual_seed(1)
    closed = torch.as_tensor(closed)
    terms = model(x, y, closed)
    loss = objective(terms, beta, torch.as_tensor(free_nats), closed)
    return loss, batch_means(terms, closed)


def loss_by_hand(model, x, y, beta, free_nats, closed):
    """(loss, neg_elbo) of the same draws, image by image, from torch.distributions."""
    torch.manual_seed(1)
    p_x, levels = model.infer(x, y, closed)
    reconstruction = -p_x.log_prob(x)
    normal = lambda n: torch.distributions.Normal(n.mu, (0.5 * n.logvar).exp())
    loss, neg_elbo = reconstruction.mean(), reconstruction[closed == 0].mean()
    for l, (q, p, z, *_) in enumerate(levels):
        if model.top_down or l + 1 == len(model.levels):
            kl = torch.distributions.kl_divergence(normal(q), normal(p))
        else:
            kl = -normal(p).log_prob(z) - normal(q).entropy()
        kl = kl.flatten(1).sum(1)
        rows = [kl[i] for i in range(len(x)) if closed[i] <= l]  # in which the level is open
        mean = sum(rows) / len(rows)
        counted = max(mean, torch.tensor(free_nats)) if free_nats else mean
        loss = loss + beta * len(rows) / len(x) * counted
        neg_elbo = neg_elbo + mean
    return loss, neg_elbo


@pytest.mark.parametrize("beta, free_nats", [(1.0, 0.0), (7.0, 0.0), (1.0, 1e4), (3.0, None)])
@pytest.mark.parametrize(
    "inference, closed",
    [
        ("top-down", [0, 0, 0, 0]),
        ("top-down", [1, 0, 1, 0]),
        ("top-down", [2, 1, 1, 0]),
        ("bottom-up", [0, 0, 0, 0]),
    ],
)
def test_loss_by_hand(inference, closed, beta, free_nats):
    blocks = [[("res", 4)], [("conv", 4, 2)]]
    model = tiny(inference=inference, inner_config=blocks, text_length=1).eval()
    x, y = bars(4).tensors
    closed = torch.tensor(closed)
    if free_nats is None:  # a floor above the KL of some levels and below that of others
        _, means = loss_and_means(model, x, y, beta, 0.0, closed)
        free_nats = sum(sorted(means[f"kl_{l}"] for l in (1, 2, 3))[:2]) / 2
    loss, means = loss_and_means(model, x, y, beta, free_nats, closed)
    expected, neg_elbo = loss_by_hand(model, x, y, beta, free_nats, closed)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert means["neg_elbo"] == pytest.approx(neg_elbo.item(), rel=1e-5)
    total = means["reconstruction"] + sum(means[f"kl_{l}"] for l in (1, 2, 3))
    assert means["neg_elbo"] == pytest.approx(total, rel=1e-5)
    assert ("reconstruction_closed" in means) == bool(closed.any())


@pytest.mark.parametrize("shift", [0, 100])
@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_open_loss_is_the_negative_elbo(inference, shift, monkeypatch):
    """Also where -H(q) - log p(z_1|z_2) of a chain is negative, which it can be."""
    model, x = tiny(inference=inference).eval(), bar_batch()
    kl = model.kl_term
    monkeypatch.setattr(model, "kl_term", lambda *arguments: kl(*arguments) - shift)
    loss, means = loss_and_means(model, x)
    torch.manual_seed(1)
    assert loss.item() == pytest.approx(-model(x).elbo.mean().item(), rel=1e-5)
    assert means["neg_elbo"] == pytest.approx(loss.item(), rel=1e-5)
    assert (means["kl_1"] < 0) == bool(shift)
    loss.backward()
    assert model.levels[0].q.out.weight.grad.abs().sum() > 0


def test_free_nats_have_no_gradient():
    """Below the floor a level's KL, whatever its weight, does not move its posterior."""

    def posterior_gradients(beta, free_nats):
        model = tiny().eval()
        loss, means = loss_and_means(model, bar_batch(), None, beta, free_nats)
        loss.backward()
        levels = [list(level.q.parameters()) for level in model.levels]
        return [torch.cat([p.grad.flatten() for p in q]) for q in levels], means

    _, means = posterior_gradients(1.0, 0.0)
    kl = [means["kl_1"], means["kl_2"]]
    assert min(kl) > 0
    for free_nats, unchanged in [(2 * max(kl), [True, True]), (0.0, [False, False])]:
        one, ten = (posterior_gradients(beta, free_nats)[0] for beta in (1.0, 10.0))
        assert [torch.equal(a, b) for a, b in zip(one, ten, strict=True)] == unchanged


# ---------------------------------------------------------------------------- closed levels


@pytest.mark.parametrize("levels, closed", [(1, 0), (2, 1), (3, 2), (5, 3), (6, 3)])
def test_closed_levels_by_default(levels, closed):
    hp = Hyperparameters()
    captcha = dict(input_size=(60, 160), input_channels=3)
    hp.fit_to(tiny(inner_config=[[("res", 4)]] * (levels - 1), **captcha))
    assert hp.closed_levels == closed
    assert hp.free_nats == [40.0] * (levels - 1) + [80.0]


@pytest.mark.parametrize("c, h, w, share", [(3, 60, 160, 1), (3, 90, 200, 1), (1, 40, 120, 1 / 6)])
def test_free_nats_by_default_are_fewer_for_small_images(c, h, w, share):
    hp = Hyperparameters()
    hp.fit_to(tiny(input_channels=c, input_size=(h, w), inner_config=[[("res", 4)]] * 2))
    assert hp.free_nats == pytest.approx([40 * share, 40 * share, 80 * share])


@pytest.mark.parametrize("c, images, nats", [(3, 4_999, 7), (3, 5_000, 40), (1, 500, 40 / 6)])
def test_free_nats_by_default_are_fewer_for_few_images(c, images, nats):
    hp = Hyperparameters()
    size = (60, 160) if c == 3 else (40, 120)
    hp.fit_to(tiny(input_channels=c, input_size=size, likelihood="logistic"), images)
    assert hp.free_nats == pytest.approx([nats, 2 * nats])


def test_closed_level_takes_the_priors_mean():
    model, x, closed = tiny().eval(), bar_batch(4), torch.tensor([0, 1, 2, 0])
    _, levels = model.infer(x, None, closed)
    for l, (q, p, z, *_) in enumerate(levels):
        of = closed > l
        assert torch.equal(z[of], p.mu[of]) and torch.equal(q.mu[of], p.mu[of])
        assert not torch.isclose(z[~of], p.mu[~of]).all()
    no_kl = model(x, None, closed).kl == 0
    assert no_kl.tolist() == [[False, False], [True, False], [True, True], [False, False]]


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
            gradients = [p.grad for p in level.q.parameters() if p.grad is not None]
            assert any(bool(gradient.any()) for gradient in gradients) == (l >= closed)


def test_fully_closed_images_do_not_see_x():
    model, x = tiny().eval(), bar_batch(4)
    p_x, p_other = (model.infer(image, None, torch.full((4,), 2))[0] for image in (x, 1 - x))
    assert torch.equal(p_x.parameters, p_other.parameters)


@pytest.mark.parametrize(
    "model, arguments, closes",
    [
        ({}, {"closed_share": 0.5}, True),
        ({}, {"closed_share": 0.5, "closed_levels": 0}, False),
        ({}, {}, False),  # a short run
        ({"inference": "bottom-up"}, {"closed_share": 0.5}, False),
        ({"inner_config": []}, {"closed_share": 0.5}, False),
    ],
)
def test_train_closes_levels(model, arguments, closes, tmp_path):
    _, history = fit(tmp_path, tiny(**model), steps=1, **arguments)
    assert ("reconstruction_closed" in history[0]) == closes


@pytest.mark.parametrize(
    "levels, share, top_share, closed",
    [
        (3, 0.5, 0.5, [4, 4, 3, 3, 0, 0, 0, 0]),
        (3, 0.5, 0.0, [3, 3, 3, 3, 0, 0, 0, 0]),
        (3, 0.25, 1.0, [4, 4, 0, 0, 0, 0, 0, 0]),
        (0, 0.5, 0.5, [0] * 8),
    ],
)
def test_closed_levels_of_a_batch(levels, share, top_share, closed):
    """In a third of the steps half of a batch has closed levels, half of that all but the top."""
    shares = dict(closed_share=share, top_share=top_share)
    hp = Hyperparameters(steps=9, batch_size=8, closed_levels=levels, **shares)
    assert hp.closed_at(2, 5).tolist() == closed
    assert hp.closed_at(3, 5).tolist() == [0] * 8


@pytest.mark.parametrize(
    "steps, expected",
    [(300, (150, 1.0, 180, 0.0, [0, 0])), (10_000, (200, 5.0, 6_000, 0.5, [40, 80]))],
)
def test_schedules_follow_the_number_of_steps(steps, expected):
    hp = Hyperparameters(steps=steps)
    hp.fit_to(tiny(input_size=(60, 160), input_channels=3))
    assert (hp.warmup, hp.beta_start, hp.beta_steps, hp.closed_share, hp.free_nats) == expected
    assert Hyperparameters(steps=steps, warmup=7, closed_share=0.25).closed_share == 0.25


def test_few_images_are_augmented():
    model = HVAE(input_size=(40, 120), input_channels=1)
    for images, expected in ((4_999, (2, 3.0, 0.05)), (5_000, (0, 0.0, 0.005))):
        hp = Hyperparameters()
        hp.fit_to(model, images)
        assert (hp.shift, hp.warp, hp.window_noise) == pytest.approx(expected)
    hp = Hyperparameters(shift=0, warp=1.5, window_noise=0)
    hp.fit_to(model, 10)
    assert (hp.shift, hp.warp, hp.window_noise) == (0, 1.5, 0)
    hp = Hyperparameters()
    hp.fit_to(HVAE(**CONFIGS["mnist-hvae"]), 10)
    assert (hp.shift, hp.warp) == (0, 0)


def test_a_batch_makes_four_updates_at_the_start_and_in_the_last_phase(tmp_path, monkeypatch):
    """Of the images whose lower levels are closed, each update has as many."""
    sizes, original = [], trainer.update
    record = lambda run, x, y, closed: (
        sizes.append((len(x), int((closed > 0).sum()))) or original(run, x, y, closed)
    )
    monkeypatch.setattr(trainer, "update", record)
    options = dict(batch_size=8, frozen_share=0.5, closed_share=0.5)
    model = tiny(likelihood="logistic", context=(1, 1))
    _, history = fit(tmp_path, model, steps=17, **options)
    assert sizes == [(2, 1)] * 8 + [(8, 4)] + [(8, 0)] * 6 + [(2, 0)] * 32
    assert history[-1]["step"] == 17 and history[-1]["images"] == 136


def test_means_of_a_batch_with_fewer_closed_images_than_updates(tmp_path, monkeypatch):
    """Each image counts once, in whichever update it is."""
    means, joined = [], trainer.joined
    monkeypatch.setattr(trainer, "joined", lambda parts: means.append(joined(parts)) or means[-1])
    options = dict(batch_size=8, frozen_share=0.5, closed_share=0.25, log_every=1, eval_every=99)
    model = tiny(likelihood="logistic", context=(1, 1))
    _, history = fit(tmp_path, model, steps=2, **options)
    assert means[0].reconstruction.shape == (8,)
    closed = history[0]["reconstruction_closed"]
    assert 2 * closed + 6 * history[0]["reconstruction"] == pytest.approx(
        means[0].reconstruction.sum().item(), rel=1e-4
    )


def test_a_run_without_a_last_phase_makes_one_update_of_each_batch():
    hp = Hyperparameters(steps=160)
    hp.fit_to(HVAE())
    assert [hp.updates_at(step) for step in range(160)] == [1] * 160


def test_levels_are_closed_in_the_first_third(tmp_path, monkeypatch):
    seen, original = [], trainer.objective
    record = lambda *args: seen.append(args[3].tolist()) or original(*args)
    monkeypatch.setattr(trainer, "objective", record)
    fit(tmp_path, tiny(inner_config=[[("res", 4)]] * 3), steps=6, batch_size=4, closed_share=0.5)
    assert seen == [[3, 2, 0, 0]] * 2 + [[0, 0, 0, 0]] * 4


@pytest.mark.parametrize(
    "inference, closed_levels", [("bottom-up", 1), ("top-down", 2), ("top-down", -1)]
)
def test_impossible_closed_levels(inference, closed_levels, tmp_path):
    with pytest.raises(ValueError, match="closed_levels"):
        fit(tmp_path, tiny(inference=inference), closed_levels=closed_levels)


@pytest.mark.parametrize("channels", [2, 5])
def test_images_of_other_channels_than_pictures_have(channels, tmp_path):
    """Pictures show the first, or the first three."""
    data = TensorDataset(torch.rand(40, channels, 8, 8), torch.zeros(40, 0))
    model = HVAE([("conv", 4, 2)], [], (8, 8), channels, text_length=None, latent_channels=1)
    fit(tmp_path, model, data)
    save_figures(model, tmp_path, data)
    with Image.open(tmp_path / "samples.png") as sheet:
        assert sheet.mode == "RGB"


def test_images_that_are_not_tensors(tmp_path):
    data = [(torch.zeros(1, 8, 12).numpy(), torch.zeros(0))] * 20
    with pytest.raises(ValueError, match="ndarray, not tensors"):
        fit(tmp_path, tiny(), data)


def test_images_that_are_pictures_and_no_model(tmp_path):
    data = [(Image.new("RGB", (8, 8)), torch.zeros(0))] * 20
    with pytest.raises(ValueError, match="Image, not tensors"):
        fit(tmp_path, None, data)


def test_fonts_have_no_effect_on_the_images_of_a_folder(tmp_path):
    data = CaptchaFolder(image_folder(tmp_path / "images", ["A"] * 20))
    model = trainer.model_for(data, **TINY, **WITHOUT_WINDOWS)
    model.provenance["data"] = data.description
    with pytest.raises(ValueError, match="fonts: .* no effect on the images of a folder"):
        held_out_images(model, fonts=["DroidSansMono.ttf"])


def test_a_subset_of_a_folder_is_known_as_one(tmp_path):
    data = CaptchaFolder(image_folder(tmp_path / "images", ["A"] * 20))
    torch.manual_seed(0)
    model = trainer.model_for(Subset(data, range(16)), **TINY, **WITHOUT_WINDOWS)
    model, _ = fit(tmp_path / "run", model, Subset(data, range(16)))
    assert model.provenance["data"] == {**data.description, "subset": 16}
    with pytest.warns(UserWarning, match="may have seen"):
        held_out_images(model)
    with pytest.warns(UserWarning, match="may have seen"):
        held_out_images(model, folder=tmp_path / "images")


def test_a_subset_has_the_texts_of_its_data():
    data = CaptchaDataset(20, image_size=(16, 40), text_length=2, charset="AB")
    model = trainer.model_for(Subset(Subset(data, range(15)), range(10)))
    assert (model.text_length, model.charset) == (2, "AB")


def test_validation_data_are_not_trained_on(tmp_path):
    data = CaptchaDataset(8, "val", image_size=(16, 40))
    with pytest.raises(ValueError, match="'val'"):
        train(trainer.model_for(data), data, out=tmp_path)


# ---------------------------------------------------------------------------- fitting priors


def test_fit_prior_changes_only_the_flow_and_lowers_the_top_kl():
    model = tiny(**VECTOR_TOP, flow=3)
    nn.init.normal_(model.levels[-1].q.out.bias[:4], std=2.0)  # q(z_2) far from N(0, I)
    before, kl = copy.deepcopy(model.state_dict()), evaluate(model, bars(seed=1))["kl"]
    fitted = fit_prior(model, bars(), steps=200, batch_size=32, lr=5e-3, workers=0)
    assert fitted is model and not model.training
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, before[name])]
    assert changed and all(name.startswith("levels.1.flow.couplings") for name in changed)
    after = evaluate(model, bars(seed=1))["kl"]
    assert after[1] < kl[1] - 1 and after[0] == pytest.approx(kl[0], rel=0.05)
    assert model.provenance["prior_fit"] == {"images": 40, "steps": 200, "batch_size": 32}


@pytest.mark.parametrize("binarise", [False, True])
def test_fit_prior_encodes_images_as_they_were_in_training(binarise):
    model, seen = tiny(**VECTOR_TOP, flow=1), []
    model.infer, infer = lambda x, *rest: seen.append(x) or infer(x, *rest), model.infer
    model.provenance["binarised"] = binarise
    fit_prior(model, bars(), steps=1, batch_size=4, workers=0)
    assert bool(((seen[0] == 0) | (seen[0] == 1)).all()) is binarise


def test_fit_prior_fits_the_map_below_a_vector_too():
    data = CaptchaDataset(40, image_size=(16, 40), text_length=2, charset="AB")
    inner = [[("conv", 8, 2)], [("dense", 8)]]
    model = trainer.model_for(data, outer_config=[("conv", 8, 4)], inner_config=inner)
    nn.init.normal_(model.levels[1].q.out.bias[:8], std=2.0)
    before, kl = copy.deepcopy(model.state_dict()), evaluate(model, data)["kl"]
    fit_prior(model, data, steps=40, batch_size=8, lr=5e-3, workers=0)
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, before[name])]
    parts = ("levels.2.flow", "levels.1.window", "levels.1.prior_features")
    assert {part for name in changed for part in parts if name.startswith(part)} == set(parts)
    assert all(name.startswith(parts) for name in changed)
    assert evaluate(model, data)["kl"][1] < kl[1] - 1


def test_no_prior_to_fit():
    """A chain's z_2 was drawn from its z_1, so other draws of z_1 would not go with it."""
    chain = tiny(**VECTOR_TOP, inference="bottom-up", prior_context=(1, 1))
    assert chain.levels[0].prior_features is not None
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_prior(chain, bars())
    with pytest.raises(ValueError, match="nothing to fit"):
        fit_prior(tiny(**VECTOR_TOP, flow=0), bars())


def long_run(out, monkeypatch, **arguments):
    """A run that ends by fitting the flow of its z_2 in as many updates as it had steps."""
    monkeypatch.setattr(trainer, "STEPS_PER_PRIOR_UPDATE", 1)
    model = with_context(**VECTOR_TOP, flow=2)
    nn.init.normal_(model.levels[1].q.out.bias[:4], std=2.0)
    options = dict(steps=24, frozen_share=0.25, eval_every=24, keep=True)
    return fit(out, model, bars(6000), **{**options, **arguments})


def test_a_long_run_fits_the_upper_priors_in_the_end(tmp_path, monkeypatch):
    model, history = long_run(tmp_path, monkeypatch)
    assert model.provenance["prior_fit"] == {"images": 240, "steps": 24, "batch_size": 128}
    assert -model.provenance["held_out"]["elbo"] < history[-1]["val_neg_elbo"] - 0.1
    before = HVAE.load(tmp_path / "hvae-000024.pt").state_dict()
    changed = [name for name, w in model.state_dict().items() if not torch.equal(w, before[name])]
    assert changed and all(name.startswith("levels.1.flow") for name in changed)
    written = (tmp_path / "hvae.pt").read_bytes()
    long_run(tmp_path, monkeypatch, resume=True)
    assert (tmp_path / "hvae.pt").read_bytes() == written


@pytest.mark.parametrize("broken", [1, 40])
def test_fit_prior_leaves_out_broken_images(broken):
    images, labels = bars().tensors
    images = images.clone()
    images[:broken] = math.nan
    model = tiny(**VECTOR_TOP, flow=1)
    fit_it = lambda: fit_prior(model, TensorDataset(images, labels), steps=2, workers=0)
    if broken == 40:
        with pytest.raises(FloatingPointError, match="any of the images"):
            fit_it()
    else:
        assert all(w.isfinite().all() for w in fit_it().state_dict().values())


def test_interrupted_while_it_fits_the_upper_priors(tmp_path, monkeypatch):
    expected, _ = long_run(tmp_path / "whole", monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "fit_prior", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        long_run(tmp_path / "parts", monkeypatch)
    resumed, _ = long_run(tmp_path / "parts", monkeypatch, resume=True)
    assert same(resumed.state_dict(), expected.state_dict())


def test_upper_priors_that_got_worse_are_not_kept(tmp_path, monkeypatch):
    spoil = lambda model, *_, **__: model.levels[1].flow.couplings[0].net[-1].bias.data.fill_(9)
    monkeypatch.setattr(trainer, "fit_prior", spoil)
    model, _ = long_run(tmp_path, monkeypatch)
    kept = HVAE.load(tmp_path / "hvae-000024.pt").state_dict()
    assert all(map(torch.equal, model.state_dict().values(), kept.values()))


@pytest.mark.parametrize("changes", [{"frozen_share": 0}, {"model": with_context}])
def test_runs_that_have_no_priors_to_fit(changes, tmp_path, monkeypatch):
    """Without a last phase q moves to the end; this model has neither a flow nor such a map."""
    monkeypatch.setattr(trainer, "fit_prior", lambda *_, **__: pytest.fail("nothing to fit"))
    if "model" in changes:
        monkeypatch.setattr(trainer, "STEPS_PER_PRIOR_UPDATE", 1)
        fit(tmp_path, with_context(), bars(6000), steps=4, frozen_share=0.5)
    else:
        long_run(tmp_path, monkeypatch, **changes)


# ---------------------------------------------------------------------------- optimisation


def step_with_gradient(clip, module, value):
    module.weight.grad = torch.full_like(module.weight, value)
    return clip(module)


@pytest.fixture
def clipping():
    return GradientClipper(1000.0), nn.Linear(4, 4, bias=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_clipper_skips_gradients_that_are_not_finite(value, clipping):
    clip, _ = clipping
    assert not step_with_gradient(*clipping, value)  # even the very first
    assert step_with_gradient(*clipping, 1.0)
    mean = clip.mean
    assert not step_with_gradient(*clipping, value)
    assert clip.skipped == 2 and clip.mean == mean == 4.0
    assert step_with_gradient(*clipping, 1.0)


def test_clipper_clips_to_the_running_mean(clipping):
    clip, module = clipping
    assert step_with_gradient(*clipping, 1.0) and clip.last == 4.0
    assert torch.equal(module.weight.grad, torch.ones(4, 4))  # the first norm is the mean
    assert step_with_gradient(*clipping, 10.0) and clip.last == 40.0
    assert module.weight.grad.norm().item() == pytest.approx(4.0, rel=1e-4)
    assert clip.mean == pytest.approx(0.98 * 4 + 0.02 * 8)  # a spike counts as twice the mean
    assert step_with_gradient(*clipping, 0.5)
    assert torch.equal(module.weight.grad, torch.full((4, 4), 0.5))


def test_clipper_bounds_the_first_gradients(clipping):
    clip, module = clipping
    for value in (1e9, 1e6):
        assert step_with_gradient(clip, module, value)
        assert module.weight.grad.norm().item() == pytest.approx(1000, rel=1e-4)
        assert clip.mean == 1000
    assert step_with_gradient(clip, module, 1.0) and clip.mean < 1000


def test_clipper_skips_spikes_once_it_knows_the_norm(clipping):
    assert all(step_with_gradient(*clipping, 1.0) for _ in range(301))
    assert not step_with_gradient(*clipping, 21.0)
    assert step_with_gradient(*clipping, 19.0)
    assert clipping[0].skipped == 1


def test_clipper_takes_norms_that_stay_high(clipping):
    assert all(step_with_gradient(*clipping, 1.0) for _ in range(301))
    taken = [step_with_gradient(*clipping, 100.0) for _ in range(200)]
    assert not any(taken[:50]) and all(taken[100:])


def test_the_clipper_survives_a_gradient_of_zero(clipping):
    for value in (0.0, 3.0):
        assert step_with_gradient(*clipping, value)
    assert clipping[1].weight.grad.abs().min() > 0


@pytest.mark.parametrize("binarise", [False, True])
def test_broken_images_cost_only_their_steps(binarise, tmp_path):
    """Also where they are among the first, which set the output's level."""
    x, y = bars().tensors
    x[5, 0, 2, 3] = math.nan
    settings = dict(val_dataset=bars(4, seed=1), steps=5, binarise=binarise)
    averaged, history = fit(tmp_path, dataset=TensorDataset(x, y), **settings)
    assert history[-1]["skipped"] == 1  # five batches of eight are the forty images
    assert all(value.isfinite().all() for value in averaged.state_dict().values())


def test_training_survives_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    kept, model, original = [], tiny(), trainer.objective

    def nan_at_third_step(*args):
        kept.append(copy.deepcopy(dict(model.named_parameters())))
        return original(*args) * (math.nan if len(kept) == 3 else 1)

    monkeypatch.setattr(trainer, "objective", nan_at_third_step)
    averaged, history = fit(tmp_path, model, steps=6)
    assert [row["skipped"] for row in history] == [0, 1, 1]
    assert same(kept[2], kept[3]) and not same(kept[1], kept[2])
    assert all(p.isfinite().all() for p in [*averaged.parameters(), *model.parameters()])


@pytest.mark.parametrize(
    "decay, updates, expected",
    [(0.75, 1000, 0.75), (0.999, 1, 2 / 12), (0.999, 9, 10 / 20), (0.0, 1000, 0.0)],
)
def test_moving_average(decay, updates, expected):
    """Of the parameters, with a smaller decay at first; buffers are those of the model."""
    average, model = AveragedModel(tiny(), multi_avg_fn=ema_with_warmup(decay)), tiny()
    average.n_averaged.fill_(updates)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    for buffer in model.buffers():
        buffer.fill_(7)
    before = copy.deepcopy(average.module)
    average.update_parameters(model)
    parameters = (module.parameters() for module in (average.module, before, model))
    for mine, old, theirs in zip(*parameters, strict=True):
        torch.testing.assert_close(mine, expected * old + (1 - expected) * theirs)
    assert all((buffer == 7).all() for buffer in average.module.buffers())


def test_without_ema_the_average_is_the_model(tmp_path):
    model = tiny()
    averaged, _ = fit(tmp_path, model, steps=4, ema=0.0)
    assert averaged is not model
    for mine, theirs in zip(averaged.parameters(), model.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)


# ---------------------------------------------------------------------------- data


def test_batches_hold_every_index_once_an_epoch():
    drawn = list(batches(12, 4, seed=0, start=0, steps=9))
    epochs = [sum(drawn[i : i + 3], []) for i in (0, 3, 6)]
    assert len(drawn) == 9 and all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_leave_an_epochs_rest_out():
    first = sum(batches(14, 4, seed=0, start=0, steps=3), [])
    assert len(first) == len(set(first)) == 12
    assert set(sum(batches(14, 4, seed=0, start=0, steps=60), [])) == set(range(14))


def test_batches_resume_the_sequence():
    drawn = list(batches(14, 4, seed=3, start=0, steps=10))
    for start in range(11):
        assert list(batches(14, 4, seed=3, start=start, steps=10)) == drawn[start:]


def test_batches_of_seeds_differ():
    assert len({str(list(batches(12, 4, seed, 0, 3))) for seed in (0, 1, 2, 3)}) == 4


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
    train_set, val_set = hold_out(data, 0, limit=5)
    assert train_set is data and val_set.split == "val" and len(val_set) == 5
    assert (val_set.image_size, val_set.text_length, val_set.charset) == ((16, 32), 2, "AB")
    assert not torch.equal(data[0][0], val_set[0][0])


def test_a_folder_keeps_its_test_images_though_a_validation_set_is_given(tmp_path):
    data = CaptchaFolder(image_folder(tmp_path / "f", ["AB"] * 30), text_length=2, charset="AB")
    other = captchas()
    train_set, val_set = hold_out(data, 0, other)
    assert val_set is other
    assert set(train_set.order) == set(data.order) - set(data.indices("test")) - set(
        data.indices("val")
    )
    plain = bars()
    assert hold_out(plain, 0, other) == (plain, other)


# ---------------------------------------------------------------------------- evaluate


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
    model = tiny(inference=inference, text_length=text_length).eval()
    results = recorded(model)
    metrics = evaluate(model, bars(10), batch_size=4)
    assert [len(result.elbo) for result in results] == [4, 4, 2]
    mean = lambda name: torch.cat([getattr(r, name) for r in results]).mean(0).tolist()
    for name in ("elbo", "reconstruction", "kl"):
        assert metrics[name] == pytest.approx(mean(name), rel=1e-5)
    assert metrics["log_likelihood"] == pytest.approx(mean("log_weight"), rel=1e-5)
    total = metrics["reconstruction"] + sum(metrics["kl"])
    assert metrics["elbo"] == pytest.approx(-total, rel=1e-5)
    assert (metrics["images"], metrics["importance_samples"]) == (10, 1)


def test_evaluate_sees_the_images_and_texts():
    """By the KL of z_2, which no other draw changes in a top-down model."""
    model, data = tiny(text_length=1).eval(), bars(10)
    kl = model(*data[:]).kl[:, 1].mean().item()
    assert evaluate(model, data, batch_size=4)["kl"][1] == pytest.approx(kl, rel=1e-5)


@pytest.mark.parametrize("batch_size, calls", [(15, 1), (6, 3), (2, 10)])
def test_importance_weighted_bound_by_hand(batch_size, calls):
    """The draws of an image may come in more than one call."""
    model = tiny().eval()
    results = recorded(model)
    metrics = evaluate(model, bars(5), 3, batch_size=batch_size)
    weights = torch.cat([r.log_weight for r in results]).double().exp().view(5, 3)
    assert len(results) == calls
    by_hand = weights.mean(1).log().mean().item()
    assert metrics["log_likelihood"] == pytest.approx(by_hand, rel=1e-5)
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


@pytest.mark.parametrize("samples, bound", [(1, "elbo"), (2, "log_likelihood")])
@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli", "logistic"])
def test_bits_per_dim(likelihood, samples, bound):
    metrics = evaluate(tiny(likelihood=likelihood), bars(6), importance_samples=samples)
    bits = -metrics[bound] / (8 * 12 * math.log(2))
    expected = pytest.approx(bits) if likelihood == "logistic" else None
    assert metrics["bits_per_dim"] == expected


@pytest.mark.parametrize("inference", ["top-down", "bottom-up"])
def test_bound_rises_with_importance_samples(inference, tmp_path):
    model, _ = fit(tmp_path, tiny(inference=inference), steps=10, lr=1e-2, eval_every=10)
    one, fifty = evaluate(model, bars(40), 1), evaluate(model, bars(40), 50)
    assert fifty["log_likelihood"] > one["log_likelihood"] + 0.1
    assert fifty["log_likelihood"] > fifty["elbo"] and fifty["importance_samples"] == 50
    assert fifty["elbo"] == pytest.approx(one["elbo"], abs=1)  # has one mean for any draws


@pytest.mark.parametrize(
    "n, samples, message",
    [(0, 1, "empty"), *[(4, bad, "importance_samples") for bad in (0, -1, 1.5, None)]],
)
def test_evaluate_rejects(n, samples, message):
    with pytest.raises(ValueError, match=message):
        evaluate(tiny(), Subset(bars(), range(n)), samples)


# ---------------------------------------------------------------------------- history


def rows(held_out):
    constant = {"kl_1": 5.0, "kl_2": 15.0, "grad_norm": 3.25, "skipped": 0}
    counts = [{"step": 10 * i, "images": 320 * i, "seconds": 1.5 * i} for i in range(1, 7)]
    terms = {"neg_elbo": 100.0, "reconstruction": 80.0, "reconstruction_closed": 90.0}
    history = [
        {**count, "beta": 2.0, **{name: n - i for name, n in terms.items()}, **constant}
        for i, count in enumerate(counts)
    ]
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
    skipped = {"step": 1, "images": 4, "skipped": 1}  # a first row in which no step was taken
    axes = plot_history([skipped, *history]).axes
    assert [len(axis.lines) for axis in axes] == [len(axis.lines) for axis in figure.axes]


@pytest.mark.parametrize("held_out", [True, False])
def test_history_through_csv(held_out, tmp_path):
    history = rows(held_out)
    write_csv(tmp_path / "metrics.csv", history)
    again = read_csv(str(tmp_path / "metrics.csv"))
    assert again == history
    whole_numbers = ("step", "images", "skipped")
    assert all(isinstance(row[name], int) for row in again for name in whole_numbers)
    assert isinstance(plot_history(again), Figure)


@pytest.mark.filterwarnings("ignore:No artists")
def test_plot_of_an_empty_history():
    assert isinstance(plot_history([]), Figure)


def test_csv_is_a_plain_table(tmp_path):
    fit(tmp_path, steps=2)
    with open(tmp_path / "metrics.csv", newline="") as file:
        header, *table = csv.reader(file)
    assert header[:2] == ["step", "images"]
    assert {"neg_elbo", "kl_1", "val_neg_elbo", "seconds"} <= set(header)
    assert table and all(len(row) == len(header) for row in table)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_shifted_images_are_moved_by_whole_pixels(most, h, w):
    """Of a picture that names its places, each pixel shows its place plus one offset, clamped."""
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij"))
    x = places.float().expand(20, 2, h, w)
    offsets = set()
    for image in shifted(x, most).long():
        dy, dx = (
            {d for d in range(-most, most + 1) if torch.equal(part, (place + d).clamp(0, end))}
            for part, place, end in zip(image, places, (h - 1, w - 1), strict=True)
        )
        assert dy and dx
        offsets.add((min(dy), min(dx)))
    assert len(offsets) > 1 or h == w == 1


@settings(deadline=None, max_examples=30, derandomize=True)
@given(st.floats(0.1, 4), st.integers(20, 40), st.integers(0, 20))
def test_warped_images_are_bent_smoothly(most, h, wider):
    """Of a picture that names its places, each pixel shows a place near its own."""
    w = h + wider
    places = torch.stack(torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")).float()
    moves = 64 * warped(places.repeat(20, 1, 1, 1) / 64, most) - places
    assert 0.1 * most < moves.abs().max() < most + 0.2  # images are 8-bit
    inner = moves[:, :, 5:-5, 5:-5]  # near the border it may be the border that is shown
    neighbours = torch.cat([inner.diff(dim=2).flatten(), inner.diff(dim=3).flatten()])
    assert neighbours.abs().max() < 13 * most / (h - 1) + 0.3  # points are half a height apart
    assert not torch.equal(moves[0], moves[1])


def test_images_are_warped_until_the_last_phase(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(trainer, "warped", lambda x, most: calls.append(most) or x)
    fit(tmp_path, steps=8, frozen_share=0.25, warp=2)
    assert calls == [2.0] * 6


# ---------------------------------------------------------------------------- command line

OPTIONS = """--data --folder --skip-bad --root --size --length --shortest --charset
    --fonts --images
    --workers --config --init --inference --likelihood --sigma --mixtures --context
    --prior-context --flow
    --unconditional --steps --batch-size --lr --warmup --beta-start --beta-steps --free-nats
    --closed-levels --closed-share --top-share --ema --pixel-weight --frozen-share --binarise
    --shift --warp --window-noise --eval-every
    --log-every --seed --device --out --keep --resume --evaluate
    --importance-samples"""


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Default models of a few channels; returns the options to train on a folder of images."""
    monkeypatch.setattr(trainer, "model_for", functools.partial(trainer.model_for, **TINY))
    folder = image_folder(tmp_path / "in", ["AB", "BA"] * 6)
    run = ["--steps", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu"]
    return ["--folder", str(folder), *run, "--out", str(tmp_path / "out")]


def last_line(options, capsys, status=2):
    """The one line, after the usage, with which the command line ends."""
    with pytest.raises(SystemExit) as stop:
        trainer.main(options)
    *usage, line = capsys.readouterr().err.splitlines()
    assert stop.value.code == status and all("error" not in other for other in usage)
    return line


def test_help():
    command = [sys.executable, trainer.__file__, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stderr == ""
    assert all(option in done.stdout for option in OPTIONS.split())
    assert f"default: {Hyperparameters.steps})" in done.stdout


def test_command_line_on_folder(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "save_figures", save_figures)
    trainer.main([*small, "--length", "2", "--charset", "AB"])
    assert sorted(content(tmp_path / "out")) == sorted(FILES + FIGURES)
    assert str(tmp_path / "out") in capsys.readouterr().out
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 32), 2, "AB")


def test_command_line_leaves_out_bad_files(small, tmp_path, capsys):
    (tmp_path / "in" / "broken.png").write_bytes(b"\x89PNG")
    assert "broken.png" in last_line(small, capsys)
    with pytest.warns(UserWarning, match="broken.png"):
        trainer.main([*small, "--skip-bad"])
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["data"]["count"] == 12


def test_command_line_trains_on_grey_versions(small, tmp_path):
    trainer.main([*small, "--channels", "1"])
    assert HVAE.load(tmp_path / "out" / "hvae.pt").input_shape == (1, 16, 32)


def test_command_line_keeps_its_pictures_out_of_the_data(small, tmp_path, capsys):
    before = content(tmp_path / "in")
    line = last_line([*small, "--out", str(tmp_path / "in" / "run")], capsys)
    assert "would become data" in line and content(tmp_path / "in") == before


def test_command_line_names_a_file_that_breaks_later(small, capsys, monkeypatch):
    """In a worker process, whose errors come with their traceback."""
    data = CaptchaFolder(small[1])
    data.paths[3].write_bytes(b"")
    monkeypatch.setattr(trainer, "make_dataset", lambda args: data)
    monkeypatch.setattr(trainer, "hold_out", lambda *_: (data, data))
    line = last_line([*small, "--steps", "4", "--workers", "1"], capsys)
    assert "error: " in line and data.paths[3].name in line


def test_command_line_keeps_every_model(small, tmp_path):
    trainer.main([*small, "--eval-every", "1", "--keep"])
    kept = [HVAE.load(tmp_path / "out" / f"hvae-{step:06d}.pt") for step in (1, 2)]
    assert [model.provenance["steps"] for model in kept] == [1, 2]


def test_command_line_model_options(small, tmp_path):
    options = "--length 2 --unconditional --inference bottom-up --likelihood logistic --mixtures 2"
    trainer.main([*small, *options.split(), "--size", "8", "12"])
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length, model.top_down) == ((3, 8, 12), None, False)
    assert (model.config["likelihood"], model.config["mixtures"]) == ("logistic", 2)


def test_command_line_on_captchas(small, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "hold_out", functools.partial(hold_out, limit=4))
    options = "--images 8 --size 16 40 --length 3 --charset XYZ --steps 1"
    trainer.main(small[2:] + options.split())
    model = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert (model.input_shape, model.text_length, model.charset) == ((3, 16, 40), 3, "XYZ")
    assert model.provenance["data"]["size"] == 8


def test_command_line_resumes(small, tmp_path, capsys):
    trainer.main(small)
    assert "resume" in last_line(small, capsys)
    trainer.main([*small, "--steps", "4", "--resume"])
    assert HVAE.load(tmp_path / "out" / "hvae.pt").provenance["steps"] == 4
    assert [row["step"] for row in read_csv(tmp_path / "out" / "metrics.csv")] == [2, 4]


def test_command_line_evaluates(small, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_captcha(likelihood="logistic")
    model.save(tmp_path / "model.pt")
    files = sorted(tmp_path.rglob("*"))
    options = ["--importance-samples", "3", "--device", "cpu"]
    trainer.main([*small[:2], "--evaluate", str(tmp_path / "model.pt"), *options])
    printed = capsys.readouterr().out
    metrics = evaluate(model.eval(), CaptchaFolder(small[1], text_length=2, charset="AB"), 3)
    numbers = [-metrics["elbo"], metrics["reconstruction"], *metrics["kl"]]
    for number in (*numbers, -metrics["log_likelihood"]):
        assert f"{number:,.2f}" in printed
    assert f"{metrics['bits_per_dim']:.3f}" in printed
    assert sorted(tmp_path.rglob("*")) == files  # nothing is trained


def test_a_checkpoint_is_measured_on_the_folder_that_it_was_trained_on(small, tmp_path, capsys):
    """Never on renders in silence; on the split 'test', which it has not seen."""
    trainer.main(small)
    capsys.readouterr()
    checkpoint = str(tmp_path / "out" / "hvae.pt")
    model, folder = HVAE.load(checkpoint), CaptchaFolder(small[1])
    held_out = folder.other_split("test", 512)
    trainer.main(["--evaluate", checkpoint, "--device", "cpu"])
    printed = capsys.readouterr().out
    assert f"{len(held_out)} images" in printed
    assert f"{-evaluate(model, held_out)['elbo']:,.2f}" in printed
    assert held_out_images(model).order == held_out.order
    shutil.copytree(small[1], tmp_path / "copy")
    assert len(held_out_images(model, folder=tmp_path / "copy")) == len(held_out)
    other = image_folder(tmp_path / "other", ["AB"] * 3)
    assert len(held_out_images(model, folder=other)) == 3
    Path(small[1]).rename(tmp_path / "moved")
    assert "is gone; name a --folder" in last_line(["--evaluate", checkpoint], capsys)
    for data in ("MyDataset", {"renderer": "of your own"}):
        model.provenance = {"data": data}
        with pytest.raises(ValueError, match="not trained on plain renders"):
            held_out_images(model)


def test_texts_of_several_lengths(small, tmp_path, capsys):
    """Trained on, asked for, drawn at random, written, and read back."""
    image_folder(tmp_path / "texts", ["A", "AB", "BABA", "BB"] * 3)
    small[1] = str(tmp_path / "texts")
    trainer.main([*small, "--length", "4", "--charset", "AB"])
    checkpoint = str(tmp_path / "out" / "hvae.pt")
    model = HVAE.load(checkpoint)
    assert (model.text_length, model.lengths) == (4, [3, 6, 0, 3])
    assert model.sample(2, ["A", "BABA"]).shape == (2, 3, 16, 32)
    out = tmp_path / "set"
    generate.main(["--checkpoint", checkpoint, "--individual", str(out), "--n", "40"])
    texts = CaptchaFolder(out, text_length=4, charset="AB").texts
    assert {len(text) for text in texts} == {1, 2, 4}
    image_folder(tmp_path / "short", ["A", "BB", "AB"])  # none as long as the longest
    for folder in ([], ["--folder", str(tmp_path / "short")]):
        trainer.main(["--evaluate", checkpoint, *folder])
        assert "-ELBO" in capsys.readouterr().out
    fixed = tiny_captcha(text_length=4)
    with pytest.raises(ValueError, match="1 or 2 or 4 symbols, the model's 4"):
        fit(tmp_path / "other", fixed, CaptchaFolder(out, text_length=4, charset="AB"))


def test_grey_folders_train_grey_models(small, tmp_path):
    for path in Path(small[1]).iterdir():
        Image.open(path).convert("L").save(path)
    trainer.main(small)
    assert HVAE.load(tmp_path / "out" / "hvae.pt").input_shape == (1, 16, 32)


def test_command_line_begins_with_a_checkpoint(small, tmp_path, capsys):
    model = tiny_captcha(sigma=0.3)
    nn.init.normal_(model.to_image.bias)
    model.provenance = {"steps": 7}
    model.save(tmp_path / "model.pt")
    init = ["--init", str(tmp_path / "model.pt")]
    trainer.main([*small, "--lr", "1e-12", "--length", "2", "--charset", "AB", *init])
    trained = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert trained.config == model.config
    assert trained.provenance["steps"] == 9 and trained.provenance["began_with"] == {"steps": 7}
    for name, weight in model.named_parameters():
        torch.testing.assert_close(trained.get_parameter(name), weight, atol=1e-6, rtol=1e-5)


def test_what_fits_is_taken_over_from_a_checkpoint_of_other_images(small, tmp_path, capsys):
    """Another size and another charset: the shared symbols keep their embeddings."""
    model = tiny_captcha(input_size=(24, 40), charset="BCX")
    nn.init.normal_(model.to_image.bias)
    model.save(tmp_path / "model.pt")
    options = ["--lr", "1e-12", "--length", "2", "--charset", "AB", "--init"]
    trainer.main([*small, *options, str(tmp_path / "model.pt")])
    assert "begins with the weights of" in capsys.readouterr().out
    trained = HVAE.load(tmp_path / "out" / "hvae.pt")
    assert trained.input_shape == (3, 16, 32) and trained.charset == "AB"
    close = functools.partial(torch.testing.assert_close, atol=1e-6, rtol=1e-5)
    close(trained.to_image.weight, model.to_image.weight)
    close(trained.texts[0].embedding.weight[1], model.texts[0].embedding.weight[0])  # of B


def test_a_checkpoint_begins_a_model_of_a_folder(tmp_path):
    """The same from Python."""
    tiny_captcha(input_size=(24, 40), charset="BCX").save(tmp_path / "model.pt")
    data = CaptchaFolder(image_folder(tmp_path / "in", ["AB", "BA"] * 6), None, 2, "AB")
    model = begin_with(tmp_path / "model.pt", data, context=(1, 1))
    assert model.config["context"] == [1, 1]
    trained, _ = fit(tmp_path / "out", model, data, batch_size=2)
    assert trained.input_shape == (3, 16, 32) and trained.charset == "AB"


def test_the_best_model_is_kept(tmp_path, monkeypatch):
    """Held-out -ELBOs of 3, 2 and 4 nats: the second model is the one."""
    nats = iter([3.0, 2.0, 4.0])
    original = trainer.evaluate
    fake = lambda *args, **more: {**original(*args, **more), "elbo": -next(nats)}
    monkeypatch.setattr(trainer, "evaluate", fake)
    model, history = fit(tmp_path / "out", steps=6, eval_every=2, keep=True)
    assert [row["val_neg_elbo"] for row in history if "val_neg_elbo" in row] == [3, 2, 4]
    assert model.provenance["steps"] == 4
    second = HVAE.load(tmp_path / "out" / "hvae-000004.pt")
    assert all(map(torch.equal, model.state_dict().values(), second.state_dict().values()))


def test_script_fits_the_prior(tmp_path, capsys):
    folder = image_folder(tmp_path / "in", ["AB", "BA"] * 6)
    data = CaptchaFolder(folder)
    for name, flow in (("with", 2), ("without", 0)):
        model = tiny_captcha(**VECTOR_TOP, text_length=None, flow=flow)
        model.provenance = {"data": data.description}
        model.save(tmp_path / f"{name}.pt")
    out = tmp_path / "out.pt"
    options = ["--steps", "2", "--images", "5", "--out", str(out)]
    fit_prior_script.main([str(tmp_path / "with.pt"), *options])
    fitted = HVAE.load(out)
    assert fitted.config == HVAE.load(tmp_path / "with.pt").config
    assert fitted.provenance["prior_fit"] == {"images": 5, "steps": 2, "batch_size": 128}
    assert fitted.provenance["held_out"]["images"] == len(hold_out(data, 0)[1])
    before = out.read_bytes()
    for name, message in (("with", "is there already"), ("without", "nothing to fit")):
        with pytest.raises(SystemExit):
            fit_prior_script.main([str(tmp_path / f"{name}.pt"), *options])
        assert message in capsys.readouterr().err
        assert out.read_bytes() == before
        options[-1] = str(tmp_path / "other.pt")


def test_evaluation_is_on_what_the_command_line_names(small, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(trainer, "print_evaluation", lambda model, data, k: seen.append(data))
    file, font = str(tmp_path / "model.pt"), captcha.image.DEFAULT_FONTS[0]
    tiny().save(file)
    trainer.main(["--evaluate", file, *small[:2], "--images", "3"])
    tiny_captcha(input_size=(30, 80)).save(file)
    trainer.main(["--evaluate", file, "--fonts", font])
    assert len(seen[0]) == 3 and seen[1].fonts == [font]


def test_command_line_seed_sets_the_weights(small, tmp_path):
    weights = []
    for i, seed in enumerate("001"):
        torch.manual_seed(100 + i % 2)  # whatever was drawn before
        out = tmp_path / str(i)
        trainer.main([*small, "--steps", "1", "--lr", "1e-9", "--seed", seed, "--out", str(out)])
        weights.append(HVAE.load(out / "hvae.pt").levels[0].q.hidden.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2], atol=1e-3)


@pytest.mark.parametrize(
    "options, message",
    [
        ("--steps 0", "steps"),
        ("--steps many", "--steps"),
        ("--batch-size 100", "batch_size=100"),
        ("--lr -1", "lr"),
        ("--closed-levels 9", "closed_levels"),
        ("--inference bottom-up --closed-levels 1", "closed_levels"),
        ("--inference sideways", "--inference"),
        ("--sigma -1", "sigma"),
        ("--likelihood logistic --mixtures 0", "mixtures"),
        ("--flow 2", "flow"),
        ("--length 3", "the data's longest texts have 2 symbols"),
        ("--size 0 5", "image_size"),
        ("--charset ''", "charset"),
        ("--workers -1", "workers: expected a whole number"),
        ("--eval-every 0", "eval_every"),
        ("--folder no/such/folder", "no/such/folder"),
        ("--device toaster", "toaster"),
        ("--device meta", "meta"),
        ("--seed -1", "seed"),
        (f"--seed {2**64}", "seed"),
        ("--wings", "--wings"),
        ("--init no/such/model.pt", "no/such/model.pt"),
        # an empty path
        ("--folder ''", "--folder: expected a path"),
        ("--out ''", "--out: expected a path"),
        ("--init ''", "--init: expected a path"),
        ("--evaluate ''", "--evaluate: expected a path"),
        # an option without effect
        ("--channels 2", "--channels"),
        ("--fonts a.ttf", "--fonts has no effect with --folder"),
        ("--root data", "--root has no effect with --folder"),
        ("--charset AB", "--charset has no effect without --length"),
        ("--shortest 2", "--shortest has no effect without --length"),
        ("--images 3", "--images has no effect with --folder"),
        ("--importance-samples 3", "--importance-samples has no effect without --evaluate"),
        ("--init some.pt --sigma 1", "--sigma has no effect with --init"),
        ("--init some.pt --unconditional", "--unconditional has no effect with --init"),
        ("--evaluate some.pt", "--batch-size has no effect with --evaluate"),
        ("--likelihood gaussian --mixtures 3", "--mixtures has no effect on the likelihood"),
        ("--likelihood bernoulli --sigma 1", "--sigma has no effect on the likelihood 'bernoulli'"),
    ],
)
def test_command_line_errors(options, message, small, capsys):
    words = ["" if word == "''" else word for word in options.split()]
    line = last_line([*small, *words], capsys)
    assert "error: " in line and message in line


@pytest.mark.parametrize(
    "options, message",
    [
        ("--images 0", "images"),
        (f"--images {10**20}", "--images"),
        ("--length 0", "length"),
        ("--fonts no.ttf", "no.ttf"),
        ("--skip-bad", "--skip-bad has no effect with --data captcha"),
        ("--channels 1", "--channels has no effect with --data captcha"),
        ("--root data", "--root has no effect with --data captcha"),
        ("--data mnist --charset AB", "--charset has no effect with --data mnist"),
        ("--data mnist --size 9 9", "--size has no effect with --data mnist"),
        ("--likelihood gaussian --pixel-rise 1", "--pixel-rise has no effect without a context"),
        ("--context 0 0 --window-noise 0", "--window-noise has no effect without a context"),
        ("--evaluate no/such/model.pt", "no/such/model.pt"),
        ("--evaluate some.pt --steps 3", "--steps has no effect with --evaluate"),
        ("--evaluate some.pt --out here", "--out has no effect with --evaluate"),
        ("--evaluate some.pt --length 3", "--length has no effect with --evaluate"),
    ],
)
def test_command_line_errors_without_a_folder(options, message, capsys, monkeypatch):
    monkeypatch.setattr(trainer, "hold_out", functools.partial(hold_out, limit=4))
    line = last_line([*options.split(), "--device", "cpu"], capsys)
    assert "error: " in line and message in line
    assert not Path("checkpoints/run").exists()
