"""Writes neighbours.npz: what torch's autograd finds for the papers beside ConViT, in float64.

The tests read the file with NumPy alone. Making it again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_neighbours_golden.py

Everything here is composed anew of torch's own functions. Its keys:

    versions                JSON: {"torch": ..., "numpy": ...}
    CASE/in/NAME            an input of the pair CASE
    CASE/y, CASE/dy         its output, and a random weight of it
    CASE/grad/NAME          the gradient of sum(y * dy)
    lipschitz/SEED          (layer, ray, scale): 2-norms of Jacobians, in the experiment's order
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import from_numpy as tensor

from miniconvit.experiments import lipschitz

OUTPUT = Path(__file__).with_name("neighbours.npz")
HEADS = 3


def heads_of(weight, num_heads):
    """(D, D) as (H, d, D): the rows of each head."""
    return weight.reshape(num_heads, -1, weight.shape[1])


def distances(q):
    """-|q_i - q_j|^2 / sqrt d, by differences."""
    return -(q[..., :, None, :] - q[..., None, :, :]).pow(2).sum(-1) / q.shape[-1] ** 0.5


def l2_attention(q, v):
    return distances(q).softmax(-1) @ v


def by_distance(x, p, num_heads, through_queries):
    """Kim's layer as their equation 7 has it, X A_h in full; or with values X, as in ViTGAN."""
    query, value = p["qv.weight"].chunk(2)
    outputs = []
    for Wq, Wv in zip(heads_of(query, num_heads), heads_of(value, num_heads), strict=True):
        P = distances(x @ Wq.T).softmax(-1)
        seen = x @ (Wq.T @ Wq / len(Wq) ** 0.5) if through_queries else x
        outputs.append(P @ seen @ Wv.T)
    return torch.cat(outputs, -1) @ p["proj.weight"].T + p["proj.bias"]


def dot_product(x, p, num_heads):
    q, k, v = (heads_of(w, num_heads) for w in p["qkv.weight"].chunk(3))
    q, k, v = (torch.einsum("bnc,hdc->bhnd", x, w) for w in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2) @ p["proj.weight"].T + p["proj.bias"]


def attention_case(rng, through_queries):
    D = 4 * HEADS
    shapes = {"x": (2, 5, D), "qv.weight": (2 * D, D), "proj.weight": (D, D), "proj.bias": (D,)}
    inputs = {name: rng.standard_normal(shape) * 0.4 for name, shape in shapes.items()}
    return inputs, lambda x, **p: by_distance(x, p, HEADS, through_queries)


def make_case(name, rng, inputs, function):
    """Everything that the file holds about one pair, by key."""
    leaves = {key: tensor(value).requires_grad_() for key, value in inputs.items()}
    y = function(**leaves)
    dy = rng.standard_normal(y.shape)
    (y * tensor(dy)).sum().backward()
    case = {"y": y.detach().numpy(), "dy": dy}
    case |= {f"in/{key}": value for key, value in inputs.items()}
    case |= {f"grad/{key}": leaf.grad.numpy() for key, leaf in leaves.items()}
    return {f"{name}/{key}": value for key, value in case.items()}


def jacobian_norms(seed):
    """(layer, ray, scale), at the experiment's weights and inputs."""
    params, rays = lipschitz.draw(seed)
    functions = {
        "dot": dot_product,
        "tied": lambda x, p, heads: by_distance(x, p, heads, False),
        "kim": lambda x, p, heads: by_distance(x, p, heads, True),
    }
    norms = np.zeros((len(functions), len(rays), len(lipschitz.SCALES)))
    for i, (layer, function) in enumerate(functions.items()):
        p = {name: tensor(value) for name, value in params[layer].items()}
        for j, (start, direction) in enumerate(rays.values()):
            for k, t in enumerate(lipschitz.SCALES):
                x = tensor(start + t * direction)
                jacobian = torch.autograd.functional.jacobian(
                    lambda x, f=function, p=p: f(x, p, lipschitz.HEADS), x
                )
                norms[i, j, k] = torch.linalg.matrix_norm(jacobian.reshape(x.numel(), -1), 2)
    return norms


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    cases = {
        "l2_attention": (
            {name: rng.standard_normal((2, HEADS, 5, 4)) for name in ("q", "v")},
            l2_attention,
        ),
        "tied_attention": attention_case(rng, False),
        "kim_attention": attention_case(rng, True),
        "spectral": (
            {"weight": rng.standard_normal((5, 7))},
            lambda weight: weight / torch.linalg.matrix_norm(weight, 2),
        ),
    }
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    content = {"versions": json.dumps(versions)}
    for name, (inputs, function) in cases.items():
        content |= make_case(name, rng, inputs, function)
    content |= {f"lipschitz/{seed}": jacobian_norms(seed) for seed in range(3)}
    np.savez_compressed(OUTPUT, **content)
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
