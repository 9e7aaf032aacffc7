"""Writes neighbours.npz: what torch's autograd finds for the papers beside ConViT, in float64.

The tests read the file with NumPy alone. Making it again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_neighbours_golden.py

With --official DIR, a checkout of github.com/ggjy/CMT.pytorch, it writes nothing and prints how far
this package's CMT is from the authors' own.

Everything here is composed anew of torch's own functions. Its keys:

    versions                JSON: {"torch": ..., "numpy": ...}
    CASE/in/NAME            an input of the pair CASE
    CASE/y, CASE/dy         its output, and a random weight of it
    CASE/grad/NAME          the gradient of sum(y * dy)
    diversified_K/...       timm's ConViT with K GPSA blocks, and all three losses:
                            config, weights (JSON), images, targets, patch_labels, loss,
                            similarities (of each block), in/NAME and grad/NAME of parameters
    conv_K, depthwise_K/... also stride and padding; images are channels last
    batchnorm/...           also after/NAME: the running statistics after one step in training, and
                            evaluated, the output in evaluation from those of in/
    modulated_norm, modulated_linear, critic_ATTENTION/...   pairs of a GAN; critics have a config
    adversarial/...         one step of a GAN: config, images, z, step, losses (of critic and
                            generator), in/NAME and grad/NAME of parameters
    cmt, cmt_plain/...      a whole CMT, with all its filters and without, a pair of its parameters,
                            with config, images, and as batchnorm after/NAME and evaluated
    isotropic_MIXER/...     a whole network, a pair of its parameters, with config, images, mask
    mobile_STEM_READOUT/... a whole network in training: config (JSON), images, targets, logits,
                            loss, in/NAME and grad/NAME of parameters; after/NAME, its running
                            statistics after the step; evaluated and evaluated_loss before it
    lipschitz/SEED          (layer, ray, scale): 2-norms of Jacobians, in the experiment's order
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from make_timm_golden import make_config, random_parameter
from timm.models.convit import GPSA, ConVit
from timm.models.vision_transformer import Block
from torch import from_numpy as tensor
from torch import nn
from torch.func import functional_call
from torch.nn.functional import (
    batch_norm,
    conv2d,
    cosine_similarity,
    cross_entropy,
    fold,
    gelu,
    layer_norm,
    linear,
    mse_loss,
    pad,
    scaled_dot_product_attention,
    silu,
    softplus,
)

from miniconvit.experiments import lipschitz
from miniconvit.neighbours import cmt_backward, cmt_forward
from miniconvit.neighbours.cmt import CMT_VARIANTS, CMTConfig, cmt_shapes
from miniconvit.neighbours.gan import GANConfig, augmentation, critic_shapes, gan_shapes
from miniconvit.neighbours.isotropic import IsotropicConfig, isotropic_shapes
from miniconvit.neighbours.mobile import MobileConfig, mobile_shapes

OUTPUT = Path(__file__).with_name("neighbours.npz")
HEADS = 3


def heads_of(weight, num_heads):
    """(D, D) as (H, d, D): the rows of each head."""
    return weight.reshape(num_heads, -1, weight.shape[1])


def distances(q):
    """-|q_i - q_j|^2 / sqrt d, by differences."""
    return -(q[..., :, None, :] - q[..., None, :, :]).pow(2).sum(-1) / q.shape[-1] ** 0.5


def l2_attention(q, v):
    return distances(q).softmax(-1) @ v


def by_distance(x, p, num_heads, through_queries):
    """Kim's layer as their equation 7 has it, X A_h in full; or with values X, as in ViTGAN."""
    query, value = p["qv.weight"].chunk(2)
    outputs = []
    for Wq, Wv in zip(heads_of(query, num_heads), heads_of(value, num_heads), strict=True):
        P = distances(x @ Wq.T).softmax(-1)
        seen = x @ (Wq.T @ Wq / len(Wq) ** 0.5) if through_queries else x
        outputs.append(P @ seen @ Wv.T)
    return torch.cat(outputs, -1) @ p["proj.weight"].T + p["proj.bias"]


def dot_product(x, p, num_heads):
    q, k, v = (heads_of(w, num_heads) for w in p["qkv.weight"].chunk(3))
    q, k, v = (torch.einsum("bnc,hdc->bhnd", x, w) for w in (q, k, v))
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    return y.transpose(1, 2).flatten(2) @ p["proj.weight"].T + p["proj.bias"]


