"""The objective that the settings of a run ask for."""

from dataclasses import dataclass

from ..arrays import array_module
from ..engine import Classification, classification
from ..neighbours import (
    Taps,
    contrastive_backward,
    contrastive_forward,
    cosine_backward,
    cosine_forward,
    isotropic_backward,
    isotropic_forward,
    masked_loss_backward,
    masked_loss_forward,
    patch_mixing_backward,
    patch_mixing_forward,
)
from ..neighbours.isotropic import IsotropicConfig, patches_of
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


@dataclass(frozen=True)
class Masked:
    """Mean squared error of a network's guesses at hidden patches.

    A batch is images (b, C, height, width) and which of their patches are hidden, truth (b, N).
    """

    config: IsotropicConfig

    @property
    def shapes(self):
        return shapes_of(self.config)

    @property
    def rows(self):
        return self.config.num_patches

    @property
    def inputs(self):
        c = self.config
        return (c.in_chans, c.img_size, c.img_size), (c.num_patches,)

    @property
    def output(self):
        return (1 + self.config.depth * self.config.embed_dim,)

    def step(self, batch, params, share, first, seed, step, blocks):
        images, mask = batch
        predicted, cache = isotropic_forward(images, params, self.config, mask)
        patches = patches_of(images, self.config.patch_size)
        loss, cache_loss = masked_loss_forward(predicted, patches, mask)
        dpredicted = masked_loss_backward(share, cache_loss)
        return (share * loss,), isotropic_backward(dpredicted, cache)

    def answer(self, batch, params, blocks):
        """(b, 1 + depth * D): the error of each image, and of the whole image, with nothing hidden,
        the means over the tokens after each block."""
        images, mask = batch
        predicted, _ = isotropic_forward(images, params, self.config, mask)
        wrong = (predicted - patches_of(images, self.config.patch_size)) ** 2  # (b, N, K)
        error = (wrong.mean(axis=2) * mask).sum(axis=1, keepdims=True)
        error /= mask.sum(axis=1, keepdims=True)
        _, (means, *_) = isotropic_forward(images, params, self.config, mask & False)
        return array_module(images).concatenate([error, *means], axis=1)


def objective_of(settings, config):
    """The Objective of a run. config: of its model."""
    weights = settings.cosine, settings.contrastive, settings.patch_mixing
    if any(weights):
        return Diversified(config, settings.label_smoothing, *weights)
    return classification(config, settings.label_smoothing)
