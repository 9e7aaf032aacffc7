"""Writes neighbours.npz: what torch's autograd finds for the papers beside ConViT, in float64.

The tests read the file with NumPy alone. Making it again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_neighbours_golden.py

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
    isotropic_MIXER/...     a whole network, a pair of its parameters, with config, images, mask
    mobile_STEM_READOUT/... a whole network in training: config (JSON), images, targets, logits,
                            loss, in/NAME and grad/NAME of parameters; after/NAME, its running
                            statistics after the step; evaluated and evaluated_loss before it
    lipschitz/SEED          (layer, ray, scale): 2-norms of Jacobians, in the experiment's order
"""

import json
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
    gelu,
    layer_norm,
    linear,
    scaled_dot_product_attention,
)

from miniconvit.experiments import lipschitz
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


class Filtered(nn.Module):
    """What stem and branches have in common; squeeze-excite where there is a hidden width."""

    def __init__(self, inside, out, kernel, stride, hidden=None):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(inside), nn.BatchNorm2d(inside)
        self.depthwise = nn.Conv2d(inside, inside, kernel, stride, 1, groups=inside)
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
        return self.filtered(self.conv(x))


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
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
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
    for mixer in ("attention", "mlp", "conv", "gpsa"):
        content |= isotropic(mixer)
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
