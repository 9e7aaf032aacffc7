"""What a training step computes. An engine knows pieces, workers and sums, but no model."""

from dataclasses import dataclass
from typing import Any, Protocol

from ..arrays import Array, Params
from ..config import ConViTConfig
from ..layers import cross_entropy_backward, cross_entropy_forward
from ..model import convit_backward, convit_forward, param_shapes
from ..neighbours.models import MODELS, is_convit
from ..optim import is_running


class Objective(Protocol):
    """What an engine asks for. An objective is immutable: a forked worker has a copy.

    A batch is what an engine's `load` gives, a tuple of arrays whose first axis is the images'. The
    results depend on the piece alone, never on who computes it or on another piece.
    """

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name to shape of every parameter."""

    @property
    def rows(self) -> int:
        """Tokens per image, which decide how many images make a piece."""

    @property
    def inputs(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of one image in each array of a batch, or the largest that there may be."""

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of one image's answer, or the largest that there may be."""

    def step(
        self,
        batch: tuple[Array, ...],
        params: Params,
        share: float,
        first: int,
        seed: int,
        step: int,
        blocks: Any,
    ) -> tuple[tuple[Array, ...], Params]:
        """(numbers, gradients) of a piece: scalar arrays, and gradients of some or all parameters.

        Both are added up over the pieces: of a mean over the whole batch give `share` times the
        piece's mean. Chance is drawn from (seed, step) and the place in the batch, `first` on.
        """

    def answer(self, batch: tuple[Array, ...], params: Params, blocks: Any) -> Array:
        """What the model says to a piece's images (b, ...); nothing is kept for a backward pass."""


@dataclass(frozen=True)
class Classification:
    """Cross-entropy of a ConViT on images (b, C, H, W) and labels (b,) or targets (b, classes).

    The numbers are the mean loss and the count of right answers; of targets that are mixed, the
    class with the largest share is the right one.
    """

    config: ConViTConfig
    label_smoothing: float = 0.0

    @property
    def shapes(self):
        return param_shapes(self.config)

    @property
    def rows(self):
        return self.config.num_patches

    @property
    def inputs(self):
        return (self.config.in_chans, *self.config.image), self.output

    @property
    def output(self):
        return (self.config.num_classes,)

    def step(self, batch, params, share, first, seed, step, blocks):
        images, targets = batch
        logits, cache = convit_forward(images, params, self.config, True, seed, step, first, blocks)
        numbers, dlogits = self._judge(logits, targets, share)
        return numbers, convit_backward(dlogits, cache)

    def _judge(self, logits, targets, share):
        """share times the loss and the count of right answers, and the gradient of the logits."""
        loss, cache_loss = cross_entropy_forward(logits, targets, self.label_smoothing)
        labels = targets if targets.ndim == 1 else targets.argmax(axis=1)
        correct = (logits.argmax(axis=1) == labels).sum()
        return (share * loss, correct), cross_entropy_backward(share, cache_loss)

    def answer(self, batch, params, blocks):
        return convit_forward(batch[0], params, self.config, blocks=blocks, keep_caches=False)[0]


@dataclass(frozen=True)
class Classifier(Classification):
    """The same of another model that neighbours/models.py has a forward and a backward of.

    Batch normalisation has the statistics of a piece; what running ones are off by is the mean over
    the pieces. Nothing is drawn by chance.
    """

    config: Any

    @property
    def shapes(self):
        return self._model.shapes(self.config)

    @property
    def rows(self):
        return self.config.rows

    @property
    def _model(self):
        return MODELS[type(self.config)]

    def step(self, batch, params, share, first, seed, step, blocks):
        images, targets = batch
        logits, cache = self._model.forward(images, params, self.config, True, blocks)
        numbers, dlogits = self._judge(logits, targets, share)
        grads = self._model.backward(dlogits, cache)
        return numbers, {n: share * g if is_running(n) else g for n, g in grads.items()}

    def answer(self, batch, params, blocks):
        return self._model.forward(batch[0], params, self.config, False, blocks)[0]


def classification(config, label_smoothing=0.0):
    """The Objective of plain classification by a model of any kind."""
    return (Classification if is_convit(config) else Classifier)(config, label_smoothing)
