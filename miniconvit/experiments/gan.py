"""Can two transformers be trained against each other? ViTGAN's critic, by its attention and norms.

After Lee et al. 2021, at a scale of minutes: the quarters of the `shapes` images, 16x16 pixels,
with one object each. The critic's attention is by dot products or by L2 distances. Its weights are
free, or have the spectral norm 1 (Miyato et al. 2018), or the one that each had at the start, as in
the paper. All arms have the same generator, data, losses and rates.

How far pictures are from held-out images says the sliced Wasserstein distance on pixels: along a
random direction, both sets are sorted and the mean gap is taken, and that is averaged over
directions. No network is in it. Pictures are drawn by the average of the generator over the steps.

The rule, fixed before the runs: an arm has learned to draw where the distance ends below a quarter
of its start, in every seed. How long that takes is counted in processor time.
"""

import csv
import io
import json
from contextlib import suppress
from dataclasses import asdict
from math import isfinite
from statistics import mean, stdev
from types import SimpleNamespace

import numpy as np
from tqdm import tqdm

from ..analysis import style
from ..arrays import to_cpu, to_device
from ..checkpoints.checkpoint import LAST, load_checkpoint, save_checkpoint
from ..data import epoch_order, load_dataset
from ..engine import make_engine
from ..engine.cuda import resolve_device, without_reason
from ..errors import UserError
from ..layers.names import part
from ..neighbours import generator_forward, spectral_norms_backward, spectral_norms_forward
from ..neighbours.gan import GANConfig, init_gan, latents, spectral_names
from ..optim import AdamW, update_average, warmup_cosine
from ..system import write_file
from ..training.objectives import Adversarial
from .plan import PLAN, open_one_plan

