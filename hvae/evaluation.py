"""evaluate(): the ELBO of a data set, importance-weighted bounds on log p(x), and bits/dim."""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from hvae.distributions import binarised
from hvae.validate import InputError, validate_int


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: Dataset,
    importance_samples: int = 1,
    *,
    batch_size: int = 64,
    binarise: bool | None = None,
    bf16: bool = False,
    seed: int = 0,
) -> dict:
    """Means over a data set, in nats per image; binarised as in training, unless told.

    Returns:
        elbo, reconstruction, kl (a list, z_1 first); log_likelihood, the importance-weighted
        lower bound on log p(x) with that many draws of z (Burda et al. 2016, eq. 8); bounds, the
        same for 1, 10, 100, ... of those draws; bits_per_dim of log_likelihood (with one draw,
        of the ELBO), or None unless the likelihood is a probability of 8-bit images ('logistic').
    """
    validate_int("importance_samples", importance_samples, 1)
    if len(dataset) == 0:
        raise InputError("evaluate: the data set is empty")
    device, was_training = model.device, model.training
    binarise = model.binarised if binarise is None else binarise
    model.eval()
    draws = min(importance_samples, batch_size)  # of each image, at a time
    rows, bounds = [], []
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        binariser = torch.Generator().manual_seed(seed)  # the same images for any draws
        loader = DataLoader(dataset, batch_size // draws)
        for x, y in tqdm(loader, desc="evaluate", delay=20, leave=False):
            x = (binarised(x, binariser) if binarise else x).to(device)
            y = y.to(device) if model.text_length is not None else None
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                terms = [
                    model(x, y, draws=min(draws, importance_samples - first))
                    for first in range(0, importance_samples, draws)
                ]
            table = torch.cat([terms_per_image(t, len(x)) for t in terms], 1).cpu().double()
            bounds.append(importance_bounds(table[:, :, 0]))
            rows.append(table[:, :, 1:].mean(1))
    model.train(was_training)
    elbo, reconstruction, *kl = torch.cat(rows).mean(0).tolist()
    bounds = {k: torch.cat([b[k] for b in bounds]).mean().item() for k in bounds[0]}
    log_likelihood = bounds[importance_samples]
    bound = elbo if importance_samples == 1 else log_likelihood  # of one draw, the noisier one
    bits = -bound / (math.prod(model.input_shape) * math.log(2))
    return {
        "elbo": elbo,
        "reconstruction": reconstruction,
        "kl": kl,
        "log_likelihood": log_likelihood,
        "bounds": bounds,
        "importance_samples": importance_samples,
        "images": len(dataset),
        "bits_per_dim": bits if model.config["likelihood"] == "logistic" else None,
    }


def terms_per_image(terms, images: int) -> Tensor:
    """ELBOTerms as (images, draws, 3 + L): log weight, ELBO, reconstruction, and KL terms."""
    columns = torch.stack([terms.log_weight, terms.elbo, terms.reconstruction], 1)
    return torch.cat([columns, terms.kl], 1).unflatten(0, (images, -1))


def importance_bounds(log_weights: Tensor) -> dict[int, Tensor]:
    """Bounds on log p(x), (B,), from log weights (B, K): for k = 1, 10, ... and K draws.

    For a k below K the draws form K // k groups, whose bounds are averaged.
    """
    K = log_weights.shape[1]
    numbers = sorted({10**i for i in range(len(str(K)))} | {K})
    groups = {k: log_weights[:, : K // k * k].unflatten(1, (-1, k)) for k in numbers}
    return {k: (g.logsumexp(2) - math.log(k)).mean(1) for k, g in groups.items()}
