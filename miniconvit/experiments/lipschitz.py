"""Is an attention layer Lipschitz? Its Jacobian's norm along two rays that leave the origin.

No training: random weights, one layer, float64. ViTGAN (Lee et al. 2021) takes it from Kim,
Papamakarios and Mnih (2021) that attention by distance has a bounded Jacobian.
"""

import csv
import io

import numpy as np

from ..analysis import style
from ..errors import UserError
from ..layers import mhsa_backward, mhsa_forward
from ..neighbours import kim_attention_backward as kim_backward
from ..neighbours import kim_attention_forward as kim_forward
from ..neighbours import tied_attention_backward as tied_backward
from ..neighbours import tied_attention_forward as tied_forward
from ..neighbours.lipschitz import jacobian_norm, kim_bound
from ..system import write_file
from .plan import PLAN

TOKENS, WIDTH, HEADS = 16, 16, 4
SCALES = (1, 4, 16, 64, 256)
LAYERS = {
    "dot": ("dot product", mhsa_forward, mhsa_backward),
    "tied": ("distance, free values (ViTGAN)", tied_forward, tied_backward),
    "kim": ("distance, values through W_q too (Kim)", kim_forward, kim_backward),
}
RAYS = {
    "generic": "t x, where one token of x is 0",
    "null": "x + t z, where head 1 does not see z",
}
SLOPES = {("dot", "generic"): 2, ("tied", "generic"): 0, ("tied", "null"): 1}
SLOPES |= {("kim", "generic"): 0, ("kim", "null"): 0}
"""(layer, ray) to the power of t that the norm must grow with, or the verdict is no."""
TOLERANCE = 0.05  # of a slope, taken between the last two scales


