"""A layer of your own: write its two passes, have them checked, then break one and see it caught.

The layer is RMSNorm (Zhang, Sennrich 2019), a LayerNorm without mean and bias.
Run `python examples/your_own_layer.py`, which takes a second.
"""

import numpy as np

import miniconvit as mc


def rmsnorm_forward(x, weight, eps=1e-6):
    """y = weight * xhat,  xhat = x * rrms,  rrms = 1 / sqrt(mean(x^2) + eps).

    x (..., D), weight (D,). Returns y (..., D) and what backward needs.
    """
    rrms = 1 / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps)  # (..., 1)
    xhat = x * rrms  # (..., D)
    return xhat * weight, (xhat, rrms, weight)


def rmsnorm_backward(dy, cache):
    """With dxhat = weight * dy, x acts on y in two ways:

    (1) it stands in xhat = x * rrms:     dx = rrms * dxhat
    (2) it stands in rrms, by its square: dx = -rrms * xhat * mean(dxhat * xhat)
    """
    xhat, rrms, weight = cache
    dxhat = dy * weight  # (..., D)
    through_rrms = xhat * (dxhat * xhat).mean(axis=-1, keepdims=True)
    dx = rrms * (dxhat - through_rrms)  # (1) + (2)
    dweight = (dy * xhat).reshape(-1, len(weight)).sum(axis=0)  # (D,)
    return {"x": dx, "weight": dweight}


def broken_backward(dy, cache):
    """The same without (2): as if the size of x were a constant."""
    _, rrms, weight = cache
    return rmsnorm_backward(dy, cache) | {"x": rrms * dy * weight}


def main():
    """Prints both reports and returns them."""
    rng = np.random.default_rng(0)
    inputs = {"x": rng.standard_normal((2, 5, 8)), "weight": rng.standard_normal(8)}
    reports = []
    for backward in (rmsnorm_backward, broken_backward):
        reports.append(mc.check_gradients(rmsnorm_forward, backward, inputs, every_entry=True))
        print(f"{backward.__name__}:\n{reports[-1]}\n")
    print("The broken one forgot a path. The row of x says so, and weight is not to blame.")
    print("Its dx still points downhill: a training would have gone on, and hidden the bug.")
    return reports


if __name__ == "__main__":
    main()
