"""Engines run any objective: they know nothing of a model."""

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import pytest

from miniconvit.engine import gpu
from miniconvit.engine.gpu import DeviceEngine
from miniconvit.engine.processes import ProcessEngine, can_fork
from miniconvit.engine.threads import Engine


@dataclass(frozen=True)
class Regression:
    """y = x W + b where a mask is 1: three arrays a batch, three numbers, b is not trained."""

    scale: float

    shapes = {"W": (6, 3), "b": (3,)}  # noqa: RUF012
    rows, inputs, output = 128, ((6,), (3,), (3,)), (3,)

    def step(self, batch, params, share, first, seed, step, blocks):
        x, y, mask = batch
        error = mask * (x @ params["W"] + params["b"] - y)
        loss = (error**2).sum(axis=1).mean()
        grads = {"W": (2 * share * self.scale / len(x)) * (x.T @ error)}
        places = np.int64((first + seed + step) * len(x))
        return (share * self.scale * loss, mask.sum(), places), grads

    def answer(self, batch, params, blocks):
        return batch[0] @ params["W"] + params["b"]


ENGINES = {
    "one": lambda objective: Engine(objective, 1),
    "threads": lambda objective: Engine(objective, 3),
    "processes": lambda objective: ProcessEngine(objective, 2),
    "device": lambda objective: DeviceEngine(objective, np),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_runs_an_objective_of_its_own(kind, monkeypatch):
    """Against numpy.linalg's least squares: the loss there, its zero gradient, and one elsewhere by
    central differences."""
    if kind == "processes" and not can_fork():
        pytest.skip("workers are processes on Linux alone")
    monkeypatch.setattr(gpu, "kernels", None)  # NumPy, as the device's module, compiles none
    rng = np.random.default_rng(0)
    x, b = rng.normal(size=(50, 6)), rng.normal(size=3)
    y, mask = rng.normal(size=(50, 3)), np.ones((50, 3))
    W, residuals, *_ = np.linalg.lstsq(x, y - b)

    def load(start, stop):
        return x[start:stop], y[start:stop], mask[start:stop]

    engine = ENGINES[kind](Regression(0.5))
    loss, count, places, grads = engine.loss_and_grads(load, 50, {"W": W, "b": b}, 1, 1)
    assert loss == pytest.approx(0.5 * residuals.sum() / 50, rel=1e-12)
    assert count == 150 and list(grads) == ["W"]
    np.testing.assert_allclose(grads["W"], 0, atol=1e-12)
    if kind != "device":  # which has a single piece
        assert places > 2 * 50
    direction, h = rng.normal(size=W.shape), 1e-3
    near = [
        engine.loss_and_grads(load, 50, {"W": W + k * direction, "b": b})[0]
        for k in (1 + h, 1 - h)
    ]  # fmt: skip
    grads = engine.loss_and_grads(load, 50, {"W": W + direction, "b": b})[-1]
    assert (near[0] - near[1]) / (2 * h) == pytest.approx((grads["W"] * direction).sum(), rel=1e-9)
    if kind != "device":
        answers = engine.logits(lambda a, b: x[a:b], 50, {"W": W, "b": b})
        np.testing.assert_allclose(answers, x @ W + b, rtol=1e-12)
    with suppress(AttributeError):  # NumPy, as the device's module, has no memory pool
        engine.close()
