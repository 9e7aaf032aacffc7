"""Where the time of a training step goes on a CPU: each part of a block beside its matrix products.

    python benchmarks/cpu_profile.py [--model convit_tiny32] [--images 16]

One thread, and Numba: pip install 'miniconvit[fast]'. A part's floor is the time that its matrix
products alone would take at the rate of the widest of them, fc1's, measured in the same rounds;
what lies above it is element-wise passes and products too small for that rate. Other programs slow
both down alike: read the shares.
"""

import time
from statistics import median

import click
import numpy as np
from threadpoolctl import threadpool_limits

from miniconvit.config import VARIANTS
from miniconvit.engine.kernels.attention import attention_backward, attention_forward
from miniconvit.engine.kernels.float32 import Float32, passes
from miniconvit.engine.threads import keep_freed_memory

ROUNDS = 25


def drawn(rng, *shape):
    return (0.05 * rng.standard_normal(shape)).astype("float32")


def params_of(config, rng):
    """{part: parameters of one block}, random."""
    D, H, M = config.embed_dim, config.num_heads, config.hidden_dim
    proj = {"proj.weight": (D, D), "proj.bias": (D,)}
    shapes = {
        "gpsa": {"gating_param": (H,), "qk.weight": (2 * D, D), "v.weight": (D, D)}
        | proj
        | {"pos_proj.weight": (H, 3), "pos_proj.bias": (H,)},
        "mhsa": {"qkv.weight": (3 * D, D)} | proj,
        "mlp": {"fc1.weight": (M, D), "fc1.bias": (M,), "fc2.weight": (D, M), "fc2.bias": (D,)},
        "norm": {"weight": (D,), "bias": (D,)},
    }
    return {
        part: {name: drawn(rng, *shape) for name, shape in entries.items()}
        for part, entries in shapes.items()
    }


def calls_of(config, images, rng):
    """{name: function} of every part, forward before backward."""
    a, D, R = Float32(), config.embed_dim, images * config.num_patches
    x, dy, factor = 20 * drawn(rng, R, D), drawn(rng, R, D), np.ones(R, "float32")
    params, caches = params_of(config, rng), {}
    mlp, norm = params["mlp"], tuple(params["norm"].values())
    normed, statistics = a.norm(x, *norm)
    hidden, active = (drawn(rng, R, config.hidden_dim) for _ in range(2))

    def mlp_forward():
        active, slope = a.gelu(normed, mlp["fc1.weight"], mlp["fc1.bias"], True)
        a.branch(active, mlp["fc2.weight"], mlp["fc2.bias"], factor, x)
        caches["mlp"] = active, slope

    def mlp_backward():
        active, slope = caches["mlp"]
        dbranch, _ = a.scaled(dy, factor)
        dhidden, _ = a.back_gelu(dbranch, mlp["fc2.weight"], slope)
        return (
            a.back(dhidden, [mlp["fc1.weight"]]),
            a.outer(dhidden, normed),
            a.outer(dbranch, active),
        )

    calls = {
        "fc1 alone": lambda: np.matmul(x, mlp["fc1.weight"].T, out=hidden),
        "GELU alone, in MLP forward": lambda: passes.gelu(hidden, mlp["fc1.bias"], active),
        "layernorm forward": lambda: a.norm(x, *norm),
        "layernorm backward": lambda: a.norm_backward(dy, x, statistics, norm[0], dy),
        "mlp forward": mlp_forward,
        "mlp backward": mlp_backward,
    }
    for name in ("gpsa", "mhsa"):

        def forward(name=name):
            own = params[name]
            y, cache = attention_forward(a, normed, own, images, config.num_heads, config.grid)
            a.branch(y, own["proj.weight"], own["proj.bias"], factor, x)
            caches[name] = y, cache

        def backward(name=name):
            y, cache = caches[name]
            dbranch, _ = a.scaled(dy, factor)
            dattended = a.back_operand(dbranch, [params[name]["proj.weight"]])
            return attention_backward(a, dattended, cache), a.outer(dbranch, y)

        calls |= {f"{name} forward": forward, f"{name} backward": backward}
    return calls


def flops_of(config):
    """{name: floating-point operations of the matrix products, per token}."""
    D, M, N = config.embed_dim, config.hidden_dim, config.num_patches
    linears, maps = 8 * D * D, 2 * N * D  # four D x D; one product with an N x N map
    return {
        "fc1 alone": 2 * D * M,
        "mlp forward": 4 * D * M,
        "mlp backward": 8 * D * M,
        "gpsa forward": linears + 2 * maps,
        "gpsa backward": 2 * linears + 4 * maps,
        "mhsa forward": linears + 2 * maps,
        "mhsa backward": 2 * linears + 4 * maps,
    }


@click.command()
@click.option("--model", default="convit_tiny32", show_default=True, type=click.Choice(VARIANTS))
@click.option("--images", default=16, show_default=True, help="In a piece of the batch.")
def main(model, images):
    """Prints the table."""
    config = VARIANTS[model]
    keep_freed_memory()
    calls = calls_of(config, images, np.random.default_rng(0))
    seconds = {name: [] for name in calls}
    with threadpool_limits(1):
        for _ in range(ROUNDS):
            for name, call in calls.items():
                began = time.thread_time()
                call()
                seconds[name].append(time.thread_time() - began)
    took = {name: median(values) / images for name, values in seconds.items()}
    flops = {name: number * config.num_patches for name, number in flops_of(config).items()}
    rate = flops["fc1 alone"] / took["fc1 alone"]
    gpsa = min(config.local_up_to_layer, config.depth)
    times = {"gpsa": gpsa, "mhsa": config.depth - gpsa, "mlp": config.depth}
    times["layernorm"] = 2 * config.depth
    print(f"{model}, pieces of {images} images, fc1 at {rate / 1e9:.0f} GFLOP/s\n")
    print("| part | times | ms an image | its products alone | above them |")
    print("| --- " * 5 + "|")
    totals = np.zeros(2)
    for name, value in took.items():
        count, floor = times.get(name.split()[0], 0), flops.get(name, 0) / rate
        if count:
            totals += count * np.array([value, floor])
        row = [1e3 * value, 1e3 * floor, 1e3 * (value - floor)]
        print(f"| {name} | {count or ''} | {' | '.join(f'{cell:.3f}' for cell in row)} |")
    whole, floor = 1e3 * totals
    print(f"| all blocks | | {whole:.1f} | {floor:.1f} | {whole - floor:.1f} |")


if __name__ == "__main__":
    main()
