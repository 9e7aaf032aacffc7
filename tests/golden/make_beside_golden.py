"""Writes beside*.pth, views.pth and lone.pth: what people's scripts save with a state dict.

The tests read them with NumPy alone. Making them again needs the extra `parity`:

    pip install -e ".[parity]"
    python tests/golden/make_beside_golden.py

beside.pth          {"model": {"a": ..., "b": ...}, NAME: an object of each kind of BESIDE}
beside_legacy.pth   the same in the format before PyTorch 1.6, by protocol 4 of pickle
views.pth           negated, expanded, with attributes, in tuples: what is written below
lone.pth            one tensor
"""

import collections
import datetime
import decimal
import fractions
import functools
import http
import random
import re
import types
import uuid
from pathlib import Path, PurePosixPath

import numpy as np
import torch

HERE = Path(__file__).parent


class Thing(dict):
    """A class that the reader cannot know."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.colour = "red"


def trained(model):
    """An optimizer and a scheduler after a step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 5])
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer, scheduler


def make_beside():
    """An object of each kind."""
    torch.manual_seed(4)
    model = torch.nn.Linear(2, 1)
    optimizer, scheduler = trained(model)
    looped = []
    looped.append((looped,))
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": scheduler.state_dict(),
        "whole optimizer": optimizer,
        "whole model": model,
        "namespace": types.SimpleNamespace(lr=0.1, weights=torch.ones(2)),
        "thing": Thing(x=1, y=torch.ones(1)),
        "set": {1, "two"},
        "frozenset": frozenset([3]),
        "counter": collections.Counter("aab"),
        "defaultdict": collections.defaultdict(list, loss=[0.5]),
        "deque": collections.deque([1, 2], maxlen=9),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "generator": torch.get_rng_state()[:4].clone(),
        "path": PurePosixPath("a/b"),
        "date": datetime.datetime(2024, 5, 6),
        "enum": http.HTTPStatus.OK,
        "partial": functools.partial(int, base=2),
        "function": len,
        "class": int,
        "numpy number": np.float32(1.5),
        "numpy array": np.arange(3),
        "numpy dtype": np.dtype("i2"),
        "numpy random": np.random.RandomState(0).get_state()[0:1],
        "numpy generator": np.random.default_rng(0).bit_generator.state["state"],
        "random": random.Random(0).getstate()[:1],
        "complex": 1 + 2j,
        "decimal": decimal.Decimal("0.1"),
        "fraction": fractions.Fraction(1, 3),
        "range": range(3),
        "slice": slice(1, 2),
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "pattern": re.compile("a+"),
        "uuid": uuid.UUID(int=5),
        "large": 2**3000,
        "looped": looped,
        "odd keys": {None: 1, (1, 2): 2, True: 3, 0.5: 4, 7: 5},
        "complex tensor": torch.ones(2, dtype=torch.complex64),
        "float8 tensor": torch.ones(2).to(torch.float8_e5m2),
        "uint16 tensor": torch.ones(2, dtype=torch.uint16),
        "sparse tensor": torch.eye(2).to_sparse(),
        "meta tensor": torch.empty(2, device="meta"),
        "storage": torch.ones(3).untyped_storage(),
    }


def make_views():
    """Tensors that are no plain block of their storage, and where they may stand."""
    base = torch.arange(6.0).reshape(2, 3) + 1
    attributed = torch.nn.Parameter(base[0] * 3)
    attributed.decay = False
    tensor = base[1] * 5
    tensor.note = "a"
    return {
        "base": base,
        "negative": torch.view_as_complex(torch.arange(6.0).reshape(3, 2)).conj().imag,
        "negated part": torch._neg_view(base)[:, 1:],
        "expanded": base[:, :1].expand(2, 4),
        "scalar expanded": torch.tensor(2.5).expand(3, 2),
        "parameter with attributes": attributed,
        "tensor with attributes": tensor,
        "tuple": (base.T, [(base[0],)]),
    }


def main():
    old = {"_use_new_zipfile_serialization": False, "pickle_protocol": 4}
    beside = {"model": {"a": torch.arange(3.0), "b": torch.ones(2).bfloat16()}} | make_beside()
    torch.save(beside, HERE / "beside.pth")
    torch.save(beside, HERE / "beside_legacy.pth", **old)
    torch.save(make_views(), HERE / "views.pth")
    torch.save(make_views(), HERE / "views_legacy.pth", **old)
    torch.save(torch.tensor([[1.0, 2.0]]), HERE / "lone.pth")
    for path in sorted(HERE.glob("*.pth")):
        print(f"{path.name}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main()
