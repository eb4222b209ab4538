"""Optimizers: Muon for the matrices of layers, AdamW for all other parameters."""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
SMALLEST, LARGEST = 16, 200_000  # rows and columns, and numbers, of a matrix that Muon trains


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: a step moves all directions of a weight matrix equally far.

    (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".) Gradients have
    few large singular values, so other optimizers hardly move in most directions. A convolution's
    weight is a matrix with a row for each index of its first dimension. Steps are as large as
    AdamW's are (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2), so both share a
    rate. torch.optim.Muon has no convolutions.
    """

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.01):
        super().__init__(weights, dict(lr=lr, momentum=0.95, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape = defaultdict(list)  # matrices that are computed together
            for weight in group["params"]:
                if weight.grad is not None:  # not frozen
                    by_shape[len(weight), weight[0].numel()].append(weight)
            for shape, weights in by_shape.items():
                steps = [self.ahead(weight, group["momentum"]).flatten(1) for weight in weights]
                size = 0.2 * math.sqrt(max(shape))  # then a number's root mean square is 0.2
                for weight, update in zip(weights, orthogonal(torch.stack(steps)), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update.view(weight.shape), alpha=group["lr"] * size)

    def ahead(self, weight: nn.Parameter, decay: float) -> Tensor:
        """Nesterov's momentum of a weight."""
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(momentum, decay)


def orthogonal(matrices: Tensor, iterations: int = 5) -> Tensor:
    """Matrices (N, m, n) with most singular values replaced by numbers from about 0.7 to 1.2.

    Those below a thousandth of the matrix's norm grow by a factor of up to 485, and stay smaller.

    Newton-Schulz iterations, with the coefficients of Jordan et al.: x <- (a + b s + c s s) x with
    s = x x^T moves singular values towards 1 without a decomposition. All factors are polynomials
    of the first s, so x itself is multiplied only once, by their product q.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-12)
    s = x @ x.mT
    q = one = torch.eye(x.shape[1], device=x.device)
    for _ in range(iterations):
        p = a * one + torch.baddbmm(s, s, s, beta=b, alpha=c)
        q, s = p @ q, p @ s @ p
    return (q @ x).mT if is_tall else q @ x


def make_optimizers(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices of 16 rows and columns or more, up to 200,000 numbers; AdamW for the rest.

    A 'dense' layer on a map is so large that an orthogonal step costs more time than it saves.
    """
    weights = [layer.weight for layer in model.modules() if isinstance(layer, LAYERS)]
    matrices = [
        w for w in weights if min(len(w), w[0].numel()) >= SMALLEST and w.numel() <= LARGEST
    ]
    by_muon = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in by_muon]
    optimizers = [torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)]
    return [Muon(matrices, lr), *optimizers] if matrices else optimizers