def attention_case(rng, through_queries):
    D = 4 * HEADS
    shapes = {"x": (2, 5, D), "qv.weight": (2 * D, D), "proj.weight": (D, D), "proj.bias": (D,)}
    inputs = {name: rng.standard_normal(shape) * 0.4 for name, shape in shapes.items()}
    return inputs, lambda x, **p: by_distance(x, p, HEADS, through_queries)


def make_case(name, rng, inputs, function):
    """Everything that the file holds about one pair, by key."""
    leaves = {key: tensor(value).requires_grad_() for key, value in inputs.items()}
    y = function(**leaves)
    dy = rng.standard_normal(y.shape)
    (y * tensor(dy)).sum().backward()
    case = {"y": y.detach().numpy(), "dy": dy}
    case |= {f"in/{key}": value for key, value in inputs.items()}
    case |= {f"grad/{key}": leaf.grad.numpy() for key, leaf in leaves.items()}
    return {f"{name}/{key}": value for key, value in case.items()}


def cosine(h):
    """The mean over pairs of two tokens, by torch's own cosine."""
    alike = cosine_similarity(h[:, :, None], h[:, None], dim=-1).abs()
    pairs = ~torch.eye(h.shape[1], dtype=bool)
    return alike[:, pairs].mean()


def contrastive(h, first):
    """-log(exp(e.h) / (exp(e.h) + exp(e.m))), m by a loop over the tokens."""
    losses = []
    for i in range(h.shape[1]):
        others = torch.cat([h[:, :i], h[:, i + 1 :]], 1).mean(1)
        pair = torch.stack([(first[:, i] * h[:, i]).sum(-1), (first[:, i] * others).sum(-1)], -1)
        losses.append(-pair.log_softmax(-1)[:, 0])
    return torch.stack(losses).mean()


def patch_mixing(h, weight, bias, labels):
    logits = h @ weight.T + bias
    return cross_entropy(logits.flatten(0, 1), labels.flatten())


def diversified(local_up_to_layer, weights=(0.7, 0.3, 0.9)):
    """Everything that the file holds about one whole model, by key."""
    rng = np.random.default_rng(local_up_to_layer)
    config = make_config(12, 4, 5, 16, 3, 4, local_up_to_layer=local_up_to_layer)
    model = ConVit(**config | {"embed_dim": 4}).eval()
    params = {k: random_parameter(rng, k, v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict({k: tensor(v).double() for k, v in params.items()})
    params |= {k: v.astype(np.float64) for k, v in params.items()}
    head = {"weight": rng.standard_normal((5, 16)) / 4, "bias": rng.standard_normal(5) / 4}
    leaves = {name: tensor(value).requires_grad_() for name, value in head.items()}
    images, targets = rng.standard_normal((3, 3, 12, 12)), rng.dirichlet(np.ones(5), 3)
    patch_labels = rng.integers(5, size=(3, 9))
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, y: outputs.append(y[:, -9:]))
    loss = cross_entropy(model(tensor(images)), tensor(targets))
    h = outputs[-1]
    loss = loss + weights[0] * cosine(h) + weights[1] * contrastive(h, outputs[0].detach())
    loss = loss + weights[2] * patch_mixing(h, **leaves, labels=tensor(patch_labels))
    loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    grads |= {f"patch_head.{name}": leaf.grad for name, leaf in leaves.items()}
    params |= {f"patch_head.{name}": value for name, value in head.items()}
    case = {"config": json.dumps(config), "weights": json.dumps(weights), "images": images}
    case |= {"targets": targets, "patch_labels": patch_labels, "loss": loss.item()}
    case["similarities"] = [cosine(h).item() for h in outputs]
    case |= {f"in/{name}": value for name, value in params.items()}
    # where no class token joins, autograd gives none
    zero = np.zeros_like(params["cls_token"])
    case |= {f"grad/{k}": zero if g is None else g.numpy() for k, g in grads.items()}
    return {f"diversified_{local_up_to_layer}/{key}": value for key, value in case.items()}


FILTERS = {3: (2, 1), 2: (2, 0), 5: (1, 2)}
"""k to a stride and a padding."""


def channels_first(function, x, *args, **more):
    return function(x.permute(0, 3, 1, 2), *args, **more).permute(0, 2, 3, 1)


def convolutions(rng):
    """The pairs conv and depthwise, for each k."""
    cases = {}
    for k, (stride, padding) in FILTERS.items():
        how = {"stride": stride, "padding": padding}
        for name, groups, shape in (("conv", 1, (7, 4)), ("depthwise", 4, (4, 1))):
            inputs = {"x": rng.standard_normal((3, 6, 8, 4)), "weight": (*shape, k, k)}
            inputs["weight"] = rng.standard_normal(inputs["weight"])
            inputs["bias"] = rng.standard_normal(shape[0])

            def function(x, weight, bias, groups=groups, how=how):
                return channels_first(conv2d, x, weight, bias, groups=groups, **how)

            cases |= make_case(f"{name}_{k}", rng, inputs, function)
            cases |= {f"{name}_{k}/{key}": value for key, value in how.items()}
    return cases


def normalised(rng):
    """The pair batchnorm in training, with its running statistics, and in evaluation."""
    inputs = {"x": 3 + 2 * rng.standard_normal((3, 2, 5, 4)), "weight": rng.standard_normal(4)}
    inputs["bias"] = rng.standard_normal(4)
    running = {"running_mean": rng.standard_normal(4), "running_var": rng.uniform(0.5, 2.0, 4)}
    after = {name: tensor(value.copy()) for name, value in running.items()}

    def function(x, weight, bias, statistics=after, train=True):
        return channels_first(batch_norm, x, *statistics.values(), weight, bias, train)

    case = make_case("batchnorm", rng, inputs, function)
    fixed = {name: tensor(value) for name, value in running.items()}
    leaves = {name: tensor(value) for name, value in inputs.items()}
    case["batchnorm/evaluated"] = function(**leaves, statistics=fixed, train=False).numpy()
    case |= {f"batchnorm/in/{name}": value for name, value in running.items()}
    return case | {f"batchnorm/after/{name}": value.numpy() for name, value in after.items()}


def below(p, prefix):
    return {name.removeprefix(prefix): v for name, v in p.items() if name.startswith(prefix)}


def perceptron(x, p):
    return linear(gelu(linear(x, p["fc1.weight"], p["fc1.bias"])), p["fc2.weight"], p["fc2.bias"])


def normed(x, p, name):
    return layer_norm(x, x.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], 1e-6)


