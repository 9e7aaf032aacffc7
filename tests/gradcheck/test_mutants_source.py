"""The catalogue of planted bugs: every mutant compiles, and every one is really wrong.

Each mutant meets the cache of the right forward, at random inputs with all sizes different, and is
compared with the right backward on the same cache. Whether a gradient checker catches it is another
test's question.
"""

import re
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

import miniconvit as mc
from miniconvit import layers
from miniconvit.gradcheck.mutants import MUTANTS, Mutant, mutate, planted
from miniconvit.layers.names import part

AT_LEAST = dict.fromkeys(
    (
        *("linear", "gelu", "patch_embed", "position_attention", "position_attention_dense"),
        *("position_values", "gate", "attention", "gpsa_dense", "mhsa", "mlp", "drop_path"),
        *("block", "last_block", "cross_entropy", "psa"),
    ),
    4,
) | dict.fromkeys(("gpsa", "layernorm", "softmax", "convit"), 6)


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape)


def attention_map(*shape):
    """Random rows that are positive and sum to one."""
    weights = np.exp(normal(*shape))
    return weights / weights.sum(axis=-1, keepdims=True)


def block_params(prefix, local_up_to_layer, attention="gpsa"):
    """Random parameters of a block, D = 6: all of it for "", its attention for "attn."."""
    config = mc.ConViTConfig(
        embed_dim=6, num_heads=2, depth=1, qkv_bias=True, local_up_to_layer=local_up_to_layer,
        attention=attention,
    )  # fmt: skip
    shapes = part(mc.param_shapes(config), f"blocks.0.{prefix}")
    return {name: normal(*shape, seed=len(name)) for name, shape in shapes.items()}


def mlp_params():
    shapes = {"fc1.weight": (7, 6), "fc1.bias": (7,), "fc2.weight": (6, 7), "fc2.bias": (6,)}
    return {name: normal(*shape) for name, shape in shapes.items()}


def convit(local_up_to_layer):
    config = mc.ConViTConfig(
        img_size=(8, 15), patch_size=(2, 3), in_chans=2, num_classes=7, embed_dim=6, depth=3,
        num_heads=2, local_up_to_layer=local_up_to_layer, drop_path_rate=0.6,
    )  # fmt: skip
    shapes = mc.param_shapes(config).items()
    params = {name: normal(*shape, seed=i) for i, (name, shape) in enumerate(shapes)}
    return normal(3, 2, 8, 15), params, config, True


def block(local_up_to_layer, keep, keep_prob):
    return normal(3, 20, 6), block_params("", local_up_to_layer), 2, (4, 5), keep, keep_prob


# B = 3, grid 4 x 5 with N = 20 tokens, H = 2 heads, d = 3: arguments of the forward functions.
MASKS = np.array([1, 1, 0]), np.array([0, 1, 1])
BLOCKS = [block(1, MASKS, 0.7), block(0, MASKS, 0.7), block(1, (None, None), 1.0)]
INPUTS = {
    "linear": [(normal(3, 5, 4), normal(7, 4), normal(7)), (normal(6, 4), normal(7, 4))],
    "layernorm": [(1.7 * normal(3, 5, 7) + 0.4, normal(7, seed=1), normal(7, seed=2))],
    "gelu": [(2.0 * normal(3, 5, 7),)],
    "softmax": [(normal(3, 2, 5, 7),)],
    "patch_embed": [(normal(3, 2, 8, 15), normal(7, 2, 2, 3), normal(7), (2, 3))],
    "position_attention": [(normal(2, 3), normal(2), (4, 5))],
    "position_attention_dense": [(normal(2, 3), normal(2), (4, 5))],
    "position_values": [(normal(3, 2, 20, 3), attention_map(2, 4, 4), attention_map(2, 5, 5))],
    "gate": [
        (normal(3, 2, 5, 4, seed=1), normal(3, 2, 5, 4, seed=2), normal(2)),
        (attention_map(3, 2, 5, 5), attention_map(2, 5, 5), normal(2)),
    ],
    "attention": [tuple(normal(3, 2, 5, 4, seed=seed) for seed in range(3))],
    "mhsa": [(normal(3, 5, 6), block_params("attn.", 0), 2)],
    "mlp": [(normal(3, 5, 6), mlp_params())],
    "drop_path": [(normal(3, 5, 4), MASKS[0], 0.7)],
    "gpsa": [(normal(3, 20, 6), block_params("attn.", 1), 2, (4, 5))],
    "gpsa_dense": [(normal(3, 20, 6), block_params("attn.", 1), 2, (4, 5))],
    "psa": [(normal(3, 20, 6), block_params("attn.", 1, "psa"), 2, (4, 5))],
    "block": BLOCKS,
    "last_block": BLOCKS,
    "cross_entropy": [
        (normal(3, 7), np.array([2, 0, 6])),
        (normal(3, 7), np.array([2, 0, 6]), 0.1),
        (normal(3, 7), abs(normal(3, 7, seed=1))),
    ],
    "convit": [convit(local_up_to_layer) for local_up_to_layer in (0, 2, 3)],
}


def layer(function):
    return function.removesuffix("_backward")


