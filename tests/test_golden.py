"""The golden test: values of the official ConViT code for parameters given by a formula."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

import miniconvit as mc
from miniconvit.analysis.maps import attention_maps, nonlocality
from miniconvit.layers import block_forward

CONFIG = mc.ConViTConfig(
    img_size=32,
    patch_size=8,
    num_classes=5,
    embed_dim=16,
    depth=3,
    num_heads=4,
    local_up_to_layer=2,
)
LABELS = np.array([1, 3])
close = partial(np.testing.assert_allclose, rtol=0, atol=1e-10)

LOGITS = [
    [-0.054860447046, -0.702139106331, -0.288347219326, -1.073060509476, 1.575664855442],
    [-0.625046113772, -1.565978212220, -1.406387531476, -1.325491190928, 0.394642612519],
]
GRADIENT_NORMS = {
    "cls_token": 1.8293521818,
    "pos_embed": 1.2818616387e-1,
    "patch_embed.proj.weight": 1.4438436107,
    "patch_embed.proj.bias": 3.6131132220e-1,
    "blocks.0.norm1.weight": 6.3701674097e-2,
    "blocks.0.norm1.bias": 1.9150373395e-1,
    "blocks.0.attn.gating_param": 8.8310270425e-3,
    "blocks.0.attn.qk.weight": 1.0967066688e-1,
    "blocks.0.attn.v.weight": 2.8725810305e-1,
    "blocks.0.attn.proj.weight": 3.3900145203e-1,
    "blocks.0.attn.proj.bias": 3.4616438569e-1,
    "blocks.0.attn.pos_proj.weight": 7.4464433547e-2,
    "blocks.0.attn.pos_proj.bias": 0.0,
    "blocks.0.mlp.fc1.weight": 6.6296021502e-1,
    "blocks.0.mlp.fc1.bias": 2.9094859255e-1,
    "blocks.0.mlp.fc2.weight": 8.7731487456e-1,
    "blocks.1.attn.gating_param": 1.0024718133e-2,
    "blocks.1.attn.qk.weight": 8.6140510803e-2,
    "blocks.1.attn.v.weight": 2.9044558606e-1,
    "blocks.1.attn.proj.weight": 4.5029519191e-1,
    "blocks.1.attn.pos_proj.weight": 5.0626741633e-2,
    "blocks.1.mlp.fc1.weight": 7.6615672697e-1,
    "blocks.1.mlp.fc2.weight": 7.9508082931e-1,
    "blocks.2.norm1.weight": 3.7295604112e-1,
    "blocks.2.attn.qkv.weight": 2.7941597615,
    "blocks.2.attn.proj.weight": 1.9352600519,
    "blocks.2.mlp.fc1.weight": 2.3201154717,
    "blocks.2.mlp.fc2.weight": 2.7911207263,
    "norm.weight": 6.7449792217e-1,
    "norm.bias": 7.4515950431e-1,
    "head.weight": 3.5589866802,
    "head.bias": 8.7232190034e-1,
}
GRADIENT_SUMS = {
    "blocks.0.attn.gating_param": 4.0334821242e-4,
    "blocks.0.attn.qk.weight": 2.9031908823e-3,
    "blocks.0.attn.v.weight": 5.8156246309e-2,
    "blocks.0.attn.pos_proj.weight": 1.1199761501e-3,
    "blocks.1.attn.gating_param": -1.2488065387e-2,
    "blocks.1.attn.pos_proj.weight": -2.1369414450e-2,
    "blocks.2.attn.qkv.weight": 1.2151560994e-1,
    "norm.weight": 1.4603618121,
}


@pytest.fixture(scope="module")
def params():
    values = {}
    for t, (name, shape) in enumerate(mc.param_shapes(CONFIG).items()):
        j = np.arange(np.prod(shape), dtype=np.float64)
        value = 0.3 * np.sin(1.7 * t + 2.3 * j + 0.013 * j * j)
        is_norm_weight = "norm" in name and name.endswith("weight")
        values[name] = (value + is_norm_weight).reshape(shape)
    return values


@pytest.fixture(scope="module")
def images():
    j = np.arange(2 * 3 * 32 * 32, dtype=np.float64)
    return np.sin(0.7 * j + 0.001 * j * j).reshape(2, 3, 32, 32)


@pytest.fixture(scope="module")
def grads(images, params):
    logits, cache = mc.convit_forward(images, params, CONFIG)
    _, cache_loss = mc.cross_entropy_forward(logits, LABELS)
    return mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)


def test_there_are_49_tensors(params):
    assert len(params) == 49


def test_patch_embedding(images, params):
    tokens, _ = mc.layers.patch_embed_forward(
        images, params["patch_embed.proj.weight"], params["patch_embed.proj.bias"], 8
    )
    expected = [-0.693912940029, 3.288296564705, 0.776066248542, -0.882689366677]
    close(tokens[0, 0, :4], expected)
    close(tokens.sum(), -67.641077048318)


def test_attention_and_nonlocality_of_block_0(images, params):
    first = attention_maps(images, params, CONFIG)[0]
    expected = [
        0.104184489799,
        0.067955526262,
        0.097990846411,
        0.023019287984,
        0.187840485863,
        0.061769472862,
    ]
    close(first.mixture[0, 0, 0, :6], expected)
    close(
        nonlocality(first.mixture.mean(axis=0), CONFIG.grid),
        [1.685516548732, 1.721053302223, 2.136846202761, 2.415760720133],
    )


def test_tokens_after_each_block(images, params):
    outputs = []

    def record(*args, **kwargs):
        y, cache = block_forward(*args, **kwargs)
        outputs.append(y)
        return y, cache

    def record_last(*args, **kwargs):
        y, cache = record(*args, **kwargs)
        return y[:, 0], cache

    blocks = SimpleNamespace(block_forward=record, last_block_forward=record_last)
    mc.convit_forward(images, params, CONFIG, blocks=blocks)
    sums = [42.044306344025, 143.885928280121, 309.139709723090]
    means = [1.813633227447, 2.304948084054, 2.711770335260]
    assert [y.shape[1] for y in outputs] == [16, 16, 17]
    close([y.sum() for y in outputs], sums)
    close([np.abs(y).mean() for y in outputs], means)


def test_logits_and_loss(images, params):
    logits, _ = mc.convit_forward(images, params, CONFIG)
    close(logits, LOGITS)
    close(mc.cross_entropy_forward(logits, LABELS)[0], 2.516095087300)


@pytest.mark.parametrize("name", GRADIENT_NORMS)
def test_gradient_norm(name, grads):
    close(np.linalg.norm(grads[name]), GRADIENT_NORMS[name])


@pytest.mark.parametrize("name", GRADIENT_SUMS)
def test_gradient_sum(name, grads):
    close(grads[name].sum(), GRADIENT_SUMS[name])
