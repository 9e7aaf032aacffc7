"""Muon (Jordan et al. 2024): momentum whose directions are all made equally long."""

from math import prod, sqrt

from .arguments import check_momentum, check_step
from .arrays import Array, Params, array_module
from .optim import AdamW

NEVER_ORTHOGONAL = ("patch_embed", "pos_proj", "head", "patch_head")
"""How a part of a name begins whose weight sees pixels or positions, or names the classes."""
NEWTON_SCHULZ, ROUNDS = (3.4445, -4.7750, 2.0315), 5
LENGTH = 0.2
"""Root mean square of a step, in units of the rate, where all directions come to 1."""


class Muon(AdamW):
    """Momentum made orthogonal (Jordan et al. 2024) for matrices, AdamW for the rest, in place.

    A matrix takes features to features: is_hidden. Its step has about the length of AdamW's (Liu
    et al. 2025), so that one rate and one decay suit all parameters, as PyTorch's Muon does with
    adjust_lr_fn="match_rms_adamw".
    State: AdamW's. exp_avg of a matrix is its momentum, and exp_avg_sq of a matrix stays zero.
    """

    def __init__(
        self,
        params: Params,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        momentum: float = 0.95,
    ):
        super().__init__(params, lr, weight_decay, betas, eps)
        check_momentum(momentum)
        self.momentum = float(momentum)

    def step(self, params: Params, grads: Params, lr: float | None = None) -> None:
        """p -= lr * decay * p;  p -= lr * 0.2 sqrt(max(out, in)) * orthogonal(ahead).

        That is for matrices (out, in). ahead: the gradient and its average, as Nesterov mixes them.
        lr: this step's rate, the constructor's where None. Raises UserError as AdamW.step.
        """
        check_step(params, grads, self.exp_avg)
        lr = self.lr if lr is None else lr
        others = {}
        for name, p in params.items():
            if not is_hidden(name, p.shape):
                others[name] = p
                continue
            g, m = grads[name], self.exp_avg[name]
            m += (1.0 - self.momentum) * (g - m)
            ahead = g + self.momentum * (m - g)
            p *= 1.0 - lr * self.weight_decay
            rows, cols = p.shape[:2]
            direction = orthogonal(ahead.reshape(rows, cols)).reshape(p.shape)
            p -= lr * LENGTH * sqrt(max(rows, cols)) * direction
        super().step(others, {name: grads[name] for name in others}, lr)


def is_hidden(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is a matrix (out, in) between features, also one of 1x1 filters."""
    is_matrix = name.endswith(".weight") and len(shape) in (2, 4) and prod(shape[2:]) == 1
    return is_matrix and not any(part.startswith(NEVER_ORTHOGONAL) for part in name.split("."))


def orthogonal(matrix: Array) -> Array:
    """About U V^T of the matrix U S V^T: five Newton-Schulz steps, and no decomposition.

    Each takes every singular value s to a s + b s^3 + c s^5 and keeps U and V. What begins at 0.002
    of the Frobenius norm or more ends between 0.68 and 1.21. Zero stays zero.
    """
    a, b, c = NEWTON_SCHULZ
    xp, (rows, cols) = array_module(matrix), matrix.shape
    x = matrix.T if rows > cols else matrix
    x = x / xp.maximum(xp.sqrt((x * x).sum()), 1e-7)
    for _ in range(ROUNDS):
        gram = x @ x.T  # (least, least)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if rows > cols else x
