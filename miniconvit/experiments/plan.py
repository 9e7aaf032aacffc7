"""Which runs an experiment consists of, and how many steps of each fit into the minutes given.

All rows of a plan train for the same number of steps of the same number of images.
"""

import json
from dataclasses import asdict, dataclass, replace
from math import ceil
from pathlib import Path

from ..checkpoint import write_file
from ..config import VARIANTS, is_count, is_number
from ..errors import UserError
from ..settings import DEFAULT_RECIPE, RECIPES, Settings, flag, make_settings

PLAN = "plan.json"
SUBSETS = {"ablation": 0.1, "locality": 0.1, "masking": 0.1, "escape": 1.0}
EXPERIMENTS = ("sample-efficiency", *SUBSETS)
FRACTIONS = (0.05, 0.1, 0.3, 0.5, 1.0)
ABLATION = {
    "a": ("ConViT", {}),
    "b": ("gates frozen", {"freeze": "gates"}),
    "c": ("no convolutional init", {"local_init": False}),
    "d": ("gates frozen, no convolutional init", {"freeze": "gates", "local_init": False}),
    "e": ("ViT", {}),
    "f": ("GPSA frozen", {"freeze": "attention"}),
    "g": ("GPSA frozen, no convolutional init", {"freeze": "attention", "local_init": False}),
}
"""Table 3: row to its label and to what it changes; e is the twin."""
KINDS = {"convit": "ConViT", "vit": "ViT"}
STRENGTHS = (0.01, 0.1, 1.0)
GPSA_SHARES = (0.0, 0.25, 0.5, 0.75)  # figure 8a: 0, 3, 6 and 9 of 12 blocks
MASKED_SHARES = {3: 0.3, 5: 0.5, 10: 1.0}  # table 6: 3, 5 and 10 of 10 GPSA layers

WARM_UP = 0.1  # of the steps
SAFETY = 0.9  # of the budget is planned: other programs run too
LEAST_STEPS = 200  # fewer show nothing
VALIDATIONS = (20, 10, 5, 2, 1)  # of a run, at most; the first whose time is a tenth of the budget


@dataclass(frozen=True)
class Row:
    """One row of a table: runs that differ in the seed alone.

    name: its folder; masks: what else to evaluate at the end, each ["pos_embed"], or ["content", n]
    or ["position", n] for the first n GPSA layers; images: how many it trains on; speed: what
    measure has found.
    """

    name: str
    label: str
    settings: Settings
    masks: list
    images: int = 0
    speed: dict | None = None

    @property
    def seconds(self):
        """Expected of one run."""
        s, speed = self.settings, self.speed
        epoch = s.passes * (self.images // s.batch_size)
        validations = ceil(s.steps / epoch) + len(self.masks)
        training = s.steps * s.batch_size / speed["images_per_second"]
        return speed["start_seconds"] + training + validations * speed["validation_seconds"]


@dataclass(frozen=True)
class Plan:
    """asked: the options it was made from, with "experiment"; place: where it was measured."""

    asked: dict
    place: str
    seeds: list
    rows: list

    @property
    def experiment(self):
        return self.asked["experiment"]

    @property
    def steps(self):
        return self.rows[0].settings.steps

    @property
    def images_seen(self):
        """Of one run."""
        return self.steps * self.rows[0].settings.batch_size

    @property
    def minutes(self):
        """Expected of all runs."""
        return len(self.seeds) * sum(row.seconds for row in self.rows) / 60

    def save(self, path):
        about = {"minutes": round(self.minutes, 2), "images_seen": self.images_seen}
        write_file(path, json.dumps(asdict(self) | about, indent=2).encode() + b"\n")


def load_plan(path):
    """The Plan in a file. Raises UserError where it is missing, damaged or not of this program."""
    try:
        values = json.loads(Path(path).read_text())
        rows = [Row(**row | {"settings": Settings(**row["settings"])}) for row in values["rows"]]
        plan = Plan(values["asked"], values["place"], values["seeds"], rows)
        plan.asked["experiment"], plan.minutes
        if len({(row.settings.steps, row.settings.batch_size) for row in rows}) != 1:
            raise ValueError("its rows differ in the number of images seen")
        return plan
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give the plan.json of an experiment"
        ) from error
    except (ValueError, TypeError, KeyError, IndexError, ArithmeticError, UserError) as error:
        raise UserError(
            f"{path} is damaged, or no plan of this program ({error!r}): give the plan.json of an "
            "experiment"
        ) from error


def complete(experiment, given):
    """Everything that a plan is made from: `given` (option to value), and the defaults.

    Raises UserError where an option is not this experiment's or out of range.
    """
    own = "fractions" if experiment == "sample-efficiency" else "subset"
    other = {"fractions": "subset", "subset": "fractions"}[own]
    if other in given:
        raise UserError(f"{experiment} takes --{own}, not --{other}")
    data = given.get("data", "cifar10")
    if data not in DEFAULT_RECIPE:
        raise UserError(f"unknown data {data!r}: choose one of {', '.join(DEFAULT_RECIPE)}")
    asked = {
        "experiment": experiment,
        "data": data,
        "model": RECIPES[DEFAULT_RECIPE[data]]["model"],
        "budget": 60.0,
        "seeds": 3,
        own: list(FRACTIONS) if own == "fractions" else SUBSETS[experiment],
    } | given
    fractions = asked[own] if own == "fractions" else [asked[own]]
    if not fractions or not all(is_number(f) and 0 < f <= 1 for f in fractions):
        raise UserError(f"--{own} must be above 0 and at most 1, not {asked[own]}")
    if own == "fractions":
        asked[own] = sorted(set(fractions))
    if not asked["model"].startswith("convit_") or asked["model"] not in VARIANTS:
        raise UserError(f"--model must be a ConViT, its ViT twin comes by itself: {asked['model']}")
    if not (is_number(asked["budget"]) and asked["budget"] > 0):
        raise UserError(f"--budget must be a positive number of minutes, not {asked['budget']}")
    if not is_count(asked["seeds"], 1):
        raise UserError(f"--seeds must be an integer of at least 1, not {asked['seeds']}")
    return asked


