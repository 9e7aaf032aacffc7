"""bf16 beside timm's ConViT under torch.autocast: logits and gradients of both, by float64.

A gradient of few numbers, such as the gates' or the head's bias, is close to the truth by luck in
one seed and far from it in the next. So errors are means over twelve seeds: among any three there
is often a tensor in which one side had the luck.
"""

import amx
import numpy as np
import pytest

import miniconvit as mc

pytestmark = pytest.mark.full
SEEDS = 12


def config(size, patch, width, heads, depth):
    """The last block has a class token, the others are GPSA."""
    return mc.ConViTConfig(
        size, patch, embed_dim=width, num_heads=heads, depth=depth, local_up_to_layer=depth - 1
    )


MODELS = {  # and how many images
    "72 wide, 9 heads": (config(32, 4, 72, 9, 3), 16),
    "192 wide, 4 heads": (config(32, 4, 192, 4, 4), 16),
    "192 wide, 196 and 197 tokens": (config(224, 16, 192, 4, 3), 4),
    "48 wide, 4 heads": (config(32, 4, 48, 4, 4), 16),
}


def draw_params(config, seed, kind):
    """The official initialisation, or random numbers of the size of trained ones."""
    rng = np.random.default_rng(seed)
    params = mc.init_params(config, seed)
    if kind == "init":
        return params
    for name, value in params.items():
        noise = rng.standard_normal(value.shape)
        if name in ("cls_token", "pos_embed") or name.endswith("gating_param"):
            value = noise
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif noise.ndim == 1:  # LayerNorm weights
            value = 1 + 0.3 * noise
        elif name.endswith("pos_proj.weight"):
            value = 0.5 * noise
        else:
            gain = 1.5 if name.endswith(("qk.weight", "qkv.weight")) else 1.0
            value = gain * noise / noise[0].size ** 0.5
        params[name] = value.astype("float32")
    return params


def ours(config, params, images, labels, arithmetic=None):
    """Logits and gradients by name, by the lesson's layers or by the kernels."""
    from miniconvit.engine.kernels.block import Blocks

    blocks = {"blocks": Blocks(arithmetic)} if arithmetic else {}
    logits, cache = mc.convit_forward(images, params, config, **blocks)
    _, cache_loss = mc.cross_entropy_forward(logits, labels)
    grads = mc.convit_backward(mc.cross_entropy_backward(1.0, cache_loss), cache)
    return {"logits": logits} | grads


def timm_s(config, params, images, labels, autocast=False):
    """The same of timm's ConViT, in the precision of the images or with autocast to bf16."""
    import torch
    from timm.models.convit import ConVit

    names = ("img_size", "patch_size", "num_classes", "depth", "num_heads", "local_up_to_layer")
    shape = {name: getattr(config, name) for name in names}
    model = ConVit(embed_dim=config.embed_dim // config.num_heads, **shape)  # of one head
    images = torch.from_numpy(images)
    model.to(images.dtype).load_state_dict({k: torch.from_numpy(v) for k, v in params.items()})
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels))
    loss.backward()
    grads = {name: value.grad for name, value in model.named_parameters()}
    return {k: v.detach().double().numpy() for k, v in ({"logits": logits} | grads).items()}


def relative_errors(found, truth):
    """By tensor. The gradient of pos_proj.bias is left out: it is 0."""
    return {
        name: np.linalg.norm(found[name] - value) / np.linalg.norm(value)
        for name, value in truth.items()
        if not name.endswith("pos_proj.bias")
    }


def measure(config, count, seed, kind):
    """The errors of each side, once the two truths agree."""
    from miniconvit.engine.kernels.bf16 import Bf16
    from miniconvit.engine.kernels.float32 import Float32

    rng = np.random.default_rng(100 + seed)
    images = rng.standard_normal((count, 3, *config.image), dtype="float32")
    labels = rng.integers(config.num_classes, size=count)
    params = draw_params(config, seed, kind)
    exact = {name: value.astype("float64") for name, value in params.items()}
    truth = ours(config, exact, images.astype("float64"), labels)
    theirs = timm_s(config, exact, images.astype("float64"), labels)
    assert max(relative_errors(theirs, truth).values()) < 1e-10
    return {
        "bf16": relative_errors(ours(config, params, images, labels, Bf16), truth),
        "autocast": relative_errors(timm_s(config, params, images, labels, True), truth),
        "float32": relative_errors(ours(config, params, images, labels, Float32), truth),
        "timm, float32": relative_errors(timm_s(config, params, images, labels), truth),
    }


@pytest.fixture(scope="module", params=["random", "init"])
def kind(request):
    return request.param


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def errors(kind, name):
    """By side and tensor: the error in each seed."""
    for module in ("torch", "timm"):
        pytest.importorskip(module, reason="needs the extra `parity`")
    amx.emulate()
    seeds = [measure(*MODELS[name], seed, kind) for seed in range(SEEDS)]
    return {
        side: {key: np.array([seed[side][key] for seed in seeds]) for key in seeds[0][side]}
        for side in seeds[0]
    }


def test_bf16_is_within_1_2_times_the_error_of_autocast(kind, name, errors):
    """The issue's bound, by tensor."""
    bf16, autocast = (
        {key: each.mean() for key, each in errors[side].items()} for side in ("bf16", "autocast")
    )
    ratios = {key: bf16[key] / autocast[key] for key in bf16}
    cells = [f"{np.median(list(x.values())):.4f}, {max(x.values()):.4f}" for x in (bf16, autocast)]
    worst = max(ratios, key=ratios.get)
    cells += [f"{np.median(list(ratios.values())):.2f}", f"{ratios[worst]:.2f} (`{worst}`)"]
    print(f"\n| {kind} | {name} | {len(ratios)} | {' | '.join(cells)} |")
    assert {key: ratio for key, ratio in ratios.items() if not ratio <= 1.2} == {}


def test_float32_is_within_1e_5(kind, name, errors):
    """In every seed."""
    worst = {
        side: max((each.max(), key) for key, each in errors[side].items())
        for side in ("float32", "timm, float32")
    }
    print(f"\n{kind}, {name}:", *(f"{side} {x:.1e} ({key})" for side, (x, key) in worst.items()))
    inexact = {key for key, each in errors["float32"].items() if not each.max() <= 1e-5}
    assert inexact == set()
