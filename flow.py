"""A learned prior for the top latent: an invertible map from z_L to noise u ~ N(0, I).

Whatever shape the encoded images take together, samples can then be drawn from it (a real-valued non-volume-preserving
flow, Dinh et al. 2017; as the prior of a VAE, Chen et al. 2017, section 3.2).
"""

from typing import Callable, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import trange


class Coupling(nn.Module):
    """Half of the numbers shift and scale the other half, which is invertible whatever `net` computes.

    (Dinh et al. 2017, eq. 7 and 8.)
    """

    def __init__(self, c: int):
        super().__init__()
        self.sizes = (c // 2, c - c // 2)
        self.net = nn.Sequential(nn.Linear(c // 2, 2 * c), nn.SiLU(), nn.Linear(2 * c, 2 * c), nn.SiLU(),
                                 nn.Linear(2 * c, 2 * self.sizes[1]))
        with torch.no_grad():
            self.net[-1].weight *= 0.1  # starts near the identity
            self.net[-1].bias.zero_()

    def shift_and_log_scale(self, a: Tensor) -> tuple[Tensor, Tensor]:
        shift, log_scale = self.net(a).chunk(2, dim=1)
        return shift, torch.tanh(log_scale)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, c) -> u (B, c) and log |det du/dz| (B,)."""
        a, b = z.split(self.sizes, dim=1)
        shift, log_scale = self.shift_and_log_scale(a)
        return torch.cat([a, (b - shift) * (-log_scale).exp()], dim=1), -log_scale.sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        a, b = u.split(self.sizes, dim=1)
        shift, log_scale = self.shift_and_log_scale(a)
        return torch.cat([a, b * log_scale.exp() + shift], dim=1)


class Flow(nn.Module):
    """Couplings of c numbers, which are shuffled (the same way for ever) before each."""

    def __init__(self, c: int, couplings: int):
        super().__init__()
        self.couplings = nn.ModuleList(Coupling(c) for _ in range(couplings))
        self.register_buffer("order", torch.stack([torch.randperm(c) for _ in range(couplings)]))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z (B, c) -> u (B, c) and log |det du/dz| (B,)."""
        log_det = z.new_zeros(len(z))
        for order, coupling in zip(self.order, self.couplings):
            z, change = coupling(z[:, order])
            log_det = log_det + change
        return z, log_det

    def inverse(self, u: Tensor) -> Tensor:
        """u (B, c) -> the z (B, c) that forward() leads to it."""
        for order, coupling in zip(self.order.flip(0), reversed(self.couplings)):
            u = coupling.inverse(u)[:, order.argsort()]
        return u


class Flowed(NamedTuple):
    """The density of z = flow.inverse(u), u ~ base. Speaks like a Normal."""

    base: "Normal"  # noqa: F821  (model.Normal)
    flow: Flow

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        u = self.base.sample(temperature, generator)
        with torch.autocast(u.device.type, enabled=False):
            return self.flow.inverse(u)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        with torch.autocast(z.device.type, enabled=False):
            u, log_det = self.flow(z.float())
            return self.base.log_prob(u) + log_det


def fit(p: Flowed, draw: Callable[[int], Tensor], steps: int, batch_size: int, lr: float) -> None:
    """Fits p to draw(n) -> z (n, c) by maximum likelihood; its flow ends with averaged weights."""
    flow = p.flow
    optimizer = torch.optim.AdamW(flow.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05, cycle_momentum=False)
    average = AveragedModel(flow, multi_avg_fn=get_ema_multi_avg_fn(0.99))
    for _ in (bar := trange(steps, desc="p(z_L)", unit="step", dynamic_ncols=True, mininterval=1)):
        loss = -p.log_prob(draw(batch_size)).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(flow.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(flow)
        bar.set_postfix_str(f"-log p(z_L) {loss.item():.2f} nats", refresh=False)
    flow.load_state_dict(average.module.state_dict())