def mixed(x, p, config):
    """One of the four mixers, by torch's and timm's own functions."""
    B, N, D = x.shape
    if config.mixer == "mlp":
        return perceptron(x.transpose(1, 2), p).transpose(1, 2)
    if config.mixer == "conv":
        image = x.transpose(1, 2).reshape(B, D, *config.grid)
        y = conv2d(image, p["depthwise.weight"], p["depthwise.bias"], padding=1, groups=D)
        y = y.flatten(2).transpose(1, 2)
    elif config.mixer == "gpsa":
        return functional_call(GPSA(D, config.num_heads), p, x)
    else:
        qkv = linear(x, p["qkv.weight"]).reshape(B, N, 3, config.num_heads, -1)
        y = scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
        y = y.transpose(1, 2).flatten(2)
    return linear(y, p["proj.weight"], p["proj.bias"])


def isotropic(mixer):
    """Everything that the file holds about the network with this mixer, by key."""
    rng = np.random.default_rng(len(mixer))
    config = IsotropicConfig(mixer, 0.5, 12, 4, 2, 16, 2, 4, 10, 7)
    images = rng.standard_normal((3, 2, 12, 12))
    mask = rng.permuted(np.tile(np.arange(9) < 4, (3, 1)), axis=1)
    shapes = isotropic_shapes(config)
    inputs = {k: random_parameter(rng, k, s).astype(np.float64) for k, s in shapes.items()}

    def function(**p):
        x = conv2d(tensor(images), p["patch_embed.proj.weight"], p["patch_embed.proj.bias"], 4)
        x = x.flatten(2).transpose(1, 2)
        x = torch.where(tensor(mask)[..., None], p["mask_token"], x) + p["pos_embed"]
        for i in range(config.depth):
            block = below(p, f"blocks.{i}.")
            x = x + mixed(normed(x, block, "norm1"), below(block, "mix."), config)
            x = x + perceptron(normed(x, block, "norm2"), below(block, "mlp."))
        return linear(normed(x, p, "norm"), p["head.weight"], p["head.bias"])

    name = f"isotropic_{mixer}"
    more = {"config": json.dumps(vars(config)), "images": images, "mask": mask}
    case = make_case(name, rng, inputs, function)
    return case | {f"{name}/{key}": value for key, value in more.items()}


def modulated_norm(x, w, **p):
    gamma = linear(w, p["gamma.weight"], p["gamma.bias"])[:, None]
    beta = linear(w, p["beta.weight"], p["beta.bias"])[:, None]
    return (1 + gamma) * layer_norm(x, x.shape[-1:], eps=1e-6) + beta


