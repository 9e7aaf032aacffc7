"""What the CPU computes blocks with: kernels beside the right Numba, the lesson's layers else."""

from importlib.metadata import PackageNotFoundError

import numpy as np
import pytest
from with_numba import needs_numba

import miniconvit as mc
from miniconvit import layers, system
from miniconvit.engine import classification, make_engine
from miniconvit.engine.cpu import cpu_blocks, of_one_call
from miniconvit.engine.objective import Classification
from miniconvit.engine.processes import ProcessEngine, can_fork
from miniconvit.engine.threads import Engine
from miniconvit.system import numba_version


@pytest.fixture
def numba_is(monkeypatch):
    """A function that makes this the version of Numba that is installed, or takes it away."""

    def make(found):
        def version(name):
            assert name == "numba"
            if found is None:
                raise PackageNotFoundError(name)
            return found

        monkeypatch.setattr(system, "version", version)

    return make


@pytest.mark.parametrize("found", [None, "0.61.2", "0.67.9", "0.69.0", "0.69.0rc1", "1.0", "0.6"])
def test_another_version_or_none_gives_the_layers(numba_is, found):
    numba_is(found)
    assert numba_version() is None
    assert cpu_blocks() is layers


@pytest.mark.parametrize("found", ["0.68.0", "0.68.1", "0.68.10", "0.68.0rc1"])
def test_the_right_versions(numba_is, found):
    numba_is(found)
    assert numba_version() == found


@needs_numba
def test_blocks_of_one_call():
    """Kernels begin anew with every call, as the parameters may have changed; layers know none."""
    blocks = cpu_blocks()
    assert blocks is not layers
    for keep in (True, False):
        fresh = of_one_call(blocks, keep)
        assert type(fresh) is type(blocks) and fresh is not blocks
        assert of_one_call(layers, keep) is layers
        _, slope = fresh.gelu_pair[0](np.ones((2, 3), "float32"))
        assert (slope is not None) == keep


@needs_numba
@pytest.mark.parametrize("workers", [1, 2])
def test_engines_take_them_by_themselves(numba_is, workers):
    """The kernels' bits are others than the layers', which an engine can be told to take."""
    config = mc.ConViTConfig(16, 2, 3, 5, 24, 2, 4, local_up_to_layer=1)
    params, rng = mc.init_params(config), np.random.default_rng(0)
    images = rng.standard_normal((40, 3, 16, 16), dtype="float32")

    def logits():
        with make_engine(classification(config), np, workers) as engine:
            return engine.logits(lambda start, stop: images[start:stop], len(images), params)

    fast = logits()
    plain, _ = mc.convit_forward(images, params, config)
    numba_is(None)
    slow = logits()
    scale = np.linalg.norm(plain)
    assert not np.array_equal(fast, slow)
    assert np.linalg.norm(fast - plain) <= 1e-5 * scale
    assert np.linalg.norm(slow - plain) <= 1e-6 * scale


class Numbered:
    """Blocks that know how often they have begun anew, each process by itself."""

    def __init__(self, number=0, keep=None):
        self.number, self.keep = number, keep

    def fresh(self, keep=True):
        self.number += 1
        return Numbered(self.number, keep)


class Telling(Classification):
    """Its numbers tell which blocks it was given."""

    def step(self, batch, params, share, first, seed, step, blocks):
        told = np.float64(share * (10 * blocks.number + blocks.keep))
        return (told, np.int64(0)), {name: np.zeros_like(p) for name, p in params.items()}

    def answer(self, batch, params, blocks):
        told = 10 * blocks.number + blocks.keep
        return np.full((len(batch[0]), *self.output), told, "float32")


@pytest.mark.parametrize("kind", [Engine, ProcessEngine])
@pytest.mark.parametrize("workers", [1, 2])
def test_every_call_has_blocks_of_its_own(kind, workers):
    """All its pieces share them, in each worker; after answers nothing can go back."""
    if kind is ProcessEngine and not can_fork():
        pytest.skip("workers are processes on Linux alone")
    config = mc.ConViTConfig(32, 4, 3, 5, 12, 1, 4, local_up_to_layer=1)
    params, images = mc.init_params(config), np.zeros((128, 3, 32, 32), "float32")

    def load(start, stop):
        return images[start:stop], np.zeros(stop - start, int)

    with kind(Telling(config), workers, Numbered()) as engine:
        assert len(engine.pieces(128)) >= 8
        for call in (1, 2):
            assert engine.loss_and_grads(load, 128, params)[0] == pytest.approx(10 * call + 1)
        for call in (3, 4):
            assert np.unique(engine.logits(load, 128, params)).tolist() == [10 * call]