def original(function):
    return getattr(mc if function.startswith("convit_") else layers, function)


def flat(item):
    """Every array and number of a nested result, cache or argument, by its place."""
    if isinstance(item, (tuple, list)):
        item = dict(enumerate(item))
    if isinstance(item, dict):
        return {(key, *rest): x for key in item for rest, x in flat(item[key]).items()}
    return {(): item} if isinstance(item, (np.ndarray, float)) else {}


def random_like(y):
    """A random gradient for each array of a forward's result."""
    if isinstance(y, tuple):
        return tuple(random_like(item) for item in y)
    return normal(*y.shape, seed=9) if y.shape else 1.3


def backward_and_its_traces(backward, args):
    """What backward gives, and what it left of dy, the cache and the arguments."""
    args = deepcopy(args)
    y, cache = original(backward.__name__.replace("_backward", "_forward"))(*args)
    dy = random_like(y)
    arguments = flat((dy, cache, args))  # before backward: a model's cache is given up on the way
    return flat(backward(dy, cache)), arguments


def differ(wrong, right):
    """Whether two dicts of arrays differ by name, by shape or by more than 1e-6 relative."""
    if wrong.keys() != right.keys():
        return True
    for key, true in right.items():
        if np.shape(wrong[key]) != np.shape(true):
            return True
        size = np.linalg.norm(true) or 1.0
        if not np.linalg.norm(wrong[key] - true) <= 1e-6 * size:
            return True
    return False


def is_wrong(backward, args):
    """Whether backward differs from the original, or changes its arguments, or crashes."""
    right, untouched = backward_and_its_traces(original(backward.__name__), args)
    try:
        result, arguments = backward_and_its_traces(backward, args)
    except (ValueError, IndexError, KeyError):
        return True
    return differ(result, right) or differ(arguments, untouched)


def test_names_are_unique_slugs():
    names = [mutant.name for mutant in MUTANTS]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert [name for name in names if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", name)] == []


def test_no_two_mutants_are_the_same():
    changes = Counter((m.function, m.helper, m.before, m.after) for m in MUTANTS)
    assert [change for change, count in changes.items() if count > 1] == []


def test_every_layer_has_enough():
    counts = Counter(layer(mutant.function) for mutant in MUTANTS)
    assert {name: n for name, n in AT_LEAST.items() if counts[name] < n} == {}
    assert counts.keys() == AT_LEAST.keys()


@pytest.mark.parametrize("name", INPUTS)
def test_the_originals_are_not_called_wrong(name):
    """Otherwise is_wrong would prove nothing. Compiled anew like a mutant, with no change."""
    function = f"{name}_backward"
    unchanged = mutate(Mutant("none", function, f"def {function}(", f"def {function}(", ""))
    assert unchanged is not original(function)
    assert [args for args in INPUTS[name] if is_wrong(unchanged, args)] == []


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_is_wrong(mutant):
    assert any(is_wrong(mutate(mutant), args) for args in INPUTS[layer(mutant.function)])


def test_few_mutants_betray_themselves_by_a_crash():
    def crashes(mutant):
        for args in INPUTS[layer(mutant.function)]:
            try:
                backward_and_its_traces(mutate(mutant), args)
            except (ValueError, IndexError, KeyError):
                return True
        return False

    assert sum(map(crashes, MUTANTS)) <= 5


def test_mutate_leaves_the_original_alone():
    before = vars(layers).copy()
    wrong = mutate(MUTANTS[0])
    assert wrong is not original(MUTANTS[0].function)
    assert vars(layers) == before


@pytest.mark.parametrize("text", ["no such text", "dy"])
def test_mutate_refuses_a_text_that_does_not_occur_once(text):
    with pytest.raises(ValueError, match="must occur once"):
        mutate(replace(MUTANTS[0], before=text))


def test_a_planted_function_is_called_by_the_whole_lesson_and_then_gone():
    """One linear layer is called by patches, GPSA, MHSA, MLP and the head, in six modules."""
    images, params, config, _ = convit(2)
    calls, right = [], layers.linear_forward

    def counting(x, weight, bias=None):
        calls.append(weight.shape)
        return right(x, weight, bias)

    with planted(linear_forward=counting):
        logits, _ = mc.convit_forward(images, params, config)
    # patches and head; two blocks of GPSA: qk, v, proj, fc1, fc2; one of MHSA: qkv, proj, fc1, fc2
    assert len(calls) == 2 + 2 * 5 + 4
    again, _ = mc.convit_forward(images, params, config)
    assert len(calls) == 16 and np.array_equal(logits, again)
    assert layers.linear_forward is layers.gpsa.linear_forward is right


def test_a_planted_function_is_gone_after_an_error():
    right = layers.mlp_backward
    with pytest.raises(ZeroDivisionError), planted(mlp_backward=None):
        assert layers.block.mlp_backward is None
        _ = 1 / 0
    assert layers.block.mlp_backward is layers.mlp_backward is right


def test_a_misspelt_name_is_not_planted():
    with pytest.raises(ValueError, match="calls no mlp_bakward"), planted(mlp_bakward=None):
        pass