def modulated_linear(x, a, weight):
    """As StyleGAN2 has it: a weight for each token, each of its rows of length 1."""
    modulated = weight * a[:, :, None]  # (B, N, O, D)
    lengths = (modulated.pow(2).sum(-1, keepdim=True) + 1e-8).sqrt()
    return torch.einsum("pd,bnod->bnpo", x, modulated / lengths)


def sines(rows, cols, p, name):
    y, x = torch.linspace(-1, 1, rows), torch.linspace(-1, 1, cols)
    grid = torch.cartesian_prod(y, x)
    return torch.sin(linear(grid, p[f"{name}.weight"], p[f"{name}.bias"]))


def attended(x, p, config, attention):
    if attention == "l2":
        return by_distance(x, p, config.num_heads, False)
    return dot_product(x, p, config.num_heads)


def critic(images, p, config):
    P = config.patch_size
    weight, bias = p["patch_embed.proj.weight"], p["patch_embed.proj.bias"]
    x = conv2d(images.permute(0, 3, 1, 2), weight, bias, P, P // 2).flatten(2).transpose(1, 2)
    x = x + sines(*config.grid, p, "pos")
    x = torch.cat([p["cls_token"].expand(len(x), -1, -1), x], 1)
    for i in range(config.depth):
        block = below(p, f"blocks.{i}.")
        normal = normed(x, block, "norm1")
        x = x + attended(normal, below(block, "attn."), config, config.attention)
        x = x + perceptron(normed(x, block, "norm2"), below(block, "mlp."))
    return linear(normed(x, p, "norm")[:, 0], p["head.weight"], p["head.bias"])[:, 0]


def generator(z, p, config):
    w, (rows, cols), P = perceptron(z, below(p, "map.")), config.grid, config.patch_size
    x = sines(rows, cols, p, "pos").expand(len(z), -1, -1)
    for i in range(config.depth):
        block = below(p, f"blocks.{i}.")
        normal = modulated_norm(x, w, **below(block, "norm1."))
        x = x + attended(normal, below(block, "attn."), config, "dot")
        x = x + perceptron(modulated_norm(x, w, **below(block, "norm2.")), below(block, "mlp."))
    x = modulated_norm(x, w, **below(p, "norm."))
    style = 1 + linear(x, p["style.weight"], p["style.bias"])
    h = modulated_linear(sines(P, P, p, "sine"), style, p["pixel.weight"])
    colours = torch.tanh(linear(gelu(h + x[:, :, None]), p["rgb.weight"], p["rgb.bias"]))
    patches = colours.transpose(2, 3).flatten(2).transpose(1, 2)  # (B, C * P * P, N)
    return fold(patches, config.image, P, stride=P).permute(0, 2, 3, 1)


def augmented(images, drawn):
    """DiffAugment, an image after the other, with these numbers."""
    shift, brightness, kept = (tensor(np.asarray(x, np.float64)) for x in drawn)
    done = []
    numbers = zip(images, shift.long().tolist(), brightness, kept, strict=True)
    for x, (down, right), more, k in numbers:
        frame = pad(x + more, (0, 0, 4, 4, 4, 4))
        done.append(frame[4 - down :, 4 - right :][: x.shape[0], : x.shape[1]] * k)
    return torch.stack(done)


def gan_config(attention):
    return GANConfig(attention, (8, 12), 4, 3, 12, 2, 3, 10, 5)


def judged(attention):
    """Everything that the file holds about a critic, by key."""
    config, rng = gan_config(attention), np.random.default_rng(len(attention))
    shapes = critic_shapes(config)
    inputs = {k: random_parameter(rng, k, s).astype(np.float64) for k, s in shapes.items()}
    inputs["images"] = rng.uniform(-1, 1, (3, 8, 12, 3))
    name = f"critic_{attention}"
    case = make_case(name, rng, inputs, lambda images, **p: critic(images, p, config))
    return case | {f"{name}/config": json.dumps(vars(config))}


def adversarial():
    """One step of both networks, their losses by torch's own, each with the other detached."""
    config, rng, step = gan_config("l2"), np.random.default_rng(11), 3
    shapes = gan_shapes(config)
    params = {k: random_parameter(rng, k, s).astype(np.float64) for k, s in shapes.items()}
    images, z = rng.uniform(-1, 1, (4, 8, 12, 3)), rng.standard_normal((4, 5))
    leaves = {name: tensor(value).requires_grad_() for name, value in params.items()}
    p, q = below(leaves, "critic."), below(leaves, "generator.")
    real, fake = tensor(images), generator(tensor(z), q, config)
    drawn = [augmentation(0, step, 2 * np.arange(4) + i, config.image) for i in range(2)]

    def scores(x, drawn, p):
        return critic(x, p, config), critic(augmented(x, drawn), p, config)

    (plain_real, real_score), (plain_fake, fake_score) = (
        scores(x, numbers, p) for x, numbers in zip((real, fake.detach()), drawn, strict=True)
    )
    loss = softplus(-real_score).mean() + softplus(fake_score).mean()
    loss = loss + mse_loss(plain_real, real_score) + mse_loss(plain_fake, fake_score)
    fixed = {name: value.detach() for name, value in p.items()}
    drawn_loss = softplus(-critic(augmented(fake, drawn[1]), fixed, config)).mean()
    (loss + drawn_loss).backward()
    case = {"config": json.dumps(vars(config)), "images": images, "z": z, "step": step}
    case["losses"] = [loss.item(), drawn_loss.item()]
    case |= {f"in/{name}": value for name, value in params.items()}
    case |= {f"grad/{name}": leaf.grad.numpy() for name, leaf in leaves.items()}
    return {f"adversarial/{key}": value for key, value in case.items()}


def filtered(x, p, name, **how):
    return conv2d(x, p[f"{name}.weight"], p[f"{name}.bias"], **how)


def centred(x, p, name, train):
    """Batch normalisation; in training the running statistics of p are moved."""
    running = p[f"{name}.running_mean"], p[f"{name}.running_var"]
    return batch_norm(x, *running, p[f"{name}.weight"], p[f"{name}.bias"], train)


def tokens_normed(x, p, name, eps):
    """LayerNorm over the channels of (B, D, rows, cols)."""
    y = x.permute(0, 2, 3, 1)
    y = layer_norm(y, y.shape[-1:], p[f"{name}.weight"], p[f"{name}.bias"], eps)
    return y.permute(0, 3, 1, 2)


def coarse_attention(x, p, position, num_heads, train):
    """torch's own attention, with the positions as its mask."""
    coarse = x
    if "sr.0.weight" in p:
        k = p["sr.0.weight"].shape[-1]
        coarse = centred(filtered(x, p, "sr.0", stride=k, groups=x.shape[1]), p, "sr.1", train)
    heads = []
    for name, source in (("q", x), ("k", coarse), ("v", coarse)):
        rows = linear(source.flatten(2).mT, p[f"{name}.weight"], p[f"{name}.bias"])
        heads.append(rows.unflatten(2, (num_heads, -1)).transpose(1, 2))
    y = scaled_dot_product_attention(*heads, attn_mask=position)
    y = linear(y.transpose(1, 2).flatten(2), p["proj.weight"], p["proj.bias"])
    return y.mT.unflatten(2, x.shape[2:])


def feed_forward(x, p, train):
    z = centred(gelu(filtered(x, p, "conv1.0")), p, "conv1.2", train)
    if "proj.weight" in p:
        z = z + filtered(z, p, "proj", padding=1, groups=z.shape[1])
    return centred(
        filtered(centred(gelu(z), p, "proj_bn", train), p, "conv2.0"), p, "conv2.1", train
    )


def cmt_of(x, p, config, train):
    for i in (1, 2, 3):
        x = gelu(filtered(x, p, f"stem_conv{i}", stride=1 + (i == 1), padding=1))
        x = centred(x, p, f"stem_norm{i}", train)
    for stage, depth, heads in zip("abcd", config.depths, config.num_heads, strict=False):
        x = filtered(x, p, f"patch_embed_{stage}.proj", stride=2)
        x = tokens_normed(x, p, f"patch_embed_{stage}.norm", 1e-5)
        for j in range(depth):
            block = below(p, f"blocks_{stage}.{j}.")
            if "proj.weight" in block:
                x = x + filtered(x, block, "proj", padding=1, groups=x.shape[1])
            normed = tokens_normed(x, block, "norm1", 1e-6)
            position = p[f"relative_pos_{stage}"]
            x = x + coarse_attention(normed, below(block, "attn."), position, heads, train)
            normed = tokens_normed(x, block, "norm2", 1e-6)
            x = x + feed_forward(normed, below(block, "mlp."), train)
    x = silu(centred(filtered(x, p, "_fc"), p, "_bn", train)).mean((2, 3))
    return linear(x, p["head.weight"], p["head.bias"])


def random_cmt(config, rng):
    """(parameters, running statistics), all random, by name."""
    params = {}
    for name, shape in cmt_shapes(config).items():
        size = shape[-1] * (shape[-2] * shape[-3] if len(shape) == 4 else 1)
        params[name] = rng.standard_normal(shape) * (size**-0.5 if len(shape) > 1 else 0.5)
        if name.endswith("running_var"):
            params[name] = rng.uniform(0.5, 2.0, shape)
    running = {name: params.pop(name) for name in list(params) if "running" in name}
    return params, running


def whole_cmt(name, **changes):
    """Everything that the file holds about one CMT, by key."""
    rng = np.random.default_rng(len(name))
    config = CMTConfig(32, 2, 5, 3, (4, 6, 8, 6), (1, 2, 1, 1), (1, 3, 2, 2), (4, 2, 1, 1), 1.5, 5,
                       **changes)  # fmt: skip
    images = rng.standard_normal((3, 2, 32, 32))
    inputs, running = random_cmt(config, rng)
    after = {key: tensor(value.copy()) for key, value in running.items()}
    case = make_case(name, rng, inputs, lambda **p: cmt_of(tensor(images), p | after, config, True))
    p = {key: tensor(value) for key, value in (inputs | running).items()}
    more = {"config": json.dumps(vars(config)), "images": images}
    more["evaluated"] = cmt_of(tensor(images), p, config, False).numpy()
    more |= {f"in/{key}": value for key, value in running.items()}
    more |= {f"after/{key}": value.numpy() for key, value in after.items()}
    return case | {f"{name}/{key}": value for key, value in more.items()}


def distance(ours, theirs):
    return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def compare_with_official(folder):
    """Prints distances between the authors' CMT and ours in float64: all parameters random, their
    dropout off."""
    sys.path.insert(0, folder)
    from cmt import CMT

    rng = np.random.default_rng(0)
    c = CMTConfig(64, 3, 7, 6, (8, 12, 16, 24), (1, 2, 2, 1), (1, 2, 4, 8), (8, 4, 2, 1), 3.6, 20)
    widths = list(c.embed_dims), c.stem_channel, c.fc_dim, c.num_heads, [c.mlp_ratio] * 4
    more = {"depths": c.depths, "sr_ratios": c.sr_ratios, "dp": 0.0}
    model = CMT(c.img_size, 3, c.num_classes, *widths, True, **more)
    params, running = random_cmt(c, rng)
    params |= running
    found = model.load_state_dict({k: tensor(v) for k, v in params.items()}, strict=False)
    print("missing:", {name.rpartition(".")[2] for name in found.missing_keys} or "nothing")
    print("unexpected:", found.unexpected_keys or "nothing")
    images, dlogits = rng.standard_normal((5, 3, 64, 64)), rng.standard_normal((5, 7))
    evaluated = model.eval()(tensor(images)).detach().numpy()
    print(f"evaluated logits: {distance(cmt_forward(images, params, c, False)[0], evaluated):.1e}")
    theirs = model.train()(tensor(images))
    (theirs * tensor(dlogits)).sum().backward()
    logits, cache = cmt_forward(images, params, c, True)
    grads = cmt_backward(dlogits, cache)
    print(f"logits in training: {distance(logits, theirs.detach().numpy()):.1e}")
    state = model.state_dict()
    moved = [distance(params[n] - 0.1 * grads[n], state[n].numpy()) for n in running]
    print(f"running statistics after a step, worst of {len(moved)}: {max(moved):.1e}")
    gradients = {name: p.grad.numpy() for name, p in model.named_parameters()}
    largest = max(map(np.linalg.norm, gradients.values()))
    zero = {n for n, g in gradients.items() if np.linalg.norm(g) < 1e-12 * largest}
    errors = {n: distance(grads[n], g) for n, g in gradients.items() if n not in zero}
    worst = max(errors, key=errors.get)
    print(f"gradients, worst of {len(errors)}: {errors[worst]:.1e} ({worst})")
    rest = max(np.linalg.norm(grads[n]) for n in zero) / largest
    print(f"gradients that are 0 in both: {len(zero)}, at most {rest:.1e} of the largest")
    for name in ("cmt_ti", "cmt_xs", "cmt_s", "cmt_b"):
        ours = CMT_VARIANTS[name]
        official = getattr(sys.modules["cmt"], name)(img_size=ours.img_size)
        count = sum(p.numel() for p in official.parameters())
        shapes = {n: tuple(v.shape) for n, v in official.state_dict().items()}
        same = cmt_shapes(ours) == {n: s for n, s in shapes.items() if "num_batches" not in n}
        print(f"{name}: {count:,} parameters, the same names and shapes: {same}")


class Filtered(nn.Module):
    """What stem and branches have in common; squeeze-excite where there is a hidden width."""

    def __init__(self, inside, out, kernel, stride, hidden=None):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(inside)
        self.depthwise = nn.Conv2d(inside, inside, kernel, stride, 1, groups=inside, bias=False)
        if hidden:
            self.se = nn.ModuleDict({"fc1": nn.Linear(inside, hidden)})
            self.se["fc2"] = nn.Linear(hidden, inside)
        self.project = nn.Conv2d(inside, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)

    def filtered(self, x):
        x = nn.functional.hardswish(self.bn1(x))
        x = nn.functional.hardswish(self.bn2(self.depthwise(x)))
        if hasattr(self, "se"):
            hidden = gelu(self.se["fc1"](x.mean((2, 3))))
            x = x * self.se["fc2"](hidden).sigmoid()[..., None, None]
        return self.bn3(self.project(x))


class Stem(Filtered):
    def __init__(self, channels, inside, out):
        super().__init__(inside, out, 3, 1)
        self.conv = nn.Conv2d(channels, inside, 3, 2, 1, bias=False)

    def forward(self, x):
        return nn.functional.hardswish(self.filtered(self.conv(x)))


class Branch(Filtered):
    def __init__(self, c, stride):
        super().__init__(c.expand_dim, c.embed_dim, stride + 1, stride, c.squeeze_dim)
        self.expand = nn.Conv2d(c.stem_dims[1], c.expand_dim, 1, bias=False)

    def forward(self, x):
        return self.filtered(self.expand(x)).flatten(2).transpose(1, 2)


class Fusion(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(c.num_tokens))
        self.fc1, self.fc2 = nn.Linear(c.embed_dim, c.fusion_dim), nn.Linear(c.fusion_dim, 1)

    def forward(self, x):
        content = self.fc2(gelu(self.fc1(x)))[..., 0].sigmoid()
        return torch.einsum("n,bn,bnd->bd", self.weight, content, x)


class Mobile(nn.Module):
    def __init__(self, c):
        super().__init__()
        D, P = c.embed_dim, c.patch_size
        if c.stem == "patches":
            self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(c.in_chans, D, P, P)})
        else:
            self.stem = Stem(c.in_chans, *c.stem_dims)
            self.branches = nn.ModuleList(Branch(c, stride) for stride in c.strides)
        self.pos_embed = nn.Parameter(torch.empty(1, c.num_tokens, D))
        if c.readout == "class_token":
            self.cls_token = nn.Parameter(torch.empty(1, 1, D))
        ratio = c.hidden_dim / D
        self.blocks = nn.Sequential(*(Block(D, c.num_heads, ratio) for _ in range(c.depth)))
        for block in self.blocks:
            block.norm1.eps = block.norm2.eps = 1e-6
        self.norm, self.head = nn.LayerNorm(D, 1e-6), nn.Linear(D, c.num_classes)
        if c.readout == "fusion":
            self.fusion = Fusion(c)

    def forward(self, images):
        if hasattr(self, "patch_embed"):
            x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        else:
            x = self.stem(images)
            x = torch.cat([branch(x) for branch in self.branches], 1)
        x = x + self.pos_embed
        if hasattr(self, "cls_token"):
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = self.norm(self.blocks(x))
        if hasattr(self, "fusion"):
            return self.head(self.fusion(x))
        return self.head(x[:, 0] if hasattr(self, "cls_token") else x.mean(1))


