"""Which runs an experiment consists of, and how many steps of each fit into the minutes given.

All rows of a plan train for the same number of steps of the same number of images.
"""

import json
from dataclasses import asdict, dataclass, replace
from math import ceil

from ..config import VARIANTS, is_count, is_number
from ..errors import UserError, unknown_name
from ..neighbours.models import ALL_VARIANTS
from ..system import read_json, write_file
from ..training.settings import DEFAULT_RECIPE, RECIPES, Settings, flag, make_settings
from . import mobile

PLAN = "plan.json"
SUBSETS = {"ablation": 0.1, "locality": 0.1, "masking": 1.0, "escape": 1.0, "diversity": 1.0,
           "mobile": 1.0}  # fmt: skip
FRACTIONS = {"sample-efficiency": (0.05, 0.1, 0.3, 0.5, 1.0), "hybrid": (0.1, 0.3, 1.0)}
EXPERIMENTS = (*SUBSETS, *FRACTIONS)
"""Those that compare on one share of the images, and those on several: their defaults."""
FIRST = (0.1, 1.0)  # of the fractions, to be trained before the others
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
LOSSES = {"cosine": 1.0, "contrastive": 1.0, "patch_mixing": 1.0}
DIVERSITY = {
    "vit": ("ViT", "vit", ()),
    "vit-cosine": ("ViT + cosine", "vit", ("cosine",)),
    "vit-all": ("ViT + all three losses", "vit", tuple(LOSSES)),
    "convit": ("ConViT", "convit", ()),
    "convit-cosine": ("ConViT + cosine", "convit", ("cosine",)),
}
"""Patch Diversification: row to its label, its model and its losses, of weight 1."""
MODELS = {
    "diversity": "convit_deep32",  # similarity is a matter of depth
    "mobile": "mobile_micro32",  # and what lacks some part of it
}
"""Experiment to the model of which it is trained, where the data's recipe does not say."""
KINDS = {"convit": "ConViT", "vit": "ViT"}
HYBRID = {
    "vit": ("ViT", "vit", "", 0.5),
    "convit": ("ConViT", "convit", "", 0.5),
    "cmt": ("CMT", "cmt", "", 1.0),
    "cmt-nolocal": ("CMT without LPU", "cmt", "_nolocal", 1.0),
    "cmt-nofilter": ("CMT without IRFFN's filter", "cmt", "_nofilter", 1.0),
}
"""CMT: row to its label, its model, how that one's name ends, and its share of the recipe's rate.
The rates were chosen on the validation split, see the note under the table."""
STRENGTHS = (0.01, 0.1, 1.0)
GPSA_SHARES = (0.0, 0.25, 0.5, 0.75)  # figure 8a: 0, 3, 6 and 9 of 12 blocks
MASKED_SHARES = {3: 0.3, 5: 0.5, 10: 1.0}  # table 6: 3, 5 and 10 of 10 GPSA layers

WARM_UP = 0.1  # of the steps
SAFETY = 0.9  # of the budget is planned: other programs run too
LEAST_STEPS = 200  # fewer show nothing
MOST_SEEDS = 1000
VALIDATIONS = 10  # of a run, at most
READINGS = 20  # in their place where an experiment draws what changes over training
FEW = 2  # in their place where an experiment looks at the end alone


@dataclass(frozen=True)
class Row:
    """One row of a table: runs that differ in the seed alone.

    name: its folder; masks: what else to evaluate at the end, each ["pos_embed"], or ["content", n]
    or ["position", n] for the first n GPSA layers; validations: at most; images: how many it trains
    on; speed: what measure has found.
    """

    name: str
    label: str
    settings: Settings
    masks: list
    validations: int
    images: int = 0
    speed: dict | None = None

    @property
    def fixed_seconds(self):
        """Of one run, whatever its length; the masks need the data and the model once more."""
        starts, evaluations = 1 + bool(self.masks), self.validations + len(self.masks)
        speed = self.speed
        return starts * speed["start_seconds"] + evaluations * speed["validation_seconds"]

    @property
    def step_seconds(self):
        return self.settings.batch_size / self.speed["images_per_second"]

    @property
    def seconds(self):
        """Expected of one run."""
        return self.fixed_seconds + self.settings.steps * self.step_seconds

    @property
    def steps_per_pass(self):
        return self.images // self.settings.batch_size


