import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hvae.optimizer import SMALLEST, Muon, make_optimizers, orthogonal
from model import HVAE


def random_matrix(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(2, 40), st.integers(2, 40), st.integers(0, 99), st.sampled_from([1e-6, 1.0, 1e6])
)
def test_orthogonal_keeps_directions_and_evens_out_their_sizes(rows, columns, seed, scale):
    """Singular vectors stay; singular values of a thirtieth of the norm or more become about 1."""
    u, _, v = torch.linalg.svd(random_matrix(rows, columns, seed), full_matrices=False)
    sizes = torch.logspace(0, -0.7, min(rows, columns))
    other = random_matrix(rows, columns, seed + 1)
    out, _ = orthogonal(torch.stack([scale * (u * sizes) @ v, other]))
    in_their_directions = u.T @ out @ v.T
    new_sizes = in_their_directions.diagonal()
    assert ((new_sizes > 0.5) & (new_sizes < 1.3)).all()
    assert (in_their_directions - new_sizes.diag()).abs().max() < 1e-3


def test_orthogonal_of_zeros_is_zero():
    assert not orthogonal(torch.zeros(1, 3, 5)).any()


@pytest.mark.parametrize("shape", [(32, 32), (16, 8, 3, 3), (64, 16, 3, 3)])
def test_steps_of_muon_are_as_large_as_the_learning_rate_says(shape):
    """A number's root mean square is 0.2 lr, whatever the scale of the gradient."""
    for scale in (1e-4, 1e3):
        weight = nn.Parameter(torch.zeros(shape))
        weight.grad = scale * random_matrix(len(weight), weight[0].numel()).view(shape)
        Muon([weight], lr=0.1).step()
        assert weight.square().mean().sqrt().item() == pytest.approx(0.02, rel=0.2)
        assert (weight * weight.grad).sum() < 0


def test_muon_fits_a_matrix_of_very_different_directions():
    """Least squares with a condition number of 1,000."""
    torch.manual_seed(0)
    inputs = torch.randn(200, 16) * torch.logspace(0, -1.5, 16)
    target = torch.randn(16, 16)
    weight = nn.Parameter(torch.zeros(16, 16))
    optimizer = Muon([weight], lr=0.1, weight_decay=0)
    for step in range(300):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 300)
        loss = (inputs @ (weight - target)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (weight - target).square().mean() < 0.01 * target.square().mean()


def test_a_frozen_weight_stays():
    weight = nn.Parameter(torch.ones(16, 16))
    Muon([weight], lr=0.1).step()
    assert (weight == 1).all()


def test_every_parameter_has_one_optimizer():
    """Muon has the weights of wide layers; vectors, embeddings and narrow layers have AdamW."""
    model = HVAE()
    muon, adamw = make_optimizers(model, 1e-3)
    of = {id(p): o for o in (muon, adamw) for group in o.param_groups for p in group["params"]}
    assert of.keys() == {id(p) for p in model.parameters()}
    assert sum(len(o.param_groups[0]["params"]) for o in (muon, adamw)) == len(of)
    weights = model.inference[0].layers
    assert of[id(weights[1][0].weight)] is muon
    narrow = model.levels[1].from_z.weight
    assert narrow.shape[1] < SMALLEST and of[id(narrow)] is adamw
    assert of[id(model.texts[0].embedding.weight)] is adamw
    assert all(p.ndim > 1 for p in muon.param_groups[0]["params"])


def test_a_narrow_model_has_adamw_alone():
    plain = dict(context=None, prior_context=None, text_length=None)
    model = HVAE([("conv", 4)], [], (8, 8), 1, likelihood="bernoulli", **plain)
    (optimizer,) = make_optimizers(model, 1e-3)
    assert isinstance(optimizer, torch.optim.AdamW)
