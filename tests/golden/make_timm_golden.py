"""Writes timm.npz: what timm's ConViT computes for random parameters, in float64.

The tests read the file with NumPy alone. Making it again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_timm_golden.py

The same machine and versions give the same file, byte for byte. Its keys:

    versions, cases               JSON: {"timm": ..., "torch": ..., "numpy": ...} and the case names
    CASE/config                   JSON: the fields of ConViTConfig
    CASE/label_smoothing          ()
    CASE/images, CASE/labels      (B, in_chans, height, width) and (B,)
    CASE/logits, CASE/loss        (B, C) and ()
    CASE/param/NAME               in the order of timm's state dict
    CASE/grad/NAME                the gradient of the loss; zeros where autograd gives none
    CASE/adamw                    JSON: the optimizer's settings; this and the rest in some cases
    CASE/steps/images, /labels    (10, B, in_chans, height, width), (10, B): a batch per step
    CASE/steps/losses             (10,): each before its step
    CASE/steps/norms              of every tensor after the last step, in state dict order
"""

import json
from pathlib import Path

import numpy as np
import timm
import torch
from timm.models.convit import ConVit
from timm.optim import param_groups_weight_decay
from torch.nn.functional import cross_entropy

OUTPUT = Path(__file__).with_name("timm.npz")
BATCH = 3
STEPS = 10

SHAPE = ["img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads"]
DEFAULTS = {
    "in_chans": 3,
    "mlp_ratio": 4.0,
    "qkv_bias": False,
    "locality_strength": 1.0,
    "use_pos_embed": True,
    "drop_path_rate": 0.0,
}


def make_config(*shape, local_up_to_layer, **changes):
    """The fields of ConViTConfig, those of SHAPE by position; embed_dim is the full width D."""
    shape = dict(zip(SHAPE, shape, strict=True))
    return DEFAULTS | shape | {"local_up_to_layer": local_up_to_layer} | changes


# timm knows square grids only; it cuts 49.5 hidden units down to 49.
CONFIGS = {
    "one_head": make_config(12, 4, 3, 16, 2, 1, local_up_to_layer=1),
    "two_heads": make_config(10, 2, 4, 18, 3, 2, local_up_to_layer=1, mlp_ratio=2.75),
    "four_heads": make_config(32, 8, 5, 24, 4, 4, local_up_to_layer=2),
    "nine_heads": make_config(14, 2, 7, 36, 3, 9, local_up_to_layer=2),
    "one_channel": make_config(20, 4, 6, 20, 3, 4, local_up_to_layer=2, in_chans=1),
    "qkv_bias": make_config(16, 4, 5, 16, 3, 4, local_up_to_layer=2, qkv_bias=True),
    "no_pos_embed": make_config(6, 2, 2, 16, 2, 4, local_up_to_layer=1, use_pos_embed=False),
    "no_gpsa": make_config(28, 4, 4, 18, 2, 3, local_up_to_layer=0),
    "all_gpsa": make_config(20, 4, 6, 18, 3, 9, local_up_to_layer=3),
    "local_beyond_depth": make_config(24, 8, 3, 16, 2, 4, local_up_to_layer=5),
}
LABEL_SMOOTHING = {"two_heads": 0.1, "nine_heads": 0.1, "no_gpsa": 0.1, "all_gpsa": 0.1}
ADAMW = {
    "four_heads": {"lr": 1e-3, "weight_decay": 0.05, "betas": [0.9, 0.999], "eps": 1e-8},
    "nine_heads": {"lr": 3e-3, "weight_decay": 0.05, "betas": [0.9, 0.999], "eps": 1e-8},
    "all_gpsa": {"lr": 1e-3, "weight_decay": 0.2, "betas": [0.8, 0.99], "eps": 1e-6},
}


