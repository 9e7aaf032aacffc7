"""Tutorial 14's training loop as a file: a ConViT learns `shapes` in a minute or two.

Run `python examples/train_in_60_lines.py`. Copy it, and make it yours.
"""

from functools import partial

import miniconvit as mc
from miniconvit.data import augment, epoch_order, load_dataset, normalize
from miniconvit.engine import Classification, Engine

EPOCHS, BATCH, PEAK = 6, 64, 2e-3


def load_train(data, which, epoch, start, stop):
    """Images and labels of a part of the batch `which`; the engine's workers call it."""
    i = which[start:stop]
    images = augment(data.train.images[i], i, seed=0, epoch=epoch, preset=data.augmentation)
    return normalize(images, data.mean, data.std), data.train.labels[i]


def load_val(data, start, stop):
    """Some of the validation images."""
    return normalize(data.val.images[start:stop], data.mean, data.std)


def main(steps=None):
    """Trains for EPOCHS, or for so many steps. Returns the accuracy on the validation images."""
    data = load_dataset("shapes")
    config = mc.VARIANTS["convit_micro32"]
    params = mc.init_params(config, seed=0)
    optimizer = mc.AdamW(params, weight_decay=0.05)
    per_epoch = len(data.train.labels) // BATCH
    steps = steps or EPOCHS * per_epoch
    with Engine(Classification(config)) as engine:
        for step in range(steps):
            epoch, place = divmod(step, per_epoch)
            order = epoch_order(len(data.train.labels), seed=0, epoch=epoch)
            which = order[place * BATCH : (place + 1) * BATCH]
            load = partial(load_train, data, which, epoch)
            loss, correct, grads = engine.loss_and_grads(load, BATCH, params)
            lr = mc.warmup_cosine(step / per_epoch, EPOCHS, PEAK, 1, PEAK / 100, PEAK / 100)
            optimizer.step(params, grads, lr)
            if (step + 1) % 50 == 0:
                print(
                    f"step {step + 1:4}   loss {loss:.3f}   {correct} of {BATCH} right", flush=True
                )
            if place == per_epoch - 1 or step == steps - 1:
                logits = engine.logits(partial(load_val, data), len(data.val.labels), params)
                accuracy = (logits.argmax(axis=1) == data.val.labels).mean()
                print(f"epoch {epoch + 1}: {accuracy:.1%} of the validation images right")
    return accuracy


if __name__ == "__main__":
    main()
