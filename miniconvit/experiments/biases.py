"""How much bias? Networks that differ in how tokens mix alone reconstruct hidden patches.

The question is Cazenavette and Lucey's (2021); the protocol is ours, "after" their paper: half of
the patches are hidden, the error is the mean square on them, and a ridge regression on the means of
tokens after all blocks says what was learned of classes. All arms have the same number of
parameters, up to half a per cent.

The rules, fixed before the runs. Of the four mixers (attention, MLP, filters, GPSA with a gate of
1/2) attention ends with the largest error in every seed. And GPSA's gate is a dial: at 1/2 and at 1
it closes at least half of the gap between gate 0 and filters, in every seed. The probe is reported,
whatever it says.
"""

import csv
import io
import json
from contextlib import suppress
from dataclasses import asdict, replace
from statistics import mean, stdev

import numpy as np
from tqdm import tqdm

from ..analysis import style
from ..arrays import to_cpu, to_device
from ..checkpoints.checkpoint import LAST, load_checkpoint, save_checkpoint
from ..data import epoch_order, load_dataset, normalize, on_device
from ..engine import make_engine
from ..engine.cuda import resolve_device, without_reason
from ..errors import UserError
from ..neighbours.isotropic import (
    IsotropicConfig,
    hidden_patches,
    init_isotropic,
    isotropic_forward,
    isotropic_shapes,
    patches_of,
)
from ..optim import AdamW, warmup_cosine
from ..system import write_file
from ..training.objectives import Masked
from .plan import PLAN, open_one_plan

ARMS = {
    "conv": ("3x3 filters", {"mixer": "conv"}),
    "gpsa-1": ("GPSA at gate 1 (position)", {"mixer": "gpsa", "gate": 1.0}),
    "gpsa-half": ("GPSA at gate 1/2", {"mixer": "gpsa", "gate": 0.5}),
    "gpsa-0": ("GPSA at gate 0 (content)", {"mixer": "gpsa", "gate": 0.0}),
    "mlp": ("MLP across tokens", {"mixer": "mlp"}),
    "attention": ("attention", {"mixer": "attention"}),
}
FOUR = ("conv", "gpsa-half", "mlp", "attention")
DATA = ("shapes", "cifar10", "cifar100")
BATCH, PEAK, WARM_UP = 64, 2e-3, 0.1
SHARES = (1 / 4, 1 / 2, 1)  # of the steps, after which a run is read and saved
VALIDATED, PROBED = 2000, 2000  # images: of the error and the probe, and to fit the probe
RIDGE = 0.1  # times the number of images to fit
SHOWN = 6  # images in the strip


def config_of(arm, img_size):
    """The arm's IsotropicConfig, its MLPs as wide as makes it as large as attention's network."""
    config = IsotropicConfig(**ARMS[arm][1], img_size=img_size)
    missing = parameters(IsotropicConfig(img_size=img_size)) - parameters(config)
    unit = config.depth * (2 * config.embed_dim + 1)
    return replace(config, hidden_dim=config.hidden_dim + round(missing / unit))


def parameters(config):
    """How many numbers a network has."""
    return sum(int(np.prod(shape)) for shape in isotropic_shapes(config).values())


def readings_of(steps):
    """The steps after which a run is read, the last one among them."""
    return sorted({max(1, round(share * steps)) for share in SHARES})


def open_plan(out, given):
    """What is asked for: given, what the plan in the folder out says, or the defaults.

    Raises UserError where these contradict each other, or where something else lies there.
    """
    defaults = {"data": "cifar10", "steps": 400, "seeds": 3, "data_dir": None}
    asked = open_one_plan(out, {"experiment": "biases"} | defaults, given)
    if asked["data"] not in DATA:
        raise UserError(f"biases takes images of one size: choose --data from {', '.join(DATA)}")
    return asked


