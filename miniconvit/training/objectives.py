"""The objective that the settings of a run ask for."""

from dataclasses import dataclass

from ..engine import Classification
from ..neighbours import (
    Taps,
    contrastive_backward,
    contrastive_forward,
    cosine_backward,
    cosine_forward,
    patch_mixing_backward,
    patch_mixing_forward,
)
from ..neighbours.models import shapes_of


@dataclass(frozen=True)
class Diversified(Classification):
    """Classification, and losses on the patch tokens of the last block, each with its weight.

    With patch_mixing a batch has labels of the patches (b, N) too, and the parameters a patch_head.
    """

    cosine: float = 0.0
    contrastive: float = 0.0
    patch_mixing: float = 0.0

    @property
    def shapes(self):
        return shapes_of(self.config)

    @property
    def inputs(self):
        labels = (self.config.num_patches,)
        return (*super().inputs, labels) if self.patch_mixing else super().inputs

    def step(self, batch, params, share, first, seed, step, blocks):
        images, targets, *patch_labels = batch
        more, head_grads = 0.0, {}

        def send_back(tokens):
            nonlocal more, head_grads
            more, dtokens, head_grads = self._on_tokens(tokens, params, share, *patch_labels)
            return dtokens

        taps = Taps(blocks, self.config.num_patches, send_back)
        rest = share, first, seed, step, taps
        (loss, correct), grads = super().step((images, targets), params, *rest)
        return (loss + more, correct), grads | head_grads

    def _on_tokens(self, tokens, params, share, patch_labels=None):
        """share times the weighted sum of the losses, its gradient by the last tokens, and those of
        the patch head by name."""
        h, loss, dh, grads = tokens[-1], 0.0, 0.0, {}
        if self.cosine:
            y, cache = cosine_forward(h)
            loss += self.cosine * share * y
            dh += cosine_backward(self.cosine * share, cache)
        if self.contrastive:
            y, cache = contrastive_forward(h, tokens[0])
            loss += self.contrastive * share * y
            dh += contrastive_backward(self.contrastive * share, cache)
        if self.patch_mixing:
            head = params["patch_head.weight"], params["patch_head.bias"]
            y, cache = patch_mixing_forward(h, *head, patch_labels)
            loss += self.patch_mixing * share * y
            dtokens, dweight, dbias = patch_mixing_backward(self.patch_mixing * share, cache)
            dh += dtokens
            grads = {"patch_head.weight": dweight, "patch_head.bias": dbias}
        return loss, dh, grads


def objective_of(settings, config):
    """The Objective of a run. config: of its model."""
    weights = settings.cosine, settings.contrastive, settings.patch_mixing
    if any(weights):
        return Diversified(config, settings.label_smoothing, *weights)
    return Classification(config, settings.label_smoothing)