def draw(seed):
    """({layer: params}, {ray: (start, direction) (1, N, D) each}), from seed alone.

    The three layers share queries, values and proj. head 1's queries of the null ray do not change:
    its direction is orthogonal to the rows of that head's W_q.
    """
    rng = np.random.default_rng(seed)
    q, k, v, proj = rng.standard_normal((4, WIDTH, WIDTH)) * WIDTH**-0.5
    proj = {"proj.weight": proj, "proj.bias": np.zeros(WIDTH)}
    tied = proj | {"qv.weight": np.concatenate([q, v])}
    params = {"dot": proj | {"qkv.weight": np.concatenate([q, k, v])}, "tied": tied, "kim": tied}
    x, base, z = rng.standard_normal((3, 1, TOKENS, WIDTH))
    x[0, 0] = 0.0
    *_, rows = np.linalg.svd(q[: WIDTH // HEADS])
    unseen = rows[WIDTH // HEADS :]  # (D - d, D), orthonormal
    return params, {"generic": (0.0 * x, x), "null": (0.3 * base, z @ unseen.T @ unseen)}


def measure(seed):
    """({(layer, ray): norms at SCALES}, Kim's bound)."""
    params, rays = draw(seed)
    norms = {}
    for layer, (_, forward, backward) in LAYERS.items():
        for ray, (start, direction) in rays.items():
            norms[layer, ray] = [
                jacobian_norm(
                    lambda x, f=forward, p=params[layer]: f(x, p, HEADS),
                    lambda dy, cache, b=backward: b(dy, cache)[0],
                    start + t * direction,
                )
                for t in SCALES
            ]
    return norms, kim_bound(params["kim"], HEADS, TOKENS)


def slope(norms):
    """The power of t that the norms grow with, between the last two scales."""
    return float(np.log(norms[-1] / norms[-2]) / np.log(SCALES[-1] / SCALES[-2]))


def run(out, seeds, pictures):
    """Measures every seed, writes table.md, table.csv and, with pictures, lipschitz.png into the
    folder out. Returns the text of table.md and the files' names. Raises UserError where another
    experiment lies there."""
    if (out / PLAN).exists():
        raise UserError(f"{out} holds the plan of another experiment: choose another --out")
    found = [measure(seed) for seed in range(seeds)]
    out.mkdir(parents=True, exist_ok=True)
    text, names = _markdown(found), ["table.md", "table.csv"]
    write_file(out / "table.md", text.encode())
    write_file(out / "table.csv", _csv(found).encode())
    if pictures:
        names.append("lipschitz.png")
        _draw(found, out / names[-1])
    return text, names


def _csv(found):
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["seed", "layer", "ray", "scale", "norm", "kim_bound"])
    for seed, (norms, bound) in enumerate(found):
        for (layer, ray), values in norms.items():
            writer.writerows(
                [seed, layer, ray, t, repr(value), repr(bound) if layer == "kim" else ""]
                for t, value in zip(SCALES, values, strict=True)
            )
    return lines.getvalue()


def _markdown(found):
    lines = [
        "# lipschitz: the Jacobian's norm of one attention layer",
        "",
        f"{TOKENS} tokens, {WIDTH} features, {HEADS} heads, random weights, float64. Each norm is "
        "the largest singular value of the layer's Jacobian, one backward pass a row. A layer is "
        "Lipschitz if and only if these norms stay below one number everywhere. Norms are of seed "
        f"0, slopes of {len(found)} seed{'s' * (len(found) > 1)}: the power of t between "
        f"{SCALES[-2]} and {SCALES[-1]}.",
    ]
    for ray, story in RAYS.items():
        lines += ["", f"## {story}", ""]
        lines += [f"| layer | {' | '.join(f't = {t}' for t in SCALES)} | slope | must be |"]
        lines += ["| --- " * (len(SCALES) + 3) + "|"]
        for layer, (label, *_) in LAYERS.items():
            norms = " | ".join(
                f"{value:,.{0 if value >= 100 else 2}f}" for value in found[0][0][layer, ray]
            )
            slopes = ", ".join(f"{round(slope(each[layer, ray]), 2) + 0:.2f}" for each, _ in found)
            lines.append(f"| {label} | {norms} | {slopes} | {SLOPES.get((layer, ray), '')} |")
    return "\n".join([*lines, "", *(f"- {sentence}." for sentence in verdicts(found))]) + "\n"


def verdicts(found):
    """Sentences: whether each slope is what it must be, and Kim's norms against their bound."""
    for (layer, ray), expected in SLOPES.items():
        off = max(abs(slope(norms[layer, ray]) - expected) for norms, _ in found)
        answer = "yes" if off <= TOLERANCE else "NO"
        yield (
            f"Slope {expected} of {LAYERS[layer][0]}, {ray} ray, to {TOLERANCE:g}: {answer}, "
            f"at most {off:.1g} off"
        )
    shares = [max(norms["kim", ray]) / bound for norms, bound in found for ray in RAYS]
    answer = "yes" if max(shares) <= 1 else "NO"
    bounds = ", ".join(f"{bound:.0f}" for _, bound in found)
    yield (
        f"Kim's norms below the theorem's bound ({bounds}): {answer}, "
        f"at most {max(shares):.2g} of it"
    )


@style.look()
def _draw(found, path):
    figure, (axes,) = style.new_figure(1, 2, height=2.9, sharey=True)
    colors = {"dot": style.VERMILION, "tied": style.BLUE, "kim": style.GREEN}
    for axis, (ray, story) in zip(axes, RAYS.items(), strict=True):
        for layer, (label, *_) in LAYERS.items():
            for seed, (norms, _) in enumerate(found):
                name = label if seed == 0 else None
                axis.loglog(SCALES, norms[layer, ray], "o-", color=colors[layer], label=name)
        for seed, (_, bound) in enumerate(found):
            name = "bound of Kim's theorem" if seed == 0 else None
            axis.axhline(bound, color=colors["kim"], linestyle="--", linewidth=0.8, label=name)
        axis.set_xticks(SCALES, [str(t) for t in SCALES])
        axis.minorticks_off()
        axis.set_xlabel("t")
        axis.set_title(story)
    axes[0].set_ylabel("norm of the Jacobian")
    axes[0].legend(loc="upper left")
    if len(found) > 1:
        figure.supxlabel(f"a line for each of {len(found)} seeds", fontsize=7)
    style.save(figure, path)
