"""One side of a comparison, ours or timm on PyTorch, in a process of its own: what cpu.py calls.

    python benchmarks/cpu_side.py ours|twin|convit|compiled|deit|matmul tiny32|tiny|small BATCH \
        train|infer THREADS

Makes a step for every line that it is given and prints its seconds; after the last one, a JSON
object with its peak memory. Random images, float32, AdamW.
"""

import json
import sys
import time
from contextlib import contextmanager

import numpy as np

from miniconvit.config import VARIANTS
from miniconvit.engine.speed import peak_memory_mb, stepper

DEIT_WIDTHS = {"tiny32": 192, "tiny": 192, "small": 384}


MATMUL_SIZE = 3072
MATMUL_GFLOP = 2e-9 * MATMUL_SIZE**3


@contextmanager
def matmul():
    """As miniconvit.engine.speed.stepper: a large float32 product on all threads."""
    a = np.ones((MATMUL_SIZE, MATMUL_SIZE), "float32")
    out = np.empty_like(a)

    def step():
        began = time.perf_counter()
        np.matmul(a, a, out=out)
        return time.perf_counter() - began

    yield step, dict


@contextmanager
def peer(kind, variant, batch, mode, threads):
    """As miniconvit.engine.speed.stepper, of a model of timm's."""
    import timm
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = VARIANTS[f"convit_{variant}"]
    size = {"img_size": config.image[0], "patch_size": config.patch[0]}
    size |= {"num_classes": config.num_classes, "depth": config.depth}
    if kind == "deit":
        width = DEIT_WIDTHS[variant]
        model = timm.models.vision_transformer.VisionTransformer(
            embed_dim=width, num_heads=width // 64, **size
        )
    else:
        heads = config.num_heads
        model = timm.models.convit.ConVit(
            embed_dim=config.embed_dim // heads, num_heads=heads, mlp_ratio=config.mlp_ratio,
            local_up_to_layer=config.local_up_to_layer, qkv_bias=config.qkv_bias, **size,
        )  # fmt: skip
    images = torch.randn(batch, config.in_chans, *config.image)
    labels = torch.randint(config.num_classes, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of = torch.nn.CrossEntropyLoss()
    model.train(mode == "train")
    forward = torch.compile(model) if kind == "compiled" else model

    def step():
        began = time.perf_counter()
        if mode == "infer":
            with torch.no_grad():
                forward(images)
        else:
            optimizer.zero_grad()
            loss_of(forward(images), labels).backward()
            optimizer.step()
        return time.perf_counter() - began

    versions = {"torch": torch.__version__, "timm": timm.__version__}
    yield step, lambda: {"peak_memory_mb": peak_memory_mb(), "versions": versions}


def main(who, variant, batch, mode, threads):
    """Steps until standard input ends."""
    batch, threads = int(batch), int(threads)
    if who in ("ours", "twin"):
        config = VARIANTS[f"{'convit' if who == 'ours' else 'vit'}_{variant}"]
        side = stepper(config, batch, mode == "infer", threads)
    elif who == "matmul":
        side = matmul()
    else:
        side = peer(who, variant, batch, mode, threads)
    with side as (step, facts):
        for _ in sys.stdin:
            print(step(), flush=True)
        print(json.dumps(facts()))


if __name__ == "__main__":
    main(*sys.argv[1:])
