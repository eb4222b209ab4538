"""A second stage: the upper priors, fitted once more to q of a trained model.

These are p(z_L), a flow, and in a ladder the mixtures in the prior of the map below a vector. While
q moves they lag behind, and where q and a prior differ, samples do not look like reconstructions
(Dai & Wipf 2019, section 4). Now q stays: images are encoded once, and batches can be large.
"""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm, trange

from hvae.distributions import DiagonalGaussian, binarised
from hvae.hyperparameters import Hyperparameters
from hvae.optimizer import make_optimizers
from hvae.parallel import has_bf16, ignore_interrupts
from hvae.prior import WindowPrior
from hvae.validate import InputError


def upper_priors(model: nn.Module) -> nn.ModuleList:
    """What can be fitted: nothing that q sees depends on it."""
    below = map_below_vector(model)
    modules = [model.levels[-1].flow]
    modules += [] if below is None else [below.window, below.prior_features]
    return nn.ModuleList(module for module in modules if module is not None)


def fit_prior(
    model: nn.Module,
    dataset: Dataset,
    *,
    steps: int = 4000,
    batch_size: int = 128,
    lr: float = 2e-3,
    workers: int = 1,
    seed: int = 0,
) -> nn.Module:
    """Fits the upper priors of an HVAE to its q(z|x) of a data set; returns it in eval mode.

    Raises:
        ValueError: the model has no such priors.
    """
    priors = upper_priors(model.eval())
    if not len(priors):
        raise InputError("this model has neither a flow nor a map below a vector: nothing to fit")
    top, below = model.levels[-1], map_below_vector(model)
    torch.manual_seed(seed)
    loader = DataLoader(dataset, 100, num_workers=workers, worker_init_fn=ignore_interrupts)
    encoded = encode(model, loader)
    average = AveragedModel(priors, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    optimizers = make_optimizers(priors, lr)
    hp = Hyperparameters(steps=steps, lr=lr, warmup=steps // 20, frozen_share=0)
    bar = trange(steps, desc="priors", unit="step", dynamic_ncols=True, mininterval=1)
    for step in bar:
        i = torch.randint(len(encoded["top_mu"]), (batch_size,), device=model.device)
        loss = prior_loss(top, below, {name: rows[i] for name, rows in encoded.items()})
        priors.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(priors.parameters(), 5.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = hp.lr_at(step)
            optimizer.step()
        average.update_parameters(priors)
        bar.set_postfix_str(f"-log p {loss.item():.2f} nats", refresh=False)
    priors.load_state_dict(average.module.state_dict())
    fit = {"images": len(dataset), "steps": steps, "batch_size": batch_size}
    model.provenance = {**model.provenance, "prior_fit": fit}
    return model


def map_below_vector(model: nn.Module) -> nn.Module | None:
    """The level below a vector, of a ladder. A chain draws that vector from this level's z."""
    levels = [level for level in model.levels if level.prior_features is not None]
    return levels[0] if levels and model.top_down else None


def flow_loss(top: nn.Module, z: Tensor) -> Tensor:
    """-log p(z_L), mean in nats: fits the flow to every draw, even where its KL is free."""
    return -top.prior(z).log_prob(z).mean()


def prior_loss(top: nn.Module, below: nn.Module | None, rows: dict[str, Tensor]) -> Tensor:
    """-log p of draws of q, summed over both levels, mean in nats."""
    draw = lambda name: DiagonalGaussian(rows[f"{name}_mu"], rows[f"{name}_logvar"]).sample()
    loss = 0 if top.flow is None else flow_loss(top, draw("top"))
    if below is None:
        return loss
    base = DiagonalGaussian(rows["base_mu"], rows["base_logvar"])
    features = below.prior_features(rows["h"].float(), rows.get("y"))
    return loss - WindowPrior(base, below.window, features).log_prob(draw("below")).mean()


@torch.no_grad()
def encode(model: nn.Module, loader: DataLoader) -> dict[str, Tensor]:
    """What prior_loss() needs, a row for each image: q, and of the map its h, base and text.

    Images for which q is not finite are left out, as training leaves out their steps.
    """
    device, below, batches = model.device, map_below_vector(model), []
    k = len(model.levels) - 1 if below is None else list(model.levels).index(below)
    for x, y in tqdm(loader, desc="encode", unit="batch", dynamic_ncols=True, mininterval=1):
        x = binarised(x) if model.binarised else x
        y = y.to(device) if model.text_length is not None else None
        autocast = torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device))
        with autocast:
            _, levels = model.infer(x.to(device), y)
            h = model.start(len(x), y)
            for l in reversed(range(k + 1, len(levels))):
                h = model.descend(l, h, levels[l].z, y)
        rows = {"top_mu": levels[-1].q.mu, "top_logvar": levels[-1].q.logvar}
        if below is not None:
            q, p, *_ = levels[k]
            rows.update(below_mu=q.mu, below_logvar=q.logvar, h=h.half())
            rows.update(base_mu=p.base.mu, base_logvar=p.base.logvar)
            if y is not None:
                rows["y"] = y
        usable = torch.stack([row.flatten(1).isfinite().all(1) for row in rows.values()]).all(0)
        batches.append({name: row[usable] for name, row in rows.items()})
    encoded = {name: torch.cat([rows.pop(name) for rows in batches]) for name in list(batches[0])}
    if not len(encoded["top_mu"]):
        raise FloatingPointError("q(z|x) is not finite for any of the images")
    return encoded