def mobile(stem, readout, strides, img_size):
    """Everything that the file holds about the network with this stem and read-out, by key."""
    rng = np.random.default_rng(len(stem) + len(readout))
    config = MobileConfig(stem, readout, strides, img_size, 4, 2, 5, 12, 2, 3, 10, (5, 6), 7, 3, 4)
    shapes = mobile_shapes(config)
    inputs = {k: random_parameter(rng, k, s).astype(np.float64) for k, s in shapes.items()}
    inputs |= {k: 0.5 + v * v for k, v in inputs.items() if k.endswith("running_var")}
    images, targets = rng.standard_normal((4, 2, *img_size)), rng.integers(5, size=4)
    model = Mobile(config)
    theirs = {k: v for k, v in model.state_dict().items() if not k.endswith("num_batches_tracked")}
    assert theirs.keys() == inputs.keys()
    model.load_state_dict(
        {k: tensor(inputs[k]).reshape(v.shape) for k, v in theirs.items()}, strict=False
    )
    case = {"config": json.dumps(vars(config)), "images": images, "targets": targets}
    logits = model.eval()(tensor(images))
    case |= {"evaluated": logits.detach().numpy()}
    case["evaluated_loss"] = cross_entropy(logits, tensor(targets)).item()
    logits = model.train()(tensor(images))
    loss = cross_entropy(logits, tensor(targets))
    loss.backward()
    case |= {"logits": logits.detach().numpy(), "loss": loss.item()}
    case |= {f"in/{name}": value for name, value in inputs.items()}
    grads = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    case |= {f"grad/{name}": grad.reshape(shapes[name]) for name, grad in grads.items()}
    after = {name: value.numpy() for name, value in model.state_dict().items()}
    case |= {f"after/{name}": after[name] for name in shapes if "running" in name}
    return {f"mobile_{stem}_{readout}/{key}": value for key, value in case.items()}


