"""The engine for a GPU: the whole batch at once, and nobody waits for a result within a step."""

from contextlib import suppress

from .. import layers
from ..arrays import to_cpu
from ..errors import UserError
from .cuda import out_of_memory
from .ranks import Ranks

INFERENCE_ROWS = 65536  # tokens at a time, which fills a GPU without filling its memory


class DeviceEngine:
    """Runs training steps and inference of one Objective on one device: Engine's interface.

    The numbers of a step stay on the device; read() fetches many at once.
    """

    workers = None
    steps_between_reads = 50

    def __init__(self, objective, xp, ranks=None):
        self.objective, self.xp, self.ranks = objective, xp, ranks or Ranks()

    def close(self):
        """Gives the memory that is not in use back to the device."""
        with suppress(RuntimeError):  # after an error of CUDA, which is the one to be told
            self.xp.get_default_memory_pool().free_all_blocks()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def loss_and_grads(self, load, n, params, seed=0, step=0):
        """As Engine's, but the numbers are scalar arrays on the device.

        load is called once, with (0, n). Raises UserError where the device's memory is too small,
        with the largest of n / 2, n / 4, ... images for which it has just been large enough.
        """

        def run(n):
            numbers, grads = self.objective.step(load(0, n), params, 1.0, 0, seed, step, layers)
            return *numbers, grads

        with suppress(MemoryError), out_of_memory():
            return run(n)
        raise UserError(self._too_large(run, n))

    def _too_large(self, run, n):
        """The sentence for a batch that does not fit; what does fit is tried out."""
        total = self.xp.cuda.runtime.memGetInfo()[1] / 1e9
        fits = n // 2
        while fits:
            self.close()
            with suppress(MemoryError), out_of_memory():
                run(fits)
                break
            fits //= 2
        advice = (
            f"add --batch-size {fits}, which fits" if fits else "choose a smaller --model, or "
            "--device cpu"
        )  # fmt: skip
        images = f"{n} images" if n > 1 else "one image"
        return f"a step of {images} does not fit into the GPU's {total:.1f} GB: {advice}"

    def hold(self, params, optimizer):
        """As Engine's: all lies on the device already."""

    def update(self, optimizer, params, grads, lr=None):
        """As Engine's."""
        optimizer.step(params, grads, lr)

    def logits(self, load, n, params):
        """As Engine's: (n, num_classes), on the CPU. Takes fewer images at a time where the memory
        is too small."""

        def run(start, stop):
            loaded = load(start, stop)
            batch = loaded if isinstance(loaded, tuple) else (loaded,)
            return self.objective.answer(batch, params, layers)

        size = max(1, min(n, INFERENCE_ROWS // self.objective.rows))
        while True:
            try:
                with out_of_memory():
                    pieces = [run(start, min(start + size, n)) for start in range(0, n, size)]
                    return to_cpu(self.xp.concatenate(pieces))
            except MemoryError:
                if size == 1:
                    raise
            size = (size + 1) // 2
            self.close()

    def wait(self):
        """Until everything is computed."""
        self.xp.cuda.get_current_stream().synchronize()

    def read(self, rows):
        """Rows of scalar arrays, equally many in each, as lists of floats. Waits for the device."""
        scalars = [scalar.astype(self.xp.float32) for row in rows for scalar in row]
        return to_cpu(self.xp.stack(scalars)).reshape(len(rows), -1).tolist() if rows else []
