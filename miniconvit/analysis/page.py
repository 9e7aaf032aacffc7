"""One page in which a model is seen at work: `miniconvit inspect --page`. It needs no network.

A small model goes into the page whole, in float32, and runs there. Of a larger one the page holds q
and k of its layers, rounded to 24 bits, about as finely as float32.
"""

import json
import os
from base64 import b64encode
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

import numpy as np

from ..data import normalize
from ..errors import UserError, printable
from ..layers import softmax_forward
from ..system import write_file
from .maps import on_cpu, uniform_nonlocality, visit_attention
from .readings import decode_positions, gates
from .style import MAPS

MOST_BYTES = 3_000_000
MOST_IMAGES, MOST_EPOCHS = 10, 200
MOST_PRODUCTS = 1e8  # in a forward pass in the browser, a fraction of a second
ROOM = 100_000  # for what is written around the data
TUTORIALS = Path(__file__).parents[2] / "tutorials"  # in a checkout
SCRIPTS = ("attention.js", "convit.js", "numbers.js", "draw.js", "words.js", "page.js")


@dataclass(frozen=True)
class Picture:
    """pixels: uint8 (in_chans, height, width); name: what it is called; truth: the index of its
    class, or None."""

    pixels: np.ndarray
    name: str
    truth: int | None = None


def write_page(path, model, pictures, history=(), title="", classes=None):
    """Writes the page of a Checkpoint and some Pictures to path. Returns what it leaves out, a
    list of sentences.

    history: as run_history gives it; classes: names, or None. Raises UserError where a picture
    has no finite answer, or one layer of one picture is too large for a page.
    """
    path = Path(path)
    data, left_out = _page_data(model, list(pictures), list(history), classes)
    folder = os.path.relpath(TUTORIALS, path.absolute().parent) if TUTORIALS.is_dir() else None
    data |= {"title": title, "leftOut": left_out, "tutorials": folder and quote(folder)}
    text = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    parts = {
        name: files(__package__).joinpath("web", name).read_text()
        for name in ("page.css", *SCRIPTS)
    }
    parts |= {"palette": _palette(), "data": text}
    page = files(__package__).joinpath("web", "page.html").read_text().split("%%")
    page[1::2] = [parts[name] for name in page[1::2]]
    write_file(path, "".join(page).encode())
    return left_out


def _page_data(model, pictures, history, classes):
    """(what the page's program is given, in JSON types, sentences on what is left out)."""
    config, params = model.config, model.params
    gate, position = gates(params, config), decode_positions(params, config)
    data = {
        "grid": config.grid,
        "size": config.image,
        "heads": config.num_heads,
        "classTokenJoins": config.local_up_to_layer,
        "mean": [float(value) for value in model.mean],
        "std": [float(value) for value in model.std],
        "classes": list(classes) if classes else None,
        "uniform": uniform_nonlocality(config.grid),
        "history": _history(history),
        "layers": [
            {
                "kind": "gpsa" if i in gate else "psa" if i in position else "mhsa",
                "gate": gate[i].tolist() if i in gate else None,
                "position": _position_weights(params, i) if i in position else None,
            }
            for i in range(config.depth)
        ],
    }
    used = ROOM + len(json.dumps(data))
    answers = len(json.dumps([1e-7] * config.num_classes))
    picture = answers + _base64_bytes(pictures[0].pixels.size)
    whole = _base64_bytes(4 * sum(value.size for value in params.values()))
    data["params"] = None
    N, D = config.num_patches, config.embed_dim
    products = config.depth * N * D * (4 * D + 2 * config.hidden_dim + 2 * N)
    if used + whole + picture <= MOST_BYTES and products <= MOST_PRODUCTS:
        data["params"] = _whole_model(params)
        layers, count = [], (MOST_BYTES - used - whole) // picture
    else:
        layers, count = _room_for(config, MOST_BYTES - used, picture)
    count = min(count, len(pictures))
    data["images"] = [_image(picture, model, layers) for picture in pictures[:count]]
    left_out = []
    if count < len(pictures):
        left_out.append(f"This page holds {count} of {len(pictures)} images: a page has 3 MB.")
    if layers and len(layers) < config.depth:
        numbers = ", ".join(str(i + 1) for i in layers)
        left_out.append(f"Of {config.depth} layers it holds {numbers}: a page has 3 MB.")
    return data, left_out