def jacobian_norms(seed):
    """(layer, ray, scale), at the experiment's weights and inputs."""
    params, rays = lipschitz.draw(seed)
    functions = {
        "dot": dot_product,
        "tied": lambda x, p, heads: by_distance(x, p, heads, False),
        "kim": lambda x, p, heads: by_distance(x, p, heads, True),
    }
    norms = np.zeros((len(functions), len(rays), len(lipschitz.SCALES)))
    for i, (layer, function) in enumerate(functions.items()):
        p = {name: tensor(value) for name, value in params[layer].items()}
        for j, (start, direction) in enumerate(rays.values()):
            for k, t in enumerate(lipschitz.SCALES):
                x = tensor(start + t * direction)
                jacobian = torch.autograd.functional.jacobian(
                    lambda x, f=function, p=p: f(x, p, lipschitz.HEADS), x
                )
                norms[i, j, k] = torch.linalg.matrix_norm(jacobian.reshape(x.numel(), -1), 2)
    return norms


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--official", metavar="DIR")
    official = parser.parse_args().official
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if official:
        return compare_with_official(official)
    rng = np.random.default_rng(0)
    cases = {
        "l2_attention": (
            {name: rng.standard_normal((2, HEADS, 5, 4)) for name in ("q", "v")},
            l2_attention,
        ),
        "tied_attention": attention_case(rng, False),
        "kim_attention": attention_case(rng, True),
        "spectral": (
            {"weight": rng.standard_normal((5, 7))},
            lambda weight: weight / torch.linalg.matrix_norm(weight, 2),
        ),
        "cosine": ({"h": rng.standard_normal((3, 6, 4))}, cosine),
        "contrastive": (
            {"h": rng.standard_normal((3, 6, 4))},
            lambda h: contrastive(h, tensor(np.sin(np.arange(72.0)).reshape(3, 6, 4))),
        ),
        "patch_mixing": (
            {
                "h": rng.standard_normal((3, 6, 4)),
                "weight": rng.standard_normal((5, 4)),
                "bias": rng.standard_normal(5),
            },
            lambda **inputs: patch_mixing(**inputs, labels=torch.arange(18).reshape(3, 6) % 5),
        ),
    }
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    content = {"versions": json.dumps(versions)}
    for name, (inputs, function) in cases.items():
        content |= make_case(name, rng, inputs, function)
    content |= convolutions(np.random.default_rng(1)) | normalised(np.random.default_rng(2))
    content |= whole_cmt("cmt") | whole_cmt("cmt_plain", local=False, ff_filter=False)
    for mixer in ("attention", "mlp", "conv", "gpsa"):
        content |= isotropic(mixer)
    rng = np.random.default_rng(3)
    for name, inputs, function in (
        (
            "modulated_norm",
            {"x": (2, 5, 4), "w": (2, 4), "gamma.weight": (4, 4), "gamma.bias": (4,)}
            | {"beta.weight": (4, 4), "beta.bias": (4,)},
            modulated_norm,
        ),
        ("modulated_linear", {"x": (7, 4), "a": (2, 5, 4), "weight": (6, 4)}, modulated_linear),
    ):
        inputs = {key: rng.standard_normal(shape) for key, shape in inputs.items()}
        content |= make_case(name, rng, inputs, function)
    content |= judged("dot") | judged("l2") | adversarial()
    content |= mobile("conv", "fusion", (2, 4), (16, 8))
    content |= mobile("conv", "mean", (3, 2), (12, 24))
    content |= mobile("patches", "class_token", (2,), (8, 12))
    for blocks in (0, 2, 3):  # of three: a ViT, a ConViT, and no class token at all
        content |= diversified(blocks)
    content |= {f"lipschitz/{seed}": jacobian_norms(seed) for seed in range(3)}
    np.savez_compressed(OUTPUT, **content)
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