@dataclass(frozen=True)
class Plan:
    """asked: the options it was made from, with "experiment"; measured_on: the device."""

    asked: dict
    measured_on: str
    rows: list

    @property
    def experiment(self):
        return self.asked["experiment"]

    @property
    def seeds(self):
        return range(self.asked["seeds"])

    @property
    def runs(self):
        """(row, seed) in the order of training: a plan that is stopped has whole tables first."""
        return [(row, seed) for seed in self.seeds for row in self.rows]

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

    @property
    def recipe(self):
        """What all rows have in common, in words."""
        s = self.rows[0].settings
        rates = " or ".join(f"{lr:g}" for lr in sorted({row.settings.lr for row in self.rows}))
        return (
            f"recipe {s.recipe}: batches of {s.batch_size}, optimizer {s.optimizer}, peak learning "
            f"rate {rates}, augmentation {s.augment}, weight decay {s.weight_decay:g}"
        )

    def save(self, path):
        about = {"minutes": round(self.minutes, 2), "images_seen": self.images_seen}
        write_file(path, json.dumps(asdict(self) | about, indent=2).encode() + b"\n")


def load_plan(path):
    """The Plan in a file. Raises UserError where it is missing, damaged or not of this program."""
    values = read_json(path, advice := "give the plan.json of an experiment")
    if values is None:
        raise UserError(f"{path} cannot be read (there is no such file): {advice}")
    try:
        rows = [Row(**row | {"settings": Settings(**row["settings"])}) for row in values["rows"]]
        plan = Plan(values["asked"], values["measured_on"], rows)
        _check(plan)
        return plan
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        reason = str(error) if isinstance(error, UserError) else repr(error)
        raise UserError(
            f"{path} is damaged, or no plan of this program ({reason[:200]}): {advice}"
        ) from error


def _check(plan):
    """Raises where a plan is not what make_plan could have made; the values of settings are free,
    but for what the rows have in common."""
    given = {key: value for key, value in plan.asked.items() if key != "experiment"}
    if plan.experiment not in EXPERIMENTS or complete(plan.experiment, given) != plan.asked:
        raise ValueError("its options are not all those of an experiment")
    if len(plan.asked.get("fractions", ())) > len(plan.rows):
        raise ValueError("its rows are fewer than its fractions")
    parts = [
        [(row.name, row.label, row.masks, row.settings.model, row.settings.subset) for row in rows]
        for rows in (plan.rows, rows_of(plan.asked))
    ]
    if parts[0] != parts[1]:
        raise ValueError("its rows are not those of its options")
    if len({(row.settings.steps, row.settings.batch_size) for row in plan.rows}) != 1:
        raise ValueError("its rows differ in the number of images seen")
    for row in plan.rows:
        if not (is_count(row.images, row.settings.batch_size) and is_number(row.seconds)):
            raise ValueError(f"row {row.name} has no number of images or no speed")


def complete(experiment, given):
    """Everything that a plan is made from: `given` (option to value), and the defaults.

    Raises UserError where an option is not this experiment's or out of range.
    """
    own, other = "subset", "fractions"
    if experiment in FRACTIONS:
        own, other = other, own
    if other in given:
        raise UserError(f"{experiment} takes --{own}, not --{other}")
    if "steps" in given and "budget" in given:
        raise UserError("--steps says how long each run is, --budget asks for it: give one of them")
    data = given.get("data", "cifar10")
    if data not in DEFAULT_RECIPE:
        raise UserError(unknown_name("data", data, DEFAULT_RECIPE))
    asked = {
        "experiment": experiment,
        "data": data,
        "model": MODELS.get(experiment, RECIPES[DEFAULT_RECIPE[data]]["model"]),
        **({} if "steps" in given else {"budget": 60.0}),
        "seeds": 3,
        own: list(FRACTIONS[experiment]) if own == "fractions" else SUBSETS[experiment],
    } | given
    _check_options(asked, own)
    return asked


