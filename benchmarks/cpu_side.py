"""One side of a comparison, ours or timm on PyTorch, in a process of its own: what cpu.py calls.

    python benchmarks/cpu_side.py SIDE tiny32|tiny|small BATCH train|infer THREADS

Makes a step for every line that it is given and prints its seconds; after the last one, a JSON
object with its peak memory. Random images, AdamW. SIDE is one of

    ours, twin, convit, compiled, deit   in float32
    ours-bf16                            our ConViT with --precision bf16
    autocast                             timm's ConViT under torch.autocast, in bf16
    onednn                               timm's ConViT in float32, its products in oneDNN's bf16
    matmul                               a large product in NumPy
"""

import json
import sys
import time
from contextlib import contextmanager, nullcontext

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

    torch.set_flush_denormal(True)  # first of all: PyTorch's threads inherit it from this one
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if kind == "onednn":  # https://docs.pytorch.org/docs/stable/notes/mkldnn.html
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    precision = nullcontext()
    if kind == "autocast":
        precision = torch.autocast("cpu", torch.bfloat16)
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
            with torch.no_grad(), precision:
                forward(images)
        else:
            optimizer.zero_grad()
            with precision:
                loss = loss_of(forward(images), labels)
            loss.backward()
            optimizer.step()
        return time.perf_counter() - began

    versions = {"torch": torch.__version__, "timm": timm.__version__}
    yield step, lambda: {"peak_memory_mb": peak_memory_mb(), "versions": versions}


def main(who, variant, batch, mode, threads):
    """Steps until standard input ends."""
    batch, threads = int(batch), int(threads)
    if who in ("ours", "ours-bf16", "twin"):
        config = VARIANTS[f"{'vit' if who == 'twin' else 'convit'}_{variant}"]
        precision = "bf16" if who == "ours-bf16" else "float32"
        side = stepper(config, batch, mode == "infer", threads, precision=precision)
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
