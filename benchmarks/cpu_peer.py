"""One measurement of the peer, timm on PyTorch, in a process of its own: what cpu.py calls.

    python benchmarks/cpu_peer.py convit|deit IMG_SIZE PATCH_SIZE tiny|small BATCH train|infer \
        SECONDS THREADS eager|compile

Prints one JSON object like that of `miniconvit bench --json`. Random images, float32, AdamW, the
same warm-up; steps are repeated for SECONDS, at least two.
"""

import json
import sys
import time
from statistics import median

import timm
import torch

from miniconvit.speed import WARM_UP, peak_memory_mb

HEADS = {("convit", "tiny"): 4, ("convit", "small"): 9}
WIDTHS = {"tiny": 192, "small": 384}  # of DeiT


def build(kind, size, img_size, patch_size, classes):
    """timm's model of that kind, at any image size."""
    if kind == "convit":
        heads = HEADS[kind, size]
        return timm.models.convit.ConVit(
            img_size=img_size, patch_size=patch_size, num_classes=classes, embed_dim=48,
            num_heads=heads, depth=12, mlp_ratio=4.0, local_up_to_layer=10, qkv_bias=False,
        )  # fmt: skip
    width = WIDTHS[size]
    return timm.models.vision_transformer.VisionTransformer(
        img_size=img_size, patch_size=patch_size, num_classes=classes, embed_dim=width,
        depth=12, num_heads=width // 64,
    )  # fmt: skip


def main(kind, img_size, patch_size, size, batch, mode, seconds, threads, how):
    """Measures and prints."""
    torch.set_num_threads(int(threads))
    torch.manual_seed(0)
    img_size, patch_size, batch = int(img_size), int(patch_size), int(batch)
    classes = 10 if img_size == 32 else 1000
    model = build(kind, size, img_size, patch_size, classes)
    images = torch.randn(batch, 3, img_size, img_size)
    labels = torch.randint(classes, (batch,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loss_of = torch.nn.CrossEntropyLoss()
    model.train(mode == "train")
    forward = torch.compile(model) if how == "compile" else model

    def step():
        if mode == "infer":
            with torch.no_grad():
                forward(images)
            return
        optimizer.zero_grad()
        loss_of(forward(images), labels).backward()
        optimizer.step()

    taken = []
    while len(taken) < WARM_UP + 2 or sum(taken[WARM_UP:]) < float(seconds):
        began = time.perf_counter()
        step()
        taken.append(time.perf_counter() - began)
    counted = taken[WARM_UP:]
    print(json.dumps({
        "images_per_second": batch / median(counted),
        "step_ms_median": 1000 * median(counted),
        "peak_memory_mb": peak_memory_mb(),
        "step_ms": [1000 * s for s in counted],
        "warm_up_seconds": sum(taken[:WARM_UP]),
        "versions": {"torch": torch.__version__, "timm": timm.__version__},
    }))  # fmt: skip


if __name__ == "__main__":
    main(*sys.argv[1:])
