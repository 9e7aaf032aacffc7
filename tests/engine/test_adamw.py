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


def in_columns(x):
    """The same numbers, not contiguous."""
    return np.asfortranarray(x) if x.ndim > 1 else np.repeat(x, 2)[::2] if x.ndim else x


def read_only(x):
    x = x.copy()
    x.flags.writeable = False
    return x


@pytest.mark.parametrize("change", [np.copy, in_columns, read_only])
def test_a_parameter_has_the_same_bits_in_any_share(change):
    """Alone or with all others, running statistics among them, and however its memory lies: other
    numbers of workers have other shares."""
    shapes = SHAPES | {"norm.running_mean": (7,), "norm.running_var": (7,)}
    together, grads = drawn(0, shapes=shapes), drawn(1, shapes=shapes)
    all_of_them = AdamW(together, weight_decay=0.5)
    alone = drawn(0, shapes=shapes)
    if change is in_columns:
        alone = {name: change(p) for name, p in alone.items()}
    for _ in range(2):
        adamw_step(all_of_them, together, grads, 0.1)
    for name, p in alone.items():
        one = AdamW({name: p}, weight_decay=0.5)
        for _ in range(2):
            adamw_step(one, {name: p}, {name: change(grads[name])}, 0.1)
        np.testing.assert_array_equal(p, together[name], err_msg=name)
        for found, whole in (
            (one.exp_avg, all_of_them.exp_avg),
            (one.exp_avg_sq, all_of_them.exp_avg_sq),
        ):
            np.testing.assert_array_equal(found[name], whole[name], err_msg=name)


def test_running_statistics_follow_what_they_are_off_by():
    params = {"norm.running_mean": np.ones(3, "float32")}
    adamw_step(AdamW(params), params, {"norm.running_mean": np.ones(3, "float32")}, 99.0)
    np.testing.assert_allclose(params["norm.running_mean"], 0.9, rtol=1e-6)


@pytest.mark.parametrize(
    ("params", "grads", "kind"),
    [
        (drawn(0, "float64"), drawn(1, "float64"), AdamW),
        (drawn(0), drawn(1, "float64"), AdamW),
        (drawn(0, ">f4"), drawn(1), AdamW),
        (drawn(0), drawn(1), Other),
    ],
    ids=["float64", "gradients in float64", "big-endian", "other"],
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
