"""p(z_l | z_{l+1..L}) with a window: a position of a latent map also sees earlier positions.

    p(z_l | h) = prod_i p(z_li | h_i, z_lj for j in the window of i)

One diagonal Gaussian has to place all symbols at once, each without knowing of the others. Here
a position is drawn after those of its window, from a mixture of Gaussians. It is for latents what
hvae/context.py is for pixels, and they are drawn on the same slanted fronts.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hvae.distributions import DiagonalGaussian, draw_noise
from hvae.fronts import SlantedCanvas, fronts


class MaskedConv(nn.Conv2d):
    """A convolution over earlier positions: `rows` rows above, and those to the left in its own.

    (B, c_in, H + rows, W + 2 columns) with margins -> (B, c_out, H, W).
    """

    def __init__(self, c_in: int, c_out: int, rows: int, columns: int):
        super().__init__(c_in, c_out, (rows + 1, 2 * columns + 1))
        mask = torch.ones(rows + 1, 2 * columns + 1)
        mask[-1, columns:] = 0
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, canvas: Tensor) -> Tensor:
        return F.conv2d(canvas, self.weight * self.mask, self.bias)

    def of_windows(self, windows: Tensor) -> Tensor:
        """The same, (1, c_out, n, B), of the windows of a front, (taps, c_in, n, B)."""
        weight = self.weight.flatten(2)[:, :, : len(windows)].transpose(1, 2).flatten(1)
        return F.conv2d(windows.flatten(0, 1)[None], weight[:, :, None, None], self.bias)


class WindowNetwork(nn.Module):
    """The network behind a WindowPrior, for latents of c_z channels below features of c_h."""

    width, mixtures = 128, 4

    def __init__(self, c_z: int, c_h: int, window: tuple[int, int]):
        super().__init__()
        self.c_z = c_z
        self.rows, self.columns = window
        self.from_window = MaskedConv(c_z + 1, self.width, *window)
        self.from_h = nn.Conv2d(c_h, self.width, 1)
        self.hidden = nn.ModuleList(nn.Conv2d(self.width, self.width, 1) for _ in range(2))
        self.out = nn.Conv2d(self.width, self.mixtures * (1 + 2 * c_z), 1)
        with torch.no_grad():  # starts near N(0, I)
            self.out.weight *= 0.1
            self.out.bias.zero_()

    def canvas(self, u: Tensor) -> Tensor:
        """u (B, c_z, H, W) with margins of zeros, and a channel that marks what is inside."""
        inside = torch.ones_like(u[:, :1])
        return F.pad(torch.cat([u, inside], 1), (self.columns, self.columns, self.rows, 0))

    def forward(self, seen: Tensor, from_h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Log weights (B, K, H, W), means and log sigmas (B, K, c_z, H, W) of the mixtures.

        Args:
            seen, from_h: (B, width, H, W), what the window and h say. Of a front, B is 1, and H
                and W are its positions and the images.
        """
        h = F.silu(seen + from_h)
        for layer in self.hidden:
            h = h + F.silu(layer(h))
        mixture = self.out(h).float().unflatten(1, (self.mixtures, -1))
        logit, mean, log_sigma = mixture.split([1, self.c_z, self.c_z], 2)
        return logit[:, :, 0].log_softmax(1), mean, log_sigma.clamp(-4, 3)


class WindowPrior:
    """The density of z = mu + sigma u (B, c_z, H, W), u from the mixtures of `network`.

    mu and sigma are those of `base`, the Gaussian without a window; h (B, c_h, H, W) are the
    generation features, or what PriorFeatures makes of them.
    """

    def __init__(self, base: DiagonalGaussian, network: WindowNetwork, h: Tensor):
        self.base, self.network, self.from_h = base, network, network.from_h(h)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B,) nats."""
        log_scale = 0.5 * self.base.logvar
        u = (z - self.base.mu) * (-log_scale).exp()
        seen = self.network.from_window(self.network.canvas(u))
        log_pi, mean, log_sigma = self.network(seen, self.from_h)
        squares = (u[:, None] - mean).square() * (-2 * log_sigma).exp()
        log_p = -0.5 * (squares + 2 * log_sigma + math.log(2 * math.pi)).sum(2)
        return torch.logsumexp(log_pi + log_p, 1).flatten(1).sum(1) - log_scale.flatten(1).sum(1)

    def sample(self, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """A draw, front after front; the temperature multiplies the Gaussians' noise."""
        (b, c, H, W), net = self.base.mu.shape, self.network
        if not b:
            return self.base.mu
        eps = draw_noise(torch.randn, (b, c, H, W), self.base.mu, generator)
        noise = draw_noise(torch.rand, (b, 1, H, W), self.base.mu, generator)
        # images last, (c, H, W, B), as on the canvas
        from_h, eps, noise = (maps.permute(1, 2, 3, 0) for maps in (self.from_h, eps, noise))
        from_h, inside = from_h.contiguous(), noise.new_ones(1, 1, b)
        canvas = SlantedCanvas((b, c + 1, H, W), (net.rows, net.columns), noise)
        for i, j, n in fronts(H, W, net.columns):
            at = (slice(None), *canvas.positions(i, j, n))
            seen = net.from_window.of_windows(torch.cat(canvas.window(i, j, n)))
            log_pi, mean, log_sigma = net(seen, from_h[at][None])
            cumulative = log_pi.exp().cumsum(1)
            k = (cumulative[:, :-1] < noise[at]).sum(1)[:, None, None]  # of the component
            mean, log_sigma = (t.take_along_dim(k, 1)[0, 0] for t in (mean, log_sigma))
            u = mean + temperature * log_sigma.exp() * eps[at]
            canvas.write(i, j, torch.cat([u, inside.expand(-1, n, -1)]))
        return self.base.mu + (0.5 * self.base.logvar).exp() * canvas.maps()[:, :c]
