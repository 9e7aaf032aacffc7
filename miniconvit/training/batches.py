"""The batches of an epoch: drawn, augmented and mixed, and loaded ahead of their step."""

from contextlib import closing

from ..arrays import to_device
from ..data import (
    draw_mix,
    draw_patch_mix,
    epoch_order,
    erase,
    feed,
    mix_images,
    mix_patch_labels,
    mix_targets,
    normalize,
)


def batches(run, step, end):
    """For each step from `step` to `end` of an epoch, its batch: a function load(start, stop).

    load gives that part of the batch where the engine computes: images (b, 3, H, W), normalised,
    and labels (b,), or where images are mixed targets (b, C), and with patch mixing labels of the
    patches (b, N). run: a Run. Closing the generator ends the threads that load ahead.
    """
    while step < end:
        number = step // run.schedule.steps_per_pass
        stop = min((number + 1) * run.schedule.steps_per_pass, end)
        yield from _batches_of_a_pass(run, number, range(step, stop))
        step = stop


def _batches_of_a_pass(run, number, steps):
    """The batches of these steps of one pass over the images, which has an order of its own."""
    s, images = run.settings, run.data.train.images
    order = epoch_order(len(images), s.seed, number, s.repeats)
    order = to_device(order, images.xp)
    first, size = number * run.schedule.steps_per_pass, run.schedule.batch_size
    drawn = [order[(step - first) * size :][:size] for step in steps]

    def view(draws):
        indices, copies = divmod(draws, s.repeats)
        return images.training_view(indices, s.seed, number, s.augment, copies)

    def spans(n):
        """What this rank computes, and where images are mixed their partners."""
        first, last = run.engine.span(n)
        if not (s.mixup or s.cutmix or s.patch_mixing):
            return [(first, last)]
        if max(first, n - last) < min(last, n - first):  # they overlap
            return [(min(first, n - last), max(last, n - first))]
        return [(first, last), (n - last, n - first)]

    loaders = images.loaders(run.engine.workers)
    with closing(feed(view, drawn, loaders, spans)) as fed:
        for step, draws, pixels in zip(steps, drawn, fed, strict=True):
            yield _batch(run, step, draws, pixels)


def _batch(run, step, draws, pixels):
    """The function load of one step: what the pass has drawn for it, and a function (start, stop)
    that gives a part of these images, augmented."""
    s, n, xp = run.settings, len(draws), run.engine.xp
    number = step // run.schedule.steps_per_pass
    mix = (
        draw_patch_mix(s.seed, step, run.config.grid, run.config.patch)
        if s.patch_mixing
        else draw_mix(s.mixup, s.cutmix, s.seed, step, run.config.image)
    )

    def part(start, stop):
        indices, copies = divmod(to_device(draws[start:stop], xp), s.repeats)
        images = normalize(to_device(pixels(start, stop), xp), run.data.mean, run.data.std)
        erase(images, indices, s.seed, number, s.augment, copies)
        return images, run.data.train.labels[indices]

    def load(start, stop):
        images, labels = part(start, stop)
        if mix is None:
            return images, labels
        others, other_labels = (x[::-1] for x in part(n - stop, n - start))
        classes = run.config.num_classes
        targets = mix_targets(labels, other_labels, mix, classes, s.label_smoothing)
        images = mix_images(images, others, mix)
        if not s.patch_mixing:
            return images, targets
        grid, patch = run.config.grid, run.config.patch
        return images, targets, mix_patch_labels(labels, other_labels, mix, grid, patch)

    return load
