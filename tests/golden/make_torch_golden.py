"""Writes torch_*.pth and torch_files.npz: files that torch.save wrote, and what they hold.

The tests read them with NumPy alone. Making them again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_torch_golden.py

torch_model.pth         {"model": state dict, "epoch": 7} of timm's ConVit(**MODEL), float32
torch_model_legacy.pth  the bare state dict in the format before PyTorch 1.6
torch_tensors.pth       a dict of odd tensors: views, types, a parameter, no elements, no axes
torch_tensors_legacy.pth    the same in the older format
torch_files.npz         model/NAME, tensors/NAME: what they hold; images, logits: of the model,
                        float64; and of timm's bicubic interpolation:
    pos_embed           (1, 5 * 7, 3) float64
    resampled/RxC       (1, R * C, 3) float64, of torch's interpolate in that precision
"""

from pathlib import Path

import numpy as np
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.convit import ConVit
from torch.nn.functional import interpolate

HERE = Path(__file__).parent
MODEL = {
    "img_size": 12,
    "patch_size": 4,
    "num_classes": 5,
    "embed_dim": 2,  # of a head
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "local_up_to_layer": 2,
}
GRID = (5, 7)
GRIDS = [(5, 7), (7, 5), (14, 14), (3, 4), (2, 15), (1, 1), (10, 14)]


def make_tensors():
    """Every kind of tensor that the reader knows."""
    base = torch.arange(24.0).reshape(4, 6) / 7
    return {
        "whole": base,
        "transposed": base.T,
        "middle": base[1:3, 2:5],
        "every_other": base[::2, 1::3],
        "half": (base[0] - 1).half(),
        "bfloat16": (base[1] * -300).bfloat16(),
        "double": base.double() ** 3,
        "parameter": torch.nn.Parameter(base[3].clone()),
        "no_axes": torch.tensor(2.5),
        "no_elements": torch.zeros(0, 3),
        "long": torch.tensor([2**40, -1]),
        "int": torch.tensor([7, -8], dtype=torch.int32),
        "short": torch.tensor([-300], dtype=torch.int16),
        "char": torch.tensor([-3, 3], dtype=torch.int8),
        "byte": torch.tensor([200], dtype=torch.uint8),
        "bool": torch.tensor([True, False]),
    }


def interpolated(pos_embed, grid):
    """timm's own answer is in float32; torch's in float64 must agree with it."""
    theirs = resample_abs_pos_embed(pos_embed, grid, GRID, num_prefix_tokens=0)
    image = pos_embed.reshape(1, *GRID, -1).permute(0, 3, 1, 2)
    image = interpolate(image, grid, mode="bicubic", antialias=True)
    exact = image.permute(0, 2, 3, 1).reshape(1, -1, pos_embed.shape[2])
    assert torch.allclose(theirs, exact, atol=1e-6)
    return exact.numpy()


def main():
    torch.manual_seed(3)
    model = ConVit(**MODEL).eval()
    state = {name: torch.randn(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    state = model.state_dict()
    tensors = make_tensors()
    old = {"_use_new_zipfile_serialization": False}
    torch.save({"model": state, "epoch": 7}, HERE / "torch_model.pth")
    torch.save(state, HERE / "torch_model_legacy.pth", **old)
    torch.save(tensors, HERE / "torch_tensors.pth")
    torch.save(tensors, HERE / "torch_tensors_legacy.pth", **old)

    content = {f"model/{name}": value.numpy().copy() for name, value in state.items()}
    for name, value in tensors.items():
        value = value.detach().clone()
        value = value.float() if value.dtype in (torch.half, torch.bfloat16) else value
        content[f"tensors/{name}"] = value.numpy()
    images = torch.randn(2, 3, 12, 12, dtype=torch.float64)
    logits = model.double()(images)
    content |= {"images": images.numpy(), "logits": logits.detach().numpy()}
    pos_embed = torch.randn(1, GRID[0] * GRID[1], 3, dtype=torch.float64)
    content["pos_embed"] = pos_embed.numpy()
    for rows, cols in GRIDS:
        content[f"resampled/{rows}x{cols}"] = interpolated(pos_embed, (rows, cols))
    np.savez_compressed(HERE / "torch_files.npz", **content)
    for path in sorted(HERE.glob("torch_*")):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
