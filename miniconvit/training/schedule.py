"""How many steps a run has, which of them are an epoch, and the learning rate of each."""

from dataclasses import dataclass

from ..optim import warmup_cosine


@dataclass(frozen=True)
class Schedule:
    """The steps of a run, counted from 0. A pass sees the images once, an epoch in some passes."""

    batch_size: int
    steps_per_pass: int
    steps_per_epoch: int
    total_steps: int
    peak: float
    warmup_epochs: float

    @property
    def epochs(self):
        return -(-self.total_steps // self.steps_per_epoch)

    def ends(self, epoch):
        """(first, end): the epoch has the steps first .. end - 1. The last may have fewer."""
        first, end = epoch * self.steps_per_epoch, (epoch + 1) * self.steps_per_epoch
        return min(first, self.total_steps), min(end, self.total_steps)

    def lr(self, step):
        """The rate of a step: at both ends of the schedule a hundredth of the peak."""
        t, total = step / self.steps_per_epoch, self.total_steps / self.steps_per_epoch
        low = self.peak / 100
        return warmup_cosine(t, total, self.peak, self.warmup_epochs, start=low, minimum=low)


def make_schedule(settings, images):
    """The Schedule of these Settings on so many training images."""
    batch_size = min(settings.batch_size, images)
    steps_per_pass = images // batch_size  # a remainder waits for the next pass's order
    steps_per_epoch = settings.passes * steps_per_pass
    total_steps = settings.steps or settings.epochs * steps_per_epoch
    lengths = batch_size, steps_per_pass, steps_per_epoch, total_steps
    return Schedule(*lengths, settings.lr, settings.warmup_epochs)