def _check_options(asked, own):
    """Raises UserError where an option is out of range; own: "fractions" or "subset"."""
    fractions = asked[own] if own == "fractions" else [asked[own]]
    if not fractions or not all(is_number(f) and 0 < f <= 1 for f in fractions):
        raise UserError(f"--{own} must be above 0 and at most 1, not {asked[own]}")
    if len({_percent(fraction) for fraction in fractions}) < len(fractions):
        raise UserError(f"--{own} must differ in their first six digits: {asked[own]}")
    if asked["experiment"] == "mobile":
        if asked["model"] != MODELS["mobile"]:
            raise UserError("mobile trains nine models of its own: leave out --model")
    elif not asked["model"].startswith("convit_") or asked["model"] not in VARIANTS:
        raise UserError(f"--model must be a ConViT, its ViT twin comes by itself: {asked['model']}")
    if asked["experiment"] == "hybrid" and asked["model"].replace("convit", "cmt") not in (
        ALL_VARIANTS
    ):
        raise UserError(f"there is no CMT of the size of {asked['model']}: give convit_micro32")
    budget = asked.get("budget", 1.0)
    if not (is_number(budget) and budget > 0):
        raise UserError(f"--budget must be a positive number of minutes, not {budget}")
    for name in ("seeds", "steps"):
        if not is_count(asked.get(name, 1), 1):
            raise UserError(f"--{name} must be an integer of at least 1, not {asked[name]}")
    if asked["seeds"] > MOST_SEEDS:
        raise UserError(f"--seeds must be at most {MOST_SEEDS}, not {asked['seeds']}")


def refuse_other(plan, experiment, given, folder):
    """Raises UserError where the plan in `folder` is of another experiment or was made with other
    options than those `given`."""
    asked, other = plan.asked, []
    if experiment != plan.experiment:
        other.append(f"{plan.experiment}, not {experiment}")
    for name, value in given.items():
        if name not in asked:
            other.append(f"made without {flag(name)}")
        elif asked[name] != value:
            other.append(f"{flag(name)} {asked[name]}, not {value}")
    if other:
        raise UserError(
            f"{folder} holds another plan ({'; '.join(other)}): choose another --out, or go on "
            "with that one by giving its own options or none"
        )


def rows_of(asked):
    """The rows of an experiment, their lengths still open. Raises UserError for a model on which it
    cannot be done."""
    experiment = asked["experiment"]
    if experiment in FRACTIONS:
        kinds = {kind: (label, kind, "", 1.0) for kind, label in KINDS.items()}
        kinds = HYBRID if experiment == "hybrid" else kinds
        rate = RECIPES[_recipe(asked["data"], asked["model"])]["lr"]
        return [
            _row(asked, f"{name}-{_percent(f)}pct", f"{label}, {_percent(f)} %", kind, f, end,
                 lr=share * rate)
            for f in sorted(asked["fractions"], key=lambda f: (f not in FIRST, f))
            for name, (label, kind, end, share) in kinds.items()
        ]  # fmt: skip
    if experiment == "ablation":
        return [
            _row(asked, key, f"{key} ({label})", "vit" if key == "e" else "convit", **changes)
            for key, (label, changes) in ABLATION.items()
        ]
    if experiment == "locality":
        return _locality_rows(asked)
    if experiment == "diversity":
        return [
            _row(asked, name, label, kind, **{loss: LOSSES[loss] for loss in losses})
            for name, (label, kind, losses) in DIVERSITY.items()
        ]
    if experiment == "mobile":
        return [_row(asked, name, label, model=model) for name, label, model in mobile.arms()]
    masks = {"convit": [], "vit": []}
    if experiment == "masking":
        depths = sorted(set(masked_layers(VARIANTS[asked["model"]]).values()))
        branches = [[branch, n] for branch in ("content", "position") for n in depths]
        masks = {"convit": [["pos_embed"], *branches], "vit": [["pos_embed"]]}
    return [_row(asked, kind, KINDS[kind], kind, masks=masks[kind]) for kind in KINDS]


def _locality_rows(asked):
    model, rows = VARIANTS[asked["model"]], []
    for layers in sorted({_share(share, model.depth) for share in GPSA_SHARES}):
        for strength in STRENGTHS if layers else [model.locality_strength]:
            changes = {"local_up_to_layer": layers, "locality_strength": strength}
            label, folder = f"{layers} GPSA layer{'s' * (layers != 1)}", f"layers{layers}"
            if layers:
                label += f", strength {strength:g}"
                folder += f"-strength{strength:g}"
            rows.append(_row(asked, folder, label, **changes))
    return rows


def _percent(fraction):
    return f"{100 * fraction:g}"


def masked_layers(model):
    """Number of GPSA layers in the paper's table 6 to that of the same share of this model's."""
    gpsa = min(model.local_up_to_layer, model.depth)
    return {paper: max(1, _share(share, gpsa)) for paper, share in MASKED_SHARES.items()}


def _share(share, whole):
    return int(share * whole + 0.5)