def run(out, asked, say, workers=None, device="cpu", pictures=True):
    """Trains, or goes on with, every arm and seed in out/ARM/seedN. Returns (text, files' names).

    asked: of open_plan. A kill costs the steps since a run's last reading.
    """
    dataset = load_dataset(asked["data"], asked["data_dir"])
    xp, place = resolve_device(device)
    place = without_reason(place)
    size = dataset.train.images.shape[2]
    configs = {arm: config_of(arm, size) for arm in ARMS}
    out.mkdir(parents=True, exist_ok=True)
    about = {"trained": place, "arms": {arm: asdict(config) for arm, config in configs.items()}}
    write_file(out / PLAN, json.dumps(asked | about, indent=2).encode() + b"\n")
    runs = [(arm, seed) for seed in range(asked["seeds"]) for arm in ARMS]
    found, data = {}, on_device(dataset, xp)
    with tqdm(runs, disable=None, leave=False, unit=" runs") as bar:
        for arm, seed in bar:
            bar.set_description_str(f"{ARMS[arm][0]}, seed {seed}")
            with make_engine(Masked(configs[arm]), xp, workers) as engine:
                path = out / arm / f"seed{seed}" / LAST
                rows = found[arm, seed] = train(engine, data, path, asked["steps"], seed)
            with bar.external_write_mode():
                last = rows[-1]
                say(f"{ARMS[arm][0]}, seed {seed}: error {last['error']:.3f}, "
                    f"probe {100 * last['probe']:.1f} %")  # fmt: skip
    text, names = _markdown(asked, configs, found, place), ["table.md", "table.csv"]
    write_file(out / "table.md", text.encode())
    write_file(out / "table.csv", _csv(found).encode())
    if pictures:
        _draw_curves(asked, found, out / "biases.png")
        _draw_strip(dataset, configs, out)
        names += ["biases.png", "biases-images.png"]
    return text, names


def train(engine, data, path, steps, seed):
    """One run from wherever the file at path stands: a list of {"step", "error", "probe"}.

    A step sees BATCH images as they are, half of their patches hidden.
    """
    config, images = engine.objective.config, data.train.images
    params, optimizer, rows = _begin(path, config, seed, engine.xp)
    if rows and rows[-1]["step"] >= steps:
        return rows
    engine.hold(params, optimizer)
    trained = [name for name in params if not name.endswith("gating_param")]
    per_pass = len(images) // BATCH
    for step in range(rows[-1]["step"] if rows else 0, steps):
        number, place = divmod(step, per_pass)
        drawn = epoch_order(len(images), seed, number)[BATCH * place :][:BATCH]
        load = _loader(engine, data, images, to_device(drawn, engine.xp), seed, step)
        _, grads = engine.loss_and_grads(load, BATCH, params)
        lr = warmup_cosine(step, steps, PEAK, WARM_UP * steps, PEAK / 100, PEAK / 100)
        chosen = ({name: values[name] for name in trained} for values in (params, grads))
        engine.update(optimizer, *chosen, lr)
        if step + 1 in readings_of(steps):
            rows = [*rows, {"step": step + 1} | read(engine, data, params)]
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, params, config, optimizer=optimizer, state={"rows": rows})
    return rows


def _begin(path, config, seed, xp):
    """(params, optimizer, rows): fresh, or as the checkpoint at path has them."""
    if not path.exists():
        params = to_device(init_isotropic(config, seed), xp)
        return params, AdamW(params), []
    found = load_checkpoint(path)
    with suppress(TypeError, LookupError):
        rows = found.state["rows"]
        if found.config == config and found.moments and rows[-1]["error"] >= 0:
            params = to_device(found.params, xp)
            optimizer = AdamW(params)
            optimizer.exp_avg, optimizer.exp_avg_sq = (
                to_device(found.moments[name], xp) for name in ("exp_avg", "exp_avg_sq")
            )
            optimizer.step_count = rows[-1]["step"]
            return params, optimizer, rows
    raise UserError(f"{path} is no run of this plan: take it away, or choose another --out")


