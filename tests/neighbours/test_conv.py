"""The convolution kit: autograd's numbers, and statistics that an optimizer carries."""

import numpy as np
import pytest
from golden_cases import GOLDEN, assert_equal, load_case, read_parts

from miniconvit import neighbours
from miniconvit.errors import UserError
from miniconvit.neighbours import batchnorm_backward, batchnorm_forward, conv_backward, conv_forward
from miniconvit.optim import AdamW, clip_grad_norm


@pytest.mark.parametrize("k", [3, 2, 5])
@pytest.mark.parametrize("name", ["conv", "depthwise"])
def test_filters_equal_autograd(name, k):
    case = load_case(f"{name}_{k}")
    forward, backward = (getattr(neighbours, f"{name}_{way}") for way in ("forward", "backward"))
    y, cache = forward(**case.inputs, stride=int(case.stride), padding=int(case.padding))
    assert_equal(y, case.y)
    for grad, expected in zip(backward(case.dy, cache), case.grad.values(), strict=True):
        assert_equal(grad, expected)


def test_a_convolution_without_bias_and_without_dx():
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((2, 5, 4, 3)), rng.standard_normal((6, 3, 3, 3))
    y, cache = conv_forward(x, weight, padding=1)
    dx, dweight, dbias = conv_backward(y, cache)
    assert dx.shape == x.shape and dbias is None
    nothing, again, _ = conv_backward(y, cache, need_dx=False)
    assert nothing is None and np.array_equal(dweight, again)


def batchnorm_case():
    parts = read_parts(GOLDEN, "batchnorm", "in", "grad", "after")
    x = parts["in"].pop("x")
    return x, parts["in"], parts


def test_batchnorm_equals_autograd_in_training_and_in_evaluation():
    x, params, case = batchnorm_case()
    y, cache = batchnorm_forward(x, params, True)
    assert_equal(y, case["y"])
    dx, grads = batchnorm_backward(case["dy"], cache)
    for name, grad in {"x": dx, "weight": grads["weight"], "bias": grads["bias"]}.items():
        assert_equal(grad, case["grad"][name])
    assert_equal(batchnorm_forward(x, params, False)[0], case["evaluated"])


def test_a_step_of_adamw_moves_running_statistics_as_torch_does():
    """At any learning rate and decay, with moments that stay 0."""
    x, params, case = batchnorm_case()
    _, cache = batchnorm_forward(x, params, True)
    _, grads = batchnorm_backward(case["dy"], cache)
    optimizer = AdamW(params, lr=0.7, weight_decay=0.3)
    clip_grad_norm(grads, 1e-3)
    optimizer.step(params, grads)
    for name, expected in case["after"].items():
        assert_equal(params[name], expected)
        assert not optimizer.exp_avg[name].any() and not optimizer.exp_avg_sq[name].any()


def test_clipping_does_not_see_running_statistics():
    grads = {"bn.weight": np.full(4, 3.0), "bn.running_var": np.full(4, 100.0)}
    assert clip_grad_norm(grads, 1.0) == 6.0
    assert np.array_equal(grads["bn.weight"], np.full(4, 0.5))
    assert np.array_equal(grads["bn.running_var"], np.full(4, 100.0))
    assert clip_grad_norm({"bn.running_var": np.ones(4)}, 1.0) == 0.0


def test_one_value_of_each_channel_is_refused():
    params = {name: np.ones(3) for name in ("weight", "bias", "running_mean", "running_var")}
    with pytest.raises(UserError, match="two values of each channel"):
        batchnorm_forward(np.ones((1, 1, 1, 3)), params, True)
    batchnorm_forward(np.ones((1, 1, 1, 3)), params, False)
