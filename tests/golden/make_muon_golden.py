"""Writes muon.npz: how PyTorch's own Muon moves random matrices, in float64.

The tests read the file with NumPy alone. Making it again needs PyTorch 2.9 or newer:

    pip install -e ".[bench]"
    python tests/golden/make_muon_golden.py

PyTorch rounds the matrix to bfloat16 before it makes it orthogonal. Here that one method does
nothing, so that all of its arithmetic is float64. Its keys:

    version                       PyTorch's
    shapes                        JSON: a list of (out, in)
    settings                      JSON: what torch.optim.Muon is made with; lrs: the steps' rates
    I/params                      (5, out, in): the matrix I before the first and after each step
    I/grads                       (4, out, in)
    I/momentum                    (out, in): its buffer after the last step
"""

import json
from pathlib import Path

import numpy as np
import torch

OUTPUT = Path(__file__).with_name("muon.npz")
SHAPES = [(6, 6), (5, 9), (9, 5), (16, 4), (3, 17), (1, 7), (7, 1)]
SETTINGS = {"weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
LRS = [0.02, 0.5, 0.1, 0.003]


def main():
    torch.Tensor.bfloat16 = torch.Tensor.clone
    rng = np.random.default_rng(20)
    arrays = {}
    for i, shape in enumerate(SHAPES):
        p = torch.nn.Parameter(torch.from_numpy(rng.standard_normal(shape)))
        optimizer = torch.optim.Muon([p], **SETTINGS)
        params, grads = [p.detach().numpy().copy()], []
        for step, lr in enumerate(LRS):
            grads.append(10.0 ** (step - 2) * rng.standard_normal(shape))
            p.grad = torch.from_numpy(grads[-1].copy())
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
            params.append(p.detach().numpy().copy())
        arrays[f"{i}/params"], arrays[f"{i}/grads"] = np.stack(params), np.stack(grads)
        arrays[f"{i}/momentum"] = optimizer.state[p]["momentum_buffer"].numpy()
    settings = SETTINGS | {"lrs": LRS}
    texts = {"version": torch.__version__}
    texts |= {"shapes": json.dumps(SHAPES), "settings": json.dumps(settings)}
    np.savez_compressed(OUTPUT, **texts, **arrays)


if __name__ == "__main__":
    main()