def _loader(engine, data, images, indices, seed, step):
    """load(start, stop) of these images: normalised, and which of their patches are hidden."""

    def load(start, stop):
        pixels = to_device(images[indices[start:stop]], engine.xp)
        places = engine.xp.arange(start, stop)
        mask = hidden_patches(seed, step, places, engine.objective.config.num_patches)
        return normalize(pixels, data.mean, data.std), mask

    return load


def read(engine, data, params):
    """{"error": on hidden patches of validation images, "probe": accuracy of a ridge regression}.

    The same images and masks for every arm, seed and step.
    """
    found = []
    for split, most in ((data.train, PROBED), (data.val, VALIDATED)):
        n = min(most, len(split.labels))
        load = _loader(engine, data, split.images, engine.xp.arange(n), 0, 0)
        answers = to_cpu(engine.logits(load, n, params)).astype(np.float64)
        found += [answers[:, 1:], to_cpu(split.labels[:n])]
    return {"error": float(answers[:, 0].mean()), "probe": probe(*found)}


def probe(x, labels, val_x, val_labels):
    """Share of right answers of a ridge regression from features (n, F) onto classes."""
    centre, scale = x.mean(axis=0), x.std(axis=0) + 1e-12
    x, val_x = (x - centre) / scale, (val_x - centre) / scale
    targets = np.eye(int(max(labels.max(), val_labels.max())) + 1)[labels]
    gram = x.T @ x + RIDGE * len(x) * np.eye(x.shape[1])
    weight = np.linalg.solve(gram, x.T @ (targets - targets.mean(axis=0)))
    answers = (val_x @ weight + targets.mean(axis=0)).argmax(axis=1)
    return float((answers == val_labels).mean())


def _csv(found):
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["arm", "seed", "step", "error", "probe"])
    for (arm, seed), rows in found.items():
        writer.writerows([arm, seed, r["step"], r["error"], r["probe"]] for r in rows)
    return lines.getvalue()


def _values(found, arm, name, place=-1):
    """Of every seed of an arm, at one of its readings."""
    return [rows[place][name] for (key, _), rows in found.items() if key == arm]


def _number(values, digits):
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def _markdown(asked, configs, found, place):
    steps, seeds = readings_of(asked["steps"]), asked["seeds"]
    lines = [
        f"# biases: six ways of mixing tokens, on {asked['data']}",
        "",
        f"{len(found)} runs were trained {place}. Each has {asked['steps']:,} "
        f"steps of {BATCH} images, half of whose patches are hidden. The error is the mean square "
        f"on hidden patches of {VALIDATED:,} validation images, in units of the pixels' deviation. "
        f"The probe is a ridge regression on {PROBED:,} training images. Its accuracy is that on "
        "the same validation images, after the last step. The protocol is ours, after the paper. "
        f"± is the sample standard deviation over {seeds} seed{'s' * (seeds != 1)}.",
        "",
        f"| mixer | parameters | {' | '.join(f'error, {s}' for s in steps)} | probe (%) |",
        "| --- " * (len(steps) + 3) + "|",
    ]
    order = sorted(ARMS, key=lambda arm: mean(_values(found, arm, "error")))
    for arm in order:
        errors = " | ".join(_number(_values(found, arm, "error", i), 3) for i in range(len(steps)))
        probes = _number([100 * value for value in _values(found, arm, "probe")], 1)
        lines.append(f"| {ARMS[arm][0]} | {parameters(configs[arm]):,} | {errors} | {probes} |")
    return "\n".join([*lines, "", *(f"- {sentence}." for sentence in verdicts(found))]) + "\n"


