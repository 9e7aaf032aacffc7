#!/usr/bin/env bash
# timm 1.0.31's ConViT is compiled twice by torch.compile, in the first call and in the second.
#
# What one would guess: calls of one shape compile a model once, as they do timm's DeiT. But GPSA's
# layers make the offsets of their patches in the first forward pass. They keep them as an attribute,
# which was None before. So what was compiled does not hold in the second call. Whoever times a step
# after one call to warm up times a compilation. A model that has run once before torch.compile is
# compiled once. This installs torch and timm in a temporary folder (5 GB), counts the compilations
# with a backend that only counts, and fails if that has changed.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

cat > "$work/look.py" <<'P'
import sys

import timm
import torch

compiled = []


def count(graph, inputs):
    compiled.append(graph)
    return graph.forward


def after_each_call(name, runs_before):
    """How often the model has been compiled after each of three calls."""
    torch._dynamo.reset()
    compiled.clear()
    model, images, counts = timm.create_model(name).eval(), torch.zeros(2, 3, 224, 224), []
    with torch.no_grad():
        for _ in range(runs_before):
            model(images)
        model = torch.compile(model, backend=count)
        for _ in range(3):
            model(images)
            counts.append(len(compiled))
    return counts


found = {}
for name, runs_before in (("deit_tiny_patch16_224", 0), ("convit_tiny", 0), ("convit_tiny", 1)):
    found[name, runs_before] = after_each_call(name, runs_before)
    print(f"{name}, run {runs_before} times before: compilations {found[name, runs_before]}")
sys.exit(list(found.values()) != [[1, 1, 1], [1, 2, 2], [1, 1, 1]])
P

python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q "torch==2.14.1" "torchvision==0.29.1" "timm==1.0.31" "numpy==2.4.6"
"$work/venv/bin/python" "$work/look.py"
echo "as described"