def _row(asked, name, label, kind="convit", fraction=None, end="", masks=(), **changes):
    changes = {"model": asked["model"].replace("convit", kind) + end} | changes
    settings = make_settings(
        _recipe(asked["data"], asked["model"]),
        data=asked["data"],
        subset=asked["subset"] if fraction is None else fraction,
        steps=LEAST_STEPS,
        seed=0,
        optimizer="adamw",  # the paper's, whatever the recipe has
        **changes,
    )
    few = {"escape": READINGS, "diversity": FEW, "hybrid": FEW, "mobile": FEW}
    validations = few.get(asked["experiment"], VALIDATIONS)
    return Row(name, label, settings, list(masks), validations)


def _recipe(data, model):
    """The one recipe for this model on this data that needs no GPU, or else the data's."""
    fitting = {name: recipe for name, recipe in RECIPES.items() if "precision" not in recipe}
    own = [name for name, r in fitting.items() if (r["data"], r["model"]) == (data, model)]
    return own[0] if len(own) == 1 else DEFAULT_RECIPE[data]


def speed_key(settings):
    """Runs with equal keys are equally fast: only one of them is timed."""
    losses = settings.cosine, settings.contrastive, settings.patch_mixing
    model = mobile.stem_of(settings.model) or settings.model
    return model, settings.local_up_to_layer, settings.attention, *map(bool, losses)


def make_plan(asked, rows, images, speeds, measured_on):
    """The Plan of asked["steps"], or of as many as fit into asked["budget"] minutes.

    rows: of rows_of; images: {subset: training images}; speeds: {speed_key: what measure found}.
    Raises UserError where a subset is smaller than a batch and, with the minutes that it would
    take, where no sensible number of steps fits.
    """
    size = rows[0].settings.batch_size
    subset, fewest = min(images.items(), key=lambda pair: pair[1])
    if fewest < size:
        raise UserError(
            f"{_percent(subset)} % of {asked['data']} are {fewest} images, fewer than a batch of "
            f"{size}: take a larger share"
        )
    rows = [
        replace(row, images=images[row.settings.subset], speed=speeds[speed_key(row.settings)])
        for row in rows
    ]
    steps = asked["steps"] if "steps" in asked else _steps(asked, rows)
    return Plan(asked, measured_on, [_scheduled(row, steps) for row in rows])


def _steps(asked, rows):
    """How many steps fit into the budget."""
    fixed = asked["seeds"] * sum(row.fixed_seconds for row in rows)
    per_step = asked["seeds"] * sum(row.step_seconds for row in rows)
    steps = int((60 * SAFETY * asked["budget"] - fixed) / per_step)
    if steps >= LEAST_STEPS:
        return steps
    # A tenth more: the speed is measured again when the command is.
    minutes = ceil(1.1 * (fixed + LEAST_STEPS * per_step) / SAFETY / 60)
    raise UserError(
        f"{len(rows) * asked['seeds']} runs do not fit into --budget {asked['budget']:g}: with "
        f"{LEAST_STEPS} steps each, which is the least, they take about {minutes} minutes here; "
        "give at least that, or fewer --seeds"
    )


def _scheduled(row, steps):
    """The row with its length: at most so many epochs as validations, and the warm-up in these."""
    passes = ceil(steps / (row.validations * row.steps_per_pass))
    warmup = WARM_UP * steps / (passes * row.steps_per_pass)
    settings = replace(row.settings, steps=steps, passes=passes, warmup_epochs=warmup)
    return replace(row, settings=settings)


def open_one_plan(out, defaults, given):
    """What is asked of an experiment with one plan: given, what the plan in the folder out says, or
    the defaults. `data_dir` may change.

    Raises UserError where these contradict each other, or where something else lies there.
    """
    stored = read_json(out / PLAN, "choose another --out")
    if stored is not None and stored.get("experiment") != defaults["experiment"]:
        raise UserError(f"{out} holds the plan of another experiment: choose another --out")
    if stored is None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is not empty and holds no plan: choose a new folder with --out")
    asked = defaults | {name: stored[name] for name in defaults if stored and name in stored}
    for name, value in given.items():
        if stored and name != "data_dir" and asked[name] != value:
            raise UserError(f"{out} was made with --{name} {asked[name]}: choose another --out")
        asked[name] = value
    counts = is_count(asked["steps"], 1) and is_count(asked["seeds"], 1)
    if not (counts and isinstance(asked.get("data_dir"), str | None)):
        raise UserError(f"{out / PLAN} is damaged: take it away, or choose another --out")
    return asked