ATTENTION = {"dot": "dot product", "l2": "L2"}
NORMS = {"none": "free", "sn": "1", "isn": "as at the start"}
ARMS = [(attention, norm) for attention in ATTENTION for norm in NORMS]
BATCH, BETAS, AVERAGE, CONSISTENCY = 32, (0.0, 0.99), 0.995, 1.0
RATES, LOWEST = {"critic.": 1e-3, "generator.": 4e-4}, 0.1
"""Of each network at the start, and what is left of it at the end of a cosine."""
SHARES = (0, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
"""Of the steps, after which a run is read and saved."""
JUDGED, DIRECTIONS = 2000, 256  # pictures and as many images, and what they are seen along
ENOUGH = 0.25  # of the distance at the start
SHOWN = 40  # pictures
NO_STEP = 2**32  # of any training: its latent vectors are those of readings


def readings_of(steps):
    """The steps after which a run is read, 0 and the last one among them."""
    return sorted({round(share * steps) for share in SHARES})


def open_plan(out, given):
    """The steps and seeds that are asked for. Raises UserError as open_one_plan does."""
    return open_one_plan(out, {"experiment": "gan", "steps": 1200, "seeds": 3}, given)


def quarters(images):
    """uint8 (n, 3, 32, 32) as (4 n, 16, 16, 3): each holds one object."""
    n, channels, height, width = images.shape
    cut = images.reshape(n, channels, 2, height // 2, 2, width // 2).transpose(0, 2, 4, 3, 5, 1)
    return cut.reshape(4 * n, height // 2, width // 2, channels)


def as_pixels(images):
    """uint8 as float32 from -1 to 1."""
    return images.astype("float32") / 127.5 - 1.0


class Ruler:
    """The sliced Wasserstein distance of pictures to these images (n, height, width, C)."""

    def __init__(self, images):
        directions = np.random.default_rng(0).standard_normal((images[0].size, DIRECTIONS))
        directions /= np.linalg.norm(directions, axis=0)
        self._directions = directions.astype("float32")
        self._sorted = self._along(images)

    def distance(self, pictures):
        """The mean gap of what is sorted along each direction; pictures (n, height, width, C)."""
        return float(abs(self._along(pictures) - self._sorted).mean())

    def _along(self, images):
        return np.sort(images.reshape(len(images), -1) @ self._directions, axis=0)


def run(out, asked, say, workers=None, device="cpu", pictures=True):
    """Trains, or goes on with, every arm and seed in out/ARM/seedN. Returns (text, files' names).

    asked: of open_plan. The tables are written after each run. A kill costs the steps since a run's
    last reading.
    """
    dataset = load_dataset("shapes")
    train, held_out = (quarters(split.images[:]) for split in (dataset.train, dataset.val))
    xp, place = resolve_device(device)
    place = without_reason(place)
    images, ruler = to_device(train, xp), Ruler(as_pixels(held_out[:JUDGED]))
    floor = ruler.distance(as_pixels(train[:JUDGED]))
    configs = {arm: GANConfig(arm[0], img_size=train.shape[1]) for arm in ARMS}
    about = {"trained": place, "networks": asdict(configs[ARMS[0]]), "floor": floor}
    out.mkdir(parents=True, exist_ok=True)
    write_file(out / PLAN, json.dumps(asked | about, indent=2).encode() + b"\n")
    runs, found = [(arm, seed) for seed in range(asked["seeds"]) for arm in ARMS], {}
    with tqdm(runs, disable=None, leave=False, unit=" runs") as bar:
        for arm, seed in bar:
            bar.set_description_str(f"{name_of(arm)}, seed {seed}")
            path = out / "-".join(arm) / f"seed{seed}" / LAST
            with make_engine(Adversarial(configs[arm], CONSISTENCY), xp, workers) as engine:
                one = Run(engine, images, ruler, path, arm[1], seed)
                rows = found[arm, seed] = one.train(asked["steps"])
            text = _markdown(asked, found, floor, place)
            write_file(out / "table.md", text.encode())
            write_file(out / "table.csv", _csv(found).encode())
            with bar.external_write_mode():
                start, end = rows[0]["distance"], rows[-1]["distance"]
                say(f"{name_of(arm)}, seed {seed}: distance {start:.3f} to {end:.3f}")
    names = ["table.md", "table.csv"]
    if pictures:
        _draw_curves(asked, found, floor, out / "gan.png")
        _draw_pictures(found, configs, held_out, out)
        names += ["gan.png", "gan-images.png"]
    return text, names


def name_of(arm):
    """As in the table: "L2, norms as at the start"."""
    return f"{ATTENTION[arm[0]]}, norms {NORMS[arm[1]]}"


class Run:
    """One arm with one seed, from wherever the file at path stands.

    engine: of an Adversarial; images: uint8, on its device; norm: of NORMS. rows, one a reading:
    step, distance, the means since the row before of the losses and of the norm of the critic's
    gradient (None at the start), and cpu_seconds so far. A run whose gradient is not finite breaks
    off where it was, and its last row says `broken`. Raises UserError where another run lies there.
    """

    def __init__(self, engine, images, ruler, path, norm, seed):
        self._engine, self._images, self._ruler = engine, images, ruler
        self._path, self._seed, self._config = path, seed, engine.objective.config
        self._norms = norms_of(norm, self._config, seed)
        self._numbers, self._clock = [], engine.cpu_seconds()
        self._pass = self._order = None
        if path.exists():
            self._load()
        else:
            self.params, self.rows = to_device(init_gan(self._config, seed), engine.xp), []
            self.average = {name: p.copy() for name, p in self.params.items()}
            self._optimizers = self._fresh_optimizers()

    def train(self, steps):
        """Up to so many steps. Returns the rows."""
        if not self.rows:
            self._read(0)
        for step in range(self.rows[-1]["step"], steps):
            if "broken" in self.rows[-1]:
                break
            self._step(step, step / steps)
            if step + 1 in readings_of(steps) and "broken" not in self.rows[-1]:
                self._read(step + 1)
        return self.rows

    def _step(self, step, share):
        """Both networks, from the same parameters. share: of all steps, those before."""
        replaced, caches = spectral_norms_forward(self.params, self._norms)
        load = self._loader(step)
        *losses, grads = self._engine.loss_and_grads(load, BATCH, replaced, self._seed, step)
        grads = spectral_norms_backward(grads, caches)
        numbers = [*map(float, losses), critic_norm(grads)]
        if not all(map(isfinite, numbers)):
            self._read(step, broken=True)
            return
        self._numbers.append(numbers)
        for network, optimizer in self._optimizers.items():
            lr = warmup_cosine(share, 1.0, RATES[network], 0.0, minimum=LOWEST * RATES[network])
            optimizer.step(below(self.params, network), below(grads, network), lr)
        update_average(self.average, self.params, AVERAGE)

    def _loader(self, step):
        """load(start, stop): images of a batch, and the latent vectors at the same places."""
        number, place = divmod(step, len(self._images) // BATCH)
        if number != self._pass:
            self._pass, self._order = number, epoch_order(len(self._images), self._seed, number)
        drawn = to_device(self._order[BATCH * place :][:BATCH], self._engine.xp)

        def load(start, stop):
            places = self._engine.xp.arange(start, stop)
            z = latents(self._seed, step, places, self._config)
            return as_pixels(self._images[drawn[start:stop]]), z

        return load

    def draw(self, n):
        """n pictures (n, height, width, C): of the same latent vectors at every reading."""

        def load(start, stop):
            places = self._engine.xp.arange(start, stop)
            return (latents(self._seed, NO_STEP, places, self._config),)

        return to_cpu(self._engine.logits(load, n, self.average))

    def _read(self, step, **more):
        """Adds a row, and saves."""
        numbers, self._numbers = self._numbers, []
        means = np.mean(numbers, axis=0).tolist() if numbers else [None] * 3
        row = {"step": step, "distance": self._ruler.distance(self.draw(JUDGED))}
        row |= dict(zip(("critic_loss", "generator_loss", "critic_gradient"), means, strict=True))
        before, self._clock = self._clock, self._engine.cpu_seconds()
        used = self._clock - before + (self.rows[-1]["cpu_seconds"] if self.rows else 0.0)
        self.rows = [*self.rows, row | {"cpu_seconds": round(used, 2)} | more]
        self._save()

    def _fresh_optimizers(self):
        return {
            network: AdamW(below(self.params, network), weight_decay=0.0, betas=BETAS)
            for network in RATES
        }

    def _save(self):
        """One checkpoint of both networks, with what both optimizers know."""
        critic, generator = self._optimizers.values()
        both = SimpleNamespace(
            exp_avg=critic.exp_avg | generator.exp_avg,
            exp_avg_sq=critic.exp_avg_sq | generator.exp_avg_sq,
        )
        state = {"rows": self.rows, "norms": self._norms, "seed": self._seed}
        about = {"optimizer": both, "ema": self.average, "state": state}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self._path, self.params, self._config, **about)

    def _load(self):
        found = load_checkpoint(self._path)
        with suppress(TypeError, LookupError):
            state, mine = found.state, (self._config, self._norms, self._seed)
            self.rows = state["rows"]
            is_mine = (found.config, state["norms"], state["seed"]) == mine
            if is_mine and found.moments and self.rows[-1]["distance"] >= 0:
                arrays = found.params, found.ema, found.moments
                self.params, self.average, moments = to_device(arrays, self._engine.xp)
                self._optimizers = self._fresh_optimizers()
                for network, optimizer in self._optimizers.items():
                    optimizer.exp_avg = below(moments["exp_avg"], network)
                    optimizer.exp_avg_sq = below(moments["exp_avg_sq"], network)
                    optimizer.step_count = self.rows[-1]["step"]
                return
        raise UserError(
            f"{self._path} is no run of this plan: take it away, or choose another --out"
        )


def below(arrays, network):
    """Those of one network, "critic." or "generator.", under their full names."""
    return {name: array for name, array in arrays.items() if name.startswith(network)}


def norms_of(norm, config, seed):
    """{weight of the critic: its spectral norm}: none, 1 each, or that of the start."""
    if norm == "none":
        return {}
    names = spectral_names(config)
    if norm == "sn":
        return dict.fromkeys(names, 1.0)
    params = init_gan(config, seed)
    return {n: float(np.linalg.norm(params[n].reshape(len(params[n]), -1), 2)) for n in names}


def critic_norm(grads):
    """The 2-norm of the gradient of all weights of the critic."""
    return float(sum((g * g).sum() for g in part(grads, "critic.").values())) ** 0.5


COLUMNS = "step", "distance", "critic_loss", "generator_loss", "critic_gradient", "cpu_seconds"


def _csv(found):
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["attention", "norms", "seed", *COLUMNS, "broken"])
    for ((attention, norm), seed), rows in found.items():
        for row in rows:
            values = ["" if row[name] is None else row[name] for name in COLUMNS]
            writer.writerow([attention, norm, seed, *values, int("broken" in row)])
    return lines.getvalue()


def _runs(found, arm):
    """The rows of every seed of an arm."""
    return [rows for (key, _), rows in found.items() if key == arm]


def _number(values, digits):
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def shares(runs):
    """What is left of each run's distance at its end."""
    return [rows[-1]["distance"] / rows[0]["distance"] for rows in runs]


def _markdown(asked, found, floor, place):
    arms = [arm for arm in ARMS if _runs(found, arm)]
    starts = [rows[0]["distance"] for rows in found.values()]
    lines = [
        "# gan: two transformers against each other, on quarters of shapes",
        "",
        f"{len(found)} runs were trained {place}, of {asked['steps']:,} steps of {BATCH} images. "
        f"Distance is the sliced Wasserstein distance of {JUDGED:,} pictures to as many held-out "
        f"images, on pixels from -1 to 1, along {DIRECTIONS} directions. It begins at "
        f"{min(starts):.3f} to {max(starts):.3f}. The floor, training images against held-out "
        f"ones, is {floor:.4f}. The gradient is that of the critic's weights, its norm averaged "
        "since the reading before the last. ± is the sample standard deviation over seeds.",
        "",
        "| critic's attention | spectral norms | distance at the end | of its start (%) "
        "| gradient | CPU minutes | below a quarter |",
        "| --- " * 7 + "|",
    ]
    for arm in arms:
        runs = _runs(found, arm)
        left = shares(runs)
        cells = [
            ATTENTION[arm[0]],
            NORMS[arm[1]],
            _number([rows[-1]["distance"] for rows in runs], 3),
            ", ".join(f"{100 * share:.0f}" for share in left),
            _number([rows[-1]["critic_gradient"] or 0.0 for rows in runs], 2),
            _number([rows[-1]["cpu_seconds"] / 60 for rows in runs], 1),
            f"{_count(runs)} of {len(runs)}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *(f"- {sentence}." for sentence in verdicts(found))]) + "\n"


def _count(runs):
    """Of how many the rule holds."""
    return sum(
        s < ENOUGH and "broken" not in r[-1] for s, r in zip(shares(runs), runs, strict=True)
    )


def verdicts(found):
    """Sentences: of every arm what has become of the rule, then the longest run."""
    for arm in ARMS:
        runs = _runs(found, arm)
        if runs:
            broken = sum("broken" in rows[-1] for rows in runs)
            yield (
                f"{name_of(arm).capitalize()}: the distance ends below a quarter of its start in "
                f"{_count(runs)} of {len(runs)} seed{'s' * (len(runs) > 1)}"
                + (f"; {broken} broke off, a gradient being infinite" if broken else "")
            )
    longest = max(rows[-1]["cpu_seconds"] for rows in found.values()) / 60
    yield f"The longest run took {longest:.1f} CPU minutes"


def best_arm(found):
    """The arm whose distances are smallest at the end."""
    return min(ARMS, key=lambda arm: mean(rows[-1]["distance"] for rows in _runs(found, arm)))


COLORS = {"dot": style.VERMILION, "l2": style.BLUE}
LINES = {"none": ":", "sn": "--", "isn": "-"}


@style.look()
def _draw_curves(asked, found, floor, path):
    figure, ((left, right),) = style.new_figure(1, 2, height=3.3)
    for arm in ARMS:
        look = {"color": COLORS[arm[0]], "linestyle": LINES[arm[1]]}
        for i, rows in enumerate(_runs(found, arm)):
            label = name_of(arm) if i == 0 else None
            steps = [row["step"] for row in rows]
            left.plot(steps, [row["distance"] for row in rows], label=label, **look)
            right.plot(steps[1:], [row["critic_gradient"] for row in rows[1:]], **look)
    start = mean(rows[0]["distance"] for rows in found.values())
    left.axhline(floor, color=style.GREY, linewidth=0.8)
    left.axhline(ENOUGH * start, color=style.GREY, linewidth=0.8, linestyle="--")
    for height, words in ((floor, "training images"), (ENOUGH * start, "a quarter of the start")):
        left.annotate(words, (asked["steps"], height), fontsize=6, ha="right", va="bottom")
    left.set(xlabel="steps", ylabel="distance to held-out images", yscale="log")
    right.set(xlabel="steps", ylabel="norm of the critic's gradient", yscale="log")
    ticks = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
    left.set_yticks(ticks, [str(tick) for tick in ticks])
    left.minorticks_off()
    title = f"a line for each of {asked['seeds']} seeds" if asked["seeds"] > 1 else None
    figure.legend(loc="outside lower center", ncols=3, title=title)
    style.save(figure, path)


@style.look()
def _draw_pictures(found, configs, held_out, out):
    """What the best arm draws in seed 0, none chosen, beside held-out images."""
    arm = best_arm(found)
    average = load_checkpoint(out / "-".join(arm) / "seed0" / LAST).ema
    z = latents(0, NO_STEP, np.arange(SHOWN), configs[arm])
    drawn, _ = generator_forward(z, part(average, "generator."), configs[arm])
    figure, (axes,) = style.new_figure(1, 2, height=2.3)
    titles = f"drawn ({name_of(arm)})", "held-out images"
    for axis, title, pictures in zip(
        axes, titles, (drawn, as_pixels(held_out[:SHOWN])), strict=True
    ):
        n, height, width, channels = pictures.shape
        columns = max(1, n // 5)
        sheet = pictures[: n // columns * columns].reshape(-1, columns, height, width, channels)
        sheet = np.pad(sheet, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)), constant_values=1.0)
        sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(-1, columns * (width + 2), channels)
        axis.imshow((sheet.clip(-1, 1) + 1) / 2)
        axis.set_axis_off()
        axis.set_title(title)
    style.save(figure, out / "gan-images.png", style.SCREEN)
