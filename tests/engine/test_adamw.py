"""AdamW in one pass over memory beside the lesson's in float64, and where the lesson is called."""

from copy import deepcopy

import numpy as np
import pytest
from with_numba import skip_without_numba

from miniconvit import AdamW, UserError

skip_without_numba()

from miniconvit.engine.kernels.adamw import adamw_step  # noqa: E402

SHAPES = {
    "patch_embed.proj.weight": (7, 3, 2, 4),
    "pos_embed": (1, 5, 7),
    "cls_token": (1, 1, 7),
    "norm.bias": (7,),
    "scale": (),
    "head.weight": (33, 7),
    "nothing": (0, 4),
}


def drawn(seed, dtype="float32", shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def state(params, optimizer):
    return deepcopy((params, optimizer.exp_avg, optimizer.exp_avg_sq, optimizer.step_count))


def test_seven_steps_are_those_of_float64():
    """With rates, decay and moments of any size, given and not."""
    params, settings = drawn(0), (0.02, 0.3, (0.8, 0.95), 1e-3)
    true = {name: p.astype("float64") for name, p in params.items()}
    mine, lesson = AdamW(params, *settings), AdamW(true, *settings)
    for step in range(7):
        grads = {name: 10.0 ** (step - 4) * g for name, g in drawn(1 + step).items()}
        grads = {name: np.asarray(g, "float32") for name, g in grads.items()}
        lr = [None, 0.5, 1e-3][step % 3]
        adamw_step(mine, params, grads, lr)
        lesson.step(true, {name: g.astype("float64") for name, g in grads.items()}, lr)
        for found, expected in zip(state(params, mine)[:3], state(true, lesson)[:3], strict=True):
            for name, value in expected.items():
                assert found[name].dtype == "float32" and found[name].shape == SHAPES[name]
                gap = np.linalg.norm(found[name] - value)
                assert gap <= 1e-6 * np.linalg.norm(value), (step, name)
    assert mine.step_count == 7


def test_where_parameters_lie_is_where_they_stay():
    params = drawn(0)
    kept, optimizer = dict(params), AdamW(params)
    moments = dict(optimizer.exp_avg), dict(optimizer.exp_avg_sq)
    adamw_step(optimizer, params, drawn(1))
    assert all(params[name] is kept[name] for name in SHAPES)
    for now, before in zip((optimizer.exp_avg, optimizer.exp_avg_sq), moments, strict=True):
        assert all(now[name] is before[name] for name in SHAPES)


def test_a_gradient_that_is_not_finite_is_not_swallowed():
    for value in (np.nan, np.inf):
        params, grads = drawn(0), drawn(1)
        grads["head.weight"][3, 4] = value
        optimizer = AdamW(params)
        adamw_step(optimizer, params, grads)
        assert not np.isfinite(params["head.weight"][3, 4])
        assert not np.isfinite(optimizer.exp_avg["head.weight"][3, 4])
        params["head.weight"][3, 4] = 0.0
        assert all(np.isfinite(p).all() for p in params.values())


class Other(AdamW):
    """An optimizer of somebody else."""

    def step(self, params, grads, lr=None):
        super().step(params, grads, 2 * (lr or self.lr))


def strided(arrays):
    return {name: np.moveaxis(x.copy(), 0, -1) if x.ndim else x for name, x in arrays.items()}


def read_only(arrays):
    for x in arrays.values():
        x.flags.writeable = False
    return arrays


def with_statistics(dtype="float32"):
    """Parameters and gradients of a network with batch normalisation."""
    shapes = {"norm.weight": (5,), "norm.running_mean": (5,), "norm.running_var": (5,)}
    return drawn(0, dtype, shapes), drawn(1, dtype, shapes)


@pytest.mark.parametrize(
    ("params", "grads", "kind"),
    [
        (drawn(0, "float64"), drawn(1, "float64"), AdamW),
        (drawn(0), drawn(1, "float64"), AdamW),
        (drawn(0, ">f4"), drawn(1), AdamW),
        (strided(drawn(0)), strided(drawn(1)), AdamW),
        (drawn(0), read_only(drawn(1)), AdamW),
        (*with_statistics(), AdamW),
        (drawn(0), drawn(1), Other),
    ],
    ids=[
        "float64",
        "gradients in float64",
        "big-endian",
        "strided",
        "read-only",
        "statistics",
        "other",
    ],
)
def test_anything_else_is_the_lessons(params, grads, kind):
    """To the bit."""
    expected = deepcopy(params)
    mine, lesson = kind(params, weight_decay=0.5), kind(expected, weight_decay=0.5)
    for _ in range(2):
        adamw_step(mine, params, grads, 0.1)
        lesson.step(expected, grads, 0.1)
    for found, value in zip(state(params, mine), state(expected, lesson), strict=True):
        np.testing.assert_equal(found, value)


@pytest.mark.parametrize("wrong", ["missing", "shape"])
def test_what_is_refused_changes_nothing(wrong):
    params, grads = drawn(0), drawn(1)
    optimizer = AdamW(params)
    before = state(params, optimizer)
    if wrong == "missing":
        del grads["head.weight"]
    else:
        grads["head.weight"] = grads["head.weight"].T.copy()
    with pytest.raises(UserError, match=r"head\.weight"):
        adamw_step(optimizer, params, grads)
    np.testing.assert_equal(state(params, optimizer), before)
