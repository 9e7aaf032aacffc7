"""miniconvit against timm's ConViT: the values in golden/timm.npz, with NumPy alone.

`golden/make_timm_golden.py` writes that file and says what is in it.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from golden_cases import read_parts

import miniconvit as mc

GOLDEN = Path(__file__).parent / "golden" / "timm.npz"


def load_json(key):
    with np.load(GOLDEN) as file:
        return json.loads(file[key].item())


def load_case(name):
    """The stored arrays of one case in float64, labels aside; param and grad are dicts by name."""
    parts = read_parts(GOLDEN, name, "param", "grad", "steps")
    for inside in (parts, parts["param"], parts["grad"], parts["steps"]):
        halves = {key: value for key, value in inside.items() if is_half(value)}
        inside |= {key: value.astype(np.float64) for key, value in halves.items()}
    parts["config"] = mc.ConViTConfig(**json.loads(parts["config"].item()))
    return SimpleNamespace(**parts)


def is_half(value):
    return isinstance(value, np.ndarray) and value.dtype == np.float16


@pytest.fixture(scope="module", params=load_json("cases"))
def case(request):
    return load_case(request.param)


@pytest.fixture(scope="module", params=["four_heads", "nine_heads", "all_gpsa"])
def adamw_case(request):
    return load_case(request.param)


def run(case, params, images, labels):
    """Logits, loss and every gradient of one batch."""
    logits, cache = mc.convit_forward(images, params, case.config)
    label_smoothing = float(case.label_smoothing)
    loss, loss_cache = mc.cross_entropy_forward(logits, labels, label_smoothing=label_smoothing)
    return logits, loss, mc.convit_backward(mc.cross_entropy_backward(1.0, loss_cache), cache)


def relative_error(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def zero_gradients(case):
    """Parameters that no logit depends on: the positional bias, and a class token never used."""
    unused = case.config.local_up_to_layer >= case.config.depth
    return {k for k in case.param if k.endswith("pos_proj.bias") or (unused and k == "cls_token")}


def test_names_order_and_shapes_are_those_of_timm_s_state_dict(case):
    theirs = [(name, value.shape) for name, value in case.param.items()]
    assert [(name, tuple(s)) for name, s in mc.param_shapes(case.config).items()] == theirs


def test_logits_and_loss(case):
    logits, loss, _ = run(case, case.param, case.images, case.labels)
    assert logits.shape == case.logits.shape
    assert relative_error(logits, case.logits) <= 1e-10
    assert relative_error(loss, case.loss) <= 1e-10


def test_every_named_gradient(case):
    grads = run(case, case.param, case.images, case.labels)[2]
    assert {k: v.shape for k, v in grads.items()} == {k: v.shape for k, v in case.grad.items()}
    zeros = zero_gradients(case)
    errors = {k: relative_error(grads[k], case.grad[k]) for k in grads if k not in zeros}
    assert {k: error for k, error in errors.items() if not error <= 1e-10} == {}
    # timm finds rounding noise where the exact gradient is 0; miniconvit has the 0.
    largest = max(np.linalg.norm(grad) for grad in case.grad.values())
    assert {k for k in zeros if np.linalg.norm(case.grad[k]) > 1e-14 * largest} == set()
    assert {k for k in zeros if grads[k].any()} == set()


def test_ten_adamw_steps(adamw_case):
    """The loss before each step, each on its own batch, and every tensor's norm after the last."""
    case = adamw_case
    params = {name: value.copy() for name, value in case.param.items()}
    optimizer = mc.AdamW(params, **json.loads(case.adamw.item()))
    losses = []
    for images, labels in zip(case.steps["images"], case.steps["labels"], strict=True):
        _, loss, grads = run(case, params, images, labels)
        optimizer.step(params, grads)
        losses.append(loss)
    norms = [np.linalg.norm(value) for value in params.values()]
    assert len(losses) == 10
    np.testing.assert_allclose(losses, case.steps["losses"], rtol=1e-9, atol=0)
    np.testing.assert_allclose(norms, case.steps["norms"], rtol=1e-9, atol=0)
