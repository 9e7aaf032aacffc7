"""A training step and the answers of a whole ConViT on a GPU, as `model.py` describes it.

Between the images and the gradients there is nothing but kernels and products of this folder, so
that a graph can hold all of it.
"""

from math import prod

from ....arguments import check_params, checked_targets
from ....arrays import DROP_PATH
from ....errors import UserError
from ....model import param_shapes
from .block import Blocks

LOSS_WARPS = 16  # 512 threads, which may take 128 registers each


class Model:
    """One model's forward and backward, by Kernels."""

    def __init__(self, config, kernels):
        self.config, self.kernels, self.blocks = config, kernels, Blocks(kernels)
        self._shapes = param_shapes(config)

    def step(self, batch, params, grads, label_smoothing, seed, number):
        """(loss, correct), scalar arrays, of a batch (images, targets); all of grads are written.

        number: the step's, on the device, see Buffers.note.
        """
        images, targets = batch
        images = self._check(images, params)
        weights, factors = self.blocks.operands(params), self._factors(len(images), seed, number)
        logits, cache = self._forward(images, params, weights, factors)
        loss, correct, dlogits = self._loss(logits, targets, label_smoothing)
        self._backward(dlogits, cache, weights, grads)
        return loss, correct

    def answer(self, images, params):
        """The logits (B, num_classes), without drop path."""
        images, weights = self._check(images, params), self.blocks.operands(params)
        return self._forward(images, params, weights, None, False)[0]

    def _factors(self, B, seed, number):
        """What each branch of each block is multiplied by, (depth, 2, B): all drop path in one
        draw, the bits of model.drop_path_masks. None where nothing is dropped."""
        config, k = self.config, self.kernels
        if not config.drop_path_rate:
            return None
        factors = k.empty(config.depth, 2, B)
        k.flat("drop_path", factors.size, factors, number, seed, DROP_PATH, config.depth, B,
               config.drop_path_rate)  # fmt: skip
        return factors

    def _check(self, images, params):
        """As convit_forward: a kernel that is given less would read what lies behind it."""
        config = self.config
        expected = (config.in_chans, *config.image)
        if images.shape[1:] != expected or not len(images):
            raise UserError(
                f"the model expects images of shape (B, *{expected}), not {images.shape}"
            )
        check_params(params, self._shapes)
        if images.dtype != self.kernels.dtype:
            raise UserError(
                f"images are {images.dtype} but the parameters {self.kernels.dtype.__name__}: "
                "normalise the images and cast them to the parameters' dtype"
            )
        return self.kernels.xp.ascontiguousarray(images)

    def _forward(self, images, params, weights, factors, keep_caches=True):
        config, k, B = self.config, self.kernels, len(images)
        D, N = config.embed_dim, config.num_patches
        area = prod(config.patch) * config.in_chans
        patches = k.empty(B * N, area)
        k.rows("patches", B * N, images, patches, B * N, *images.shape[1:], *config.patch)
        weight = params["patch_embed.proj.weight"].reshape(D, area)
        x = k.product(patches, weight.T)  # (B * N, D)
        k.rows("embed", B * N, x, params["patch_embed.proj.bias"], params.get("pos_embed"),
               B * N, N, D)  # fmt: skip
        x, caches = x.reshape(B, N, D), []
        of_blocks, operands = _by_block(params), _by_block(weights)
        for i in range(config.depth):
            if i == config.local_up_to_layer:
                joined = k.empty(B, 1 + N, D)
                k.rows("join", B * (1 + N), x, params["cls_token"], joined, B * (1 + N), N, D)
                x = joined
            is_first = i == config.depth - 1 and config.has_cls_token
            x, cache = self.blocks.forward(
                x, of_blocks[i], operands[i], config.num_heads, config.grid,
                (None, None) if factors is None else factors[i], 1 if is_first else x.shape[1],
            )  # fmt: skip
            if keep_caches:
                caches.append(cache)
            del cache  # before the next block makes its own
        shape, first = x.shape, x[:, 0].copy()
        norm = params["norm.weight"], params["norm.bias"]
        _, normed, statistics = self.blocks.add_norm(first, norm=norm)  # (B, D)
        logits = k.product(normed, weights["head.weight"].T)
        k.rows("embed", B, logits, params["head.bias"], None, B, 1, config.num_classes)
        return logits, (patches, caches, shape, normed, statistics)

    def _loss(self, logits, targets, label_smoothing):
        """The mean loss, the count of right answers, and dlogits as an operand."""
        k, (B, C) = self.kernels, logits.shape
        dlogits = k.empty_operand(B, C)
        targets = checked_targets(k.xp, logits, targets, label_smoothing)
        loss, correct = k.empty(), k.xp.empty((), k.xp.int64)
        is_labels = targets.ndim == 1
        kind = k.xp.int64 if is_labels else k.dtype
        targets = k.xp.ascontiguousarray(targets.astype(kind, copy=False))
        labels, shares = (targets, None) if is_labels else (None, targets)
        shared = LOSS_WARPS * 2 * loss.dtype.itemsize
        k.launch("cross_entropy", 1, logits, labels, shares, dlogits, loss, correct, B, C,
                 label_smoothing, warps=LOSS_WARPS, shared=shared)  # fmt: skip
        return loss, correct, dlogits

    def _backward(self, dlogits, cache, weights, grads):
        config, k = self.config, self.kernels
        patches, caches, shape, normed, statistics = cache
        self.blocks.linear_backward(dlogits, normed, grads, "head")
        dnormed = k.product(dlogits, weights["head.weight"])
        dnorm = grads["norm.weight"], grads["norm.bias"]
        dx, _ = self.blocks.norm_backward(dnormed, statistics, dnorm)
        dx = self.blocks.first_tokens(dx, shape)
        of_blocks = _by_block(grads)
        for i in reversed(range(config.depth)):
            dx = self.blocks.backward(dx, caches.pop(), of_blocks[i])
            if i == config.local_up_to_layer:
                k.sum_rows(dx[:, 0], grads["cls_token"])
                dx = dx[:, 1:].copy()
        if not config.has_cls_token:
            grads["cls_token"][...] = 0.0
        B, N, D = dx.shape
        if "pos_embed" in grads:
            k.sum_rows(dx.reshape(B, N * D), grads["pos_embed"])
        rows, dweight = dx.reshape(B * N, D), grads["patch_embed.proj.weight"]
        k.product(rows.T, patches, out=dweight.reshape(D, -1))
        k.sum_rows(rows, grads["patch_embed.proj.bias"])


def _by_block(params):
    """The parameters of each block under their short names, by its number."""
    blocks = {}
    for name, value in params.items():
        if name.startswith("blocks."):
            _, i, short = name.split(".", 2)
            blocks.setdefault(int(i), {})[short] = value
    return blocks
