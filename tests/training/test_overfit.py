"""A network whose gradients are right can learn a few images by heart."""

import os

import pytest

import miniconvit as mc
from miniconvit.data import load_dataset, normalize
from miniconvit.engine.objective import Classification
from miniconvit.engine.threads import Engine


@pytest.mark.full
@pytest.mark.skipif("MINICONVIT_DATA" not in os.environ, reason="needs CIFAR-10: MINICONVIT_DATA")
def test_64_images_of_cifar10_are_learned_by_heart():
    dataset = load_dataset("cifar10", download=False)
    images = normalize(dataset.train.images[:64], dataset.mean, dataset.std)
    labels = dataset.train.labels[:64]
    config = mc.VARIANTS["convit_micro32"]
    params = mc.init_params(config)
    optimizer = mc.AdamW(params, weight_decay=0.0)
    with Engine(Classification(config)) as engine:
        for step in range(400):
            loss, correct, grads = engine.loss_and_grads(
                lambda start, stop: (images[start:stop], labels[start:stop]), 64, params
            )
            print(f"step {step}: loss {loss:.5f}, {correct} of 64 right")
            if loss < 0.01:
                break
            optimizer.step(params, grads, mc.warmup_cosine(step, 400, 2e-3, 10))
    assert loss < 0.01
    assert correct == 64
