"""What a training run is between two steps: how it begins, is kept, and taken up again."""

from dataclasses import asdict, dataclass, field

from ..arrays import to_device
from ..checkpoints.checkpoint import load_checkpoint, save_checkpoint
from ..config import is_count, is_number
from ..errors import UserError
from ..optim import AdamW
from .freeze import initial_params
from .settings import OPTIMIZERS, Settings, refuse_difference


def no_sums():
    """The sums over the steps of an epoch that has none yet."""
    return {"loss": 0.0, "correct": 0, "images": 0}


@dataclass
class TrainingState:
    """A run after some steps: all that decides how it goes on, given settings and images.

    params, ema: {name: array}, ema the moving average of params, or None. step, epoch: how many are
    finished. sums: no_sums of the running epoch's steps. best: {"epoch", "val_top1"} of the best
    epoch, or None before the first. unread: (step, loss, correct, norm) of the last steps, which
    are not in the sums yet.
    """

    params: dict
    optimizer: AdamW
    ema: dict | None
    step: int = 0
    epoch: int = 0
    sums: dict = field(default_factory=no_sums)
    best: dict | None = None
    unread: list = field(default_factory=list)

    @property
    def shown(self):
        """The parameters that are evaluated and become best.safetensors."""
        return self.params if self.ema is None else self.ema

    def save(self, path, settings, config, about):
        """Writes last.safetensors. about: what save_checkpoint is told of the data."""
        state = {"settings": asdict(settings), "step": self.step, "epoch": self.epoch}
        state |= {"sums": self.sums, "best": self.best}
        training = {"optimizer": self.optimizer, "ema": self.ema, "state": state}
        save_checkpoint(path, self.params, config, **about, **training)

    def save_best(self, path, config, about):
        """Writes best.safetensors."""
        save_checkpoint(path, self.shown, config, **about)

    def problem(self, schedule):
        """What is wrong with the numbers of a state that was read from a file, or None."""
        step, epoch = self.step, self.epoch
        if not (is_count(step) and is_count(epoch) and epoch <= schedule.epochs):
            return f"step {step} with {epoch} finished epochs is not of this run"
        first, end = schedule.ends(epoch)
        if not first <= step <= end:
            return f"step {step} with {epoch} finished epochs is not from {first} to {end}"
        if not _are_sums(self.sums, (step - first) * schedule.batch_size):
            return f"the sums of the running epoch at step {step} are {self.sums}"
        if not _is_best(self.best, epoch):
            return f"the best of {epoch} epochs is {self.best}"
        dtype = next(iter(self.params.values())).dtype
        return None if dtype == "float32" else f"its tensors are {dtype}, not float32"


def begin_state(settings, config, xp, start=None):
    """The state before the first step, on arrays of the module xp.

    start: the Start whose parameters, all or some, replace the random ones, or None.
    """
    params = initial_params(config, settings.seed, settings.freeze)
    for name, value in start.params.items() if start else ():
        params[name][...] = value
    params = to_device(params, xp)
    ema = None
    if settings.ema is not None:
        ema = {name: value.copy() for name, value in params.items()}
    return TrainingState(params, _optimizer(settings, params), ema)


def load_state(path, settings, config, schedule, xp):
    """The state in last.safetensors, on arrays of the module xp.

    Raises UserError where it is another run's, or damaged.
    """
    checkpoint = load_checkpoint(path)
    try:
        stored = Settings(**checkpoint.state["settings"])
        moments = checkpoint.moments["exp_avg"], checkpoint.moments["exp_avg_sq"]
        if (checkpoint.ema is None) != (stored.ema is None):
            raise KeyError("ema")
    except (TypeError, KeyError, UserError) as error:
        raise UserError(
            f"{path} is damaged, or is no checkpoint to resume from: "
            "begin again in another folder with --out"
        ) from error
    refuse_difference(stored, asdict(settings), path.parent)
    if checkpoint.config != config:
        raise UserError(
            f"{path} holds another model than these settings and this data set give: "
            "resume with the data that the run began with"
        )
    params, moments, ema = to_device((checkpoint.params, moments, checkpoint.ema), xp)
    optimizer = _optimizer(settings, params)
    optimizer.exp_avg, optimizer.exp_avg_sq = moments
    numbers = {name: checkpoint.state.get(name) for name in ("step", "epoch", "sums", "best")}
    state = TrainingState(params, optimizer, ema, **numbers)
    if problem := state.problem(schedule):
        raise UserError(f"{path} is damaged: {problem}; begin again in another folder with --out")
    optimizer.step_count = state.step
    return state


def _optimizer(settings, params):
    return OPTIMIZERS[settings.optimizer](params, settings.lr, settings.weight_decay)


def _are_sums(sums, images):
    """Whether sums are those of so many images."""
    return (
        isinstance(sums, dict)
        and set(sums) == set(no_sums())
        and is_number(sums["loss"])
        and is_count(sums["images"])
        and is_count(sums["correct"])
        and sums["correct"] <= sums["images"] == images
    )


def _is_best(best, epoch):
    """Whether best is what a run remembers of its best epoch when so many are finished."""
    if best is None or epoch == 0:
        return best is None and epoch == 0
    return (
        isinstance(best, dict)
        and set(best) == {"epoch", "val_top1"}
        and is_count(best["epoch"], 1)
        and best["epoch"] <= epoch
        and is_number(best["val_top1"])
        and 0 <= best["val_top1"] <= 1
    )