def _room_for(config, room, picture):
    """(layers, number of images) of which q and k fit: all layers, or else some for one image, as
    evenly as can be, the last among them."""
    tokens = config.num_patches + config.has_cls_token
    layer = _base64_bytes(3 * 2 * tokens * config.embed_dim)
    count = room // (picture + config.depth * layer)
    if count >= 1:
        return list(range(config.depth)), count
    held = (room - picture) // layer
    if held < 1:
        raise UserError(
            f"one layer of this model takes {layer / 1e6:.1f} MB and a page has 3: "
            "draw pictures of it with --out FOLDER"
        )
    return [-(-(i + 1) * config.depth // held) - 1 for i in range(held)], 1


def _image(picture, model, layers):
    """A picture, the model's answer to it, and q and k of these layers: (2, H, M, d) each."""
    dtype = model.params["head.weight"].dtype
    image = normalize(picture.pixels[None], model.mean, model.std, dtype)
    seen = []

    def visit(maps):  # keeps no more than the page needs
        wanted = len(seen) in layers
        seen.append(np.stack([on_cpu(maps.q)[0], on_cpu(maps.k)[0]]) if wanted else None)

    logits = visit_attention(image, model.params, model.config, visit)
    probabilities = on_cpu(softmax_forward(logits)[0])[0]
    qk = {i: seen[i] for i in layers}
    if not all(np.isfinite(values).all() for values in (probabilities, *qk.values())):
        raise UserError(
            f"this model gives no finite answer for {printable(picture.name)}: use another"
        )
    return {
        "name": picture.name,
        "truth": picture.truth,
        "pixels": _base64(picture.pixels),
        "probabilities": [float(f"{value:.7g}") for value in probabilities],
        "qk": {i: _rounded(values) for i, values in qk.items()},
    }


def _whole_model(params):
    """All parameters, one after the other, and their names and shapes."""
    arrays = {name: on_cpu(value).astype("<f4") for name, value in params.items()}
    numbers = b"".join(value.tobytes() for value in arrays.values())
    shapes = [[name, value.shape] for name, value in arrays.items()]
    return {"shapes": shapes, "numbers": b64encode(numbers).decode()}


def _rounded(values):
    """Numbers as multiples of a step: {"step", "numbers"}, 24 bits each, the lowest byte first."""
    step = max(float(np.abs(values).max()), 1e-30) / (2**23 - 1)
    numbers = np.rint(values / step).astype("<i4")
    return {"step": step, "numbers": _base64(numbers[..., None].view("u1")[..., :3])}


def _position_weights(params, i):
    return on_cpu(params[f"blocks.{i}.attn.pos_proj.weight"]).tolist()


def _history(history):
    """Readings of at most MOST_EPOCHS epochs, the first and the last among them, or None."""
    if not history:
        return None
    count = min(len(history), MOST_EPOCHS)
    history = [history[i] for i in np.linspace(0, len(history) - 1, count).round().astype(int)]
    readings = {name: [row[name] for _, row in history] for name in ("gates", "nonlocality")}
    strengths = [row["strengths"] for _, row in history]
    return {"epochs": [epoch for epoch, _ in history], "strengths": strengths} | readings


def _palette():
    """style.MAPS as custom properties of CSS: --content-0 is nothing, --content-2 is most."""
    return "".join(
        f"--{kind}-{i}: {color};" for kind, colors in MAPS.items() for i, color in enumerate(colors)
    ).replace("white", "#ffffff")


def _base64(array):
    return b64encode(np.ascontiguousarray(array).tobytes()).decode()


def _base64_bytes(size):
    return -(-size // 3) * 4