def random_parameter(rng, name, shape):
    """One tensor, such that logits are of order 1 and attention is far from uniform.

    Rounded to float16: exact in float64 all the same, and a quarter of the size.
    """
    noise = rng.standard_normal(shape)
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
    return value.astype(np.float16)


def random_batch(rng, config, *leading):
    """Images (*leading, in_chans, height, width), in float16 for size, and labels (*leading,)."""
    shape = (*leading, config["in_chans"], config["img_size"], config["img_size"])
    images = rng.standard_normal(shape).astype(np.float16)
    return images, rng.integers(config["num_classes"], size=leading)


def compute_loss(model, images, labels, label_smoothing):
    """Logits and mean loss of a batch, in float64."""
    logits = model(torch.from_numpy(images).double())
    return logits, cross_entropy(logits, torch.from_numpy(labels), label_smoothing=label_smoothing)


def take_steps(model, adamw, images, labels, label_smoothing):
    """`STEPS` AdamW steps, each on its own batch: the losses before each step, (STEPS,).

    timm chooses what is decayed: neither 1-D tensors nor pos_embed and cls_token.
    """
    settings = dict(adamw)
    groups = param_groups_weight_decay(
        model, settings.pop("weight_decay"), no_weight_decay_list=model.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, **settings)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = compute_loss(model, images[step], labels[step], label_smoothing)[1]
        loss.backward()
        for name, parameter in model.named_parameters():
            # A bias shared by all keys leaves the softmax as it is: its exact gradient is 0. What
            # autograd finds is rounding noise, and AdamW divides a gradient by its own size.
            if name.endswith("pos_proj.bias"):
                parameter.grad.zero_()
        optimizer.step()
        losses.append(loss.item())
    return np.array(losses)


def make_case(name, seed):
    """Everything that the file holds about one case, by key."""
    rng = np.random.default_rng(seed)
    config = CONFIGS[name]
    label_smoothing = LABEL_SMOOTHING.get(name, 0.0)
    # timm takes the width of one head.
    model = ConVit(**config | {"embed_dim": config["embed_dim"] // config["num_heads"]}).eval()
    params = {k: random_parameter(rng, k, v.shape) for k, v in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v).double() for k, v in params.items()})

    images, labels = random_batch(rng, config, BATCH)
    labels[1:] = labels[0], (labels[0] + 1) % config["num_classes"]  # one class twice
    logits, loss = compute_loss(model, images, labels, label_smoothing)
    loss.backward()
    case = {
        "config": json.dumps(config),
        "label_smoothing": label_smoothing,
        "images": images,
        "labels": labels,
        "logits": logits.detach().numpy(),
        "loss": loss.item(),
    }
    case |= {f"param/{k}": v for k, v in params.items()}
    for k, parameter in model.named_parameters():
        # The class token is never used where every block is local.
        unused = parameter.grad is None
        case[f"grad/{k}"] = np.zeros(parameter.shape) if unused else parameter.grad.numpy().copy()

    if name in ADAMW:
        images, labels = random_batch(rng, config, STEPS, BATCH)
        losses = take_steps(model, ADAMW[name], images, labels, label_smoothing)
        norms = np.array([value.norm().item() for value in model.state_dict().values()])
        case |= {"adamw": json.dumps(ADAMW[name]), "steps/images": images, "steps/labels": labels}
        case |= {"steps/losses": losses, "steps/norms": norms}
    return {f"{name}/{k}": v for k, v in case.items()}


def main():
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    packages = {"timm": timm, "torch": torch, "numpy": np}
    versions = {name: package.__version__ for name, package in packages.items()}
    content = {"versions": json.dumps(versions), "cases": json.dumps(list(CONFIGS))}
    for seed, name in enumerate(CONFIGS):
        content |= make_case(name, seed)
    np.savez_compressed(OUTPUT, **content)
    print(f"{OUTPUT.name}: {OUTPUT.stat().st_size} bytes, {len(CONFIGS)} cases, {versions}")


if __name__ == "__main__":
    main()