def refuse_other(asked, given, folder):
    """Raises UserError, naming the first of the options `given` that the plan in `folder` was not
    made with."""
    for name, value in given.items():
        if asked.get(name) != value:
            raise UserError(
                f"the plan in {folder} was made with {flag(name)} {asked.get(name)}, not {value}: "
                "go on with --resume and without that flag, or choose another --out"
            )


def rows_of(asked):
    """The rows of an experiment, their lengths still open. Raises UserError for a model on which it
    cannot be done."""
    name, model = asked["experiment"], VARIANTS[asked["model"]]
    if name == "sample-efficiency":
        rows = []
        for fraction in asked["fractions"]:
            for kind in ("convit", "vit"):
                percent = f"{100 * fraction:g}"
                label = f"{KINDS[kind]}, {percent} %"
                rows.append(_row(asked, f"{kind}-{percent}pct", label, kind, fraction))
        return rows
    if name == "ablation":
        return [
            _row(asked, key, f"{key} ({label})", "vit" if key == "e" else "convit", **changes)
            for key, (label, changes) in ABLATION.items()
        ]
    if name == "locality":
        rows = []
        for layers in sorted({_share(share, model.depth) for share in GPSA_SHARES}):
            for strength in STRENGTHS if layers else [model.locality_strength]:
                changes = {"local_up_to_layer": layers, "locality_strength": strength}
                label = f"{layers} GPSA layer{'s' * (layers != 1)}"
                folder = f"layers{layers}"
                if layers:
                    label += f", strength {strength:g}"
                    folder += f"-strength{strength:g}"
                rows.append(_row(asked, folder, label, **changes))
        return rows
    masks = {"convit": [], "vit": []}
    if name == "masking":
        depths = sorted(set(masked_layers(model).values()))
        masks["vit"] = [["pos_embed"]]
        masks["convit"] = [["pos_embed"]] + [
            [branch, n] for branch in ("content", "position") for n in depths
        ]
    return [_row(asked, kind, KINDS[kind], kind, masks=masks[kind]) for kind in KINDS]


def masked_layers(model):
    """Number of GPSA layers in the paper's table 6 to that of the same share of this model's."""
    gpsa = min(model.local_up_to_layer, model.depth)
    return {paper: max(1, _share(share, gpsa)) for paper, share in MASKED_SHARES.items()}


def _share(share, whole):
    return int(share * whole + 0.5)


def _row(asked, name, label, kind="convit", fraction=None, masks=(), **changes):
    settings = make_settings(
        data=asked["data"],
        model=asked["model"].replace("convit", kind),
        subset=asked["subset"] if fraction is None else fraction,
        steps=LEAST_STEPS,
        seed=0,
        **changes,
    )
    return Row(name, label, settings, list(masks))


def speed_key(settings):
    """Runs with equal keys are equally fast: only one of them is timed."""
    return settings.model, settings.local_up_to_layer, settings.attention


def make_plan(asked, rows, images, speeds, place):
    """The Plan whose runs fit into asked["budget"] minutes.

    rows: of rows_of; images: {subset: training images}; speeds: {speed_key: what measure found}.
    Raises UserError, with the minutes that it would take, where no sensible number of steps fits.
    """
    seeds = list(range(asked["seeds"]))
    size = min([rows[0].settings.batch_size, *(images[row.settings.subset] for row in rows)])
    rows = [
        replace(
            row,
            settings=replace(row.settings, batch_size=size),
            images=images[row.settings.subset],
            speed=speeds[speed_key(row.settings)],
        )
        for row in rows
    ]
    budget, per_step = 60 * SAFETY * asked["budget"], 0.0
    for row in rows:
        per_step += len(seeds) * size / row.speed["images_per_second"]

    def fixed(validations):
        """Seconds that do not depend on the number of steps: all of them, those of validation."""
        start = sum(row.speed["start_seconds"] for row in rows)
        masks = sum(len(row.masks) * row.speed["validation_seconds"] for row in rows)
        validation = validations * sum(row.speed["validation_seconds"] for row in rows)
        return len(seeds) * (start + masks + validation), len(seeds) * validation

    choices = VALIDATIONS[:2] if asked["experiment"] == "escape" else VALIDATIONS
    validations = next((v for v in choices if fixed(v)[1] <= budget / 10), choices[-1])
    steps = int((budget - fixed(validations)[0]) / per_step)
    if steps < LEAST_STEPS:
        minutes = (fixed(choices[-1])[0] + LEAST_STEPS * per_step) / SAFETY / 60
        raise UserError(
            f"{len(rows) * len(seeds)} runs do not fit into --budget {asked['budget']:g}: with "
            f"{LEAST_STEPS} steps each, which is the least, they take {ceil(10 * minutes) / 10:g} "
            "minutes here; give at least that, or fewer --seeds"
        )
    return Plan(asked, place, seeds, [_scheduled(row, steps, validations) for row in rows])


def _scheduled(row, steps, validations):
    """The row with its length: at most so many epochs, and the warm-up in these."""
    per_pass = row.images // row.settings.batch_size
    passes = ceil(steps / (validations * per_pass))
    warmup = WARM_UP * steps / (passes * per_pass)
    settings = replace(row.settings, steps=steps, passes=passes, warmup_epochs=warmup)
    return replace(row, settings=settings)