def verdicts(found):
    """Sentences: what has become of the rules, seed by seed, and the probe's order."""
    errors = {arm: _values(found, arm, "error") for arm in ARMS}
    seeds = len(errors["conv"])
    last = sum(errors["attention"][i] == max(errors[arm][i] for arm in FOUR) for i in range(seeds))
    yield f"Of the four mixers attention has the largest error in {last} of {seeds} seeds"
    for arm in ("gpsa-half", "gpsa-1"):
        gaps = zip(errors["gpsa-0"], errors[arm], errors["conv"], strict=True)
        closed = [(none - some) / (none - conv) for none, some, conv in gaps]
        enough = sum(share >= 0.5 for share in closed)
        yield (
            f"{ARMS[arm][0]} closes at least half of the gap from gate 0 to filters in {enough} of "
            f"{seeds} seeds: {', '.join(f'{100 * share:.0f} %' for share in closed)}"
        )
    order = sorted(ARMS, key=lambda arm: -mean(_values(found, arm, "probe")))
    yield f"By the probe, best first: {', '.join(ARMS[arm][0] for arm in order)}"


STYLES = {
    "conv": (style.BLACK, "o-"),
    "gpsa-1": (style.GREEN, "s-"),
    "gpsa-half": (style.GREEN, "D--"),
    "gpsa-0": (style.GREEN, "^:"),
    "mlp": (style.SKY, "v-"),
    "attention": (style.ORANGE, "x-"),
}


@style.look()
def _draw_curves(asked, found, path):
    figure, ((left, right),) = style.new_figure(1, 2, height=3.0)
    steps = readings_of(asked["steps"])
    for arm, (label, _) in ARMS.items():
        color, form = STYLES[arm]
        for axis, name, scale in ((left, "error", 1), (right, "probe", 100)):
            values = scale * np.array([_values(found, arm, name, i) for i in range(len(steps))])
            spread = values.std(axis=1, ddof=1) if values.shape[1] > 1 else None
            axis.errorbar(steps, values.mean(axis=1), spread, fmt=form, color=color, label=label)
    left.set_ylabel("mean square error on hidden patches")
    right.set_ylabel("accuracy of a ridge probe (%)")
    left.legend(loc="center right", bbox_to_anchor=(1, 0.56), fontsize=6, labelspacing=0.2)
    for axis in (left, right):
        axis.set_xscale("log")
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
        axis.set_xlabel("steps")
    if asked["seeds"] > 1:
        note = f"±: sample standard deviation over {asked['seeds']} seeds"
        figure.supxlabel(note, fontsize=7)
    style.save(figure, path)


@style.look()
def _draw_strip(dataset, configs, out):
    """Validation images, what is left of them, and what the runs of seed 0 make of that."""
    spread = np.linspace(0, len(dataset.val.labels) - 1, SHOWN).astype(int)
    images = normalize(dataset.val.images[spread], dataset.mean, dataset.std)
    config = configs["conv"]
    mask = hidden_patches(0, 0, np.arange(len(images)), config.num_patches)
    patches = patches_of(images, config.patch_size)
    columns = {"image": patches, "hidden": np.where(mask[..., None], np.nan, patches)}
    for arm, (label, _) in ARMS.items():
        params = load_checkpoint(out / arm / "seed0" / LAST).params
        guessed, _ = isotropic_forward(images, params, configs[arm], mask)
        columns[label.replace(" (", "\n(")] = np.where(mask[..., None], guessed, patches)
    figure, axes = style.new_figure(len(images), len(columns), height=0.85 * len(images))
    side, P = config.grid[0], config.patch_size
    std, centre = np.array(dataset.std), np.array(dataset.mean)
    for j, (label, tokens) in enumerate(columns.items()):
        folded = tokens.reshape(-1, side, side, config.in_chans, P, P).transpose(0, 1, 4, 2, 5, 3)
        pixels = folded.reshape(-1, side * P, side * P, config.in_chans) * std + centre
        pixels = np.nan_to_num(pixels, nan=0.5).clip(0, 1)
        for i, picture in enumerate(pixels):
            axes[i, j].imshow(picture)
            axes[i, j].set_axis_off()
        axes[0, j].set_title(label, fontsize=6)
    style.save(figure, out / "biases-images.png", style.SCREEN)
