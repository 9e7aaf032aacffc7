"""The engine for a GPU: the whole batch at once, and nobody waits for a result within a step."""

from contextlib import suppress
from math import inf
from time import process_time

from .. import layers
from ..arrays import to_cpu
from ..errors import UserError
from ..optim import clip_grad_norm, update_average
from .cuda import out_of_memory
from .objective import Classification

try:
    from .kernels import cuda as kernels
except ImportError:  # the folder was deleted: everything works, only slower
    kernels = None

INFERENCE_ROWS = 65536  # tokens at a time, which fills a GPU without filling its memory


class DeviceEngine:
    """Runs training steps and inference of one Objective on one device: Engine's interface.

    The numbers of a step stay on the device; read() fetches many at once. precision: of the
    products, "float32", "tf32" or "bf16".
    """

    workers = None
    steps_between_reads = 50
    records = True
    """Whether whole steps are recorded as graphs."""

    def __init__(self, objective, xp, precision="float32"):
        self.objective, self.xp, self.precision = objective, xp, precision
        self._buffers = self._model = self._training = self._graph = self._seen = None
        self.graph_problem = None

    def close(self):
        """Gives the memory that is not in use back to the device."""
        with suppress(RuntimeError):  # after an error of CUDA, which is the one to be told
            self.xp.get_default_memory_pool().free_all_blocks()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()

    def _kernels(self, params):
        """The kernels for the type of these parameters, or None where there are none."""
        dtype = str(next(iter(params.values())).dtype)
        return kernels and kernels.kernels_for(self.xp, dtype, self.precision)

    def _ready(self, params):
        """The Model of a Classification, or None of another objective, and the Buffers, both for
        parameters of this type; or None where there are no kernels."""
        found = self._kernels(params)
        if found is None:
            return None
        if self._buffers is None or self._buffers.kernels is not found:
            self._buffers = kernels.Buffers(found, self.objective.shapes)
            if type(self.objective) is Classification:  # one that adds to it computes by Blocks
                self._model = kernels.Model(self.objective.config, found)
        return self._model, self._buffers

    def span(self, n):
        """(start, stop) of what this engine computes of n images: all."""
        return 0, n

    def loss_and_grads(self, load, n, params, seed=0, step=0):
        """As Engine's, but the numbers are scalar arrays on the device.

        load is called once, with (0, n). Raises UserError where the device's memory is too small,
        with the largest of n / 2, n / 4, ... images for which it has just been large enough.
        """

        def run(n):
            batch = load(0, n)
            model, buffers = self._ready(params) or (None, None)
            if model:
                buffers.note(step)
                smoothing = self.objective.label_smoothing
                numbers = model.step(batch, params, buffers.grads, smoothing, seed, buffers.number)
                return *numbers, dict(buffers.grads)
            blocks = self._blocks(params)
            numbers, grads = self.objective.step(batch, params, 1.0, 0, seed, step, blocks)
            return *numbers, buffers.take(grads) if buffers else grads

        with suppress(MemoryError), out_of_memory():
            return run(n)
        raise UserError(self._too_large(run, n))

    def _blocks(self, params):
        """The blocks of another objective."""
        found = self._kernels(params)
        return kernels.Blocks(found) if found else layers

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

    def hold(self, params, optimizer, average=None, trained=None, max_norm=inf, decay=None):
        """As Engine's: each of these dictionaries gets views of one buffer. A Classification can
        take a whole step() of an optimizer that is KNOWN, whose settings are then fixed."""
        self._training = self._graph = self._seen = None
        is_whole = params.keys() == optimizer.exp_avg.keys() == self.objective.shapes.keys()
        if is_whole and (ready := self._ready(params)):
            model, buffers = ready
            buffers.hold(params, optimizer, average, trained)
            names = tuple(params if trained is None else trained)
            if model and type(optimizer) in kernels.KNOWN:
                self._training = params, optimizer, names, max_norm, decay

    @property
    def takes_whole_steps(self):
        """Whether step() can be called: all of a training is held."""
        return self._training is not None

    def step(self, load, n, lr, seed, step):
        """loss_and_grads, clip, update and average of what is held, at once. Returns the loss, the
        count of right answers and the norm, scalar arrays on the device.

        From the second step on it is recorded as a graph, where that gives the same bits.
        """
        _, buffers = self._ready(self._training[0])
        batch = load(0, n)
        form = [(x.shape, x.dtype) for x in batch], seed
        buffers.note(step)
        buffers.note_rates(self._training[1], lr)
        if self._graph and self._graph[0] == form:
            _, graph, inputs = self._graph
            for x, value in zip(inputs, batch, strict=True):
                x[...] = value
            graph.launch(self.xp.cuda.get_current_stream())
            return graph.results.copy()
        try:
            before = buffers.state() if self._is_to_record(form) else None
            with out_of_memory():
                numbers = self._whole_step(batch, seed)
        except MemoryError:
            problem = self._too_large(lambda n: self._whole_step(load(0, n), seed), n)
            raise UserError(problem) from None
        if before:
            self._record(form, batch, seed, before, numbers)
        self._seen = form
        return numbers

    def _whole_step(self, batch, seed):
        """The part of step() that a graph holds."""
        params, optimizer, names, max_norm, decay = self._training
        model, buffers = self._ready(params)
        smoothing = self.objective.label_smoothing
        numbers = model.step(batch, params, buffers.grads, smoothing, seed, buffers.number)
        norm = buffers.clip(names, max_norm)
        buffers.update(optimizer, names)
        if decay is not None:
            buffers.average(decay)
        return buffers.collect(*numbers, norm)

    def _is_to_record(self, form):
        """At the second step of a form: at the first one kernels are compiled."""
        return self.records and self.graph_problem is None and self._seen == form

    def _record(self, form, batch, seed, before, numbers):
        """Records the step that has just been made. The graph must give its numbers and its state
        again, to the bit; else `graph_problem` says why there is none."""
        buffers = self._buffers
        after, inputs = buffers.state(), [x.copy() for x in batch]
        try:
            graph = kernels.Graph(self.xp, lambda: self._whole_step(inputs, seed))
            buffers.restore(before)
            graph.launch(self.xp.cuda.get_current_stream())
            found = [*buffers.state(), graph.results]
            if all(bool((x == y).all()) for x, y in zip(found, [*after, numbers], strict=True)):
                self._graph = form, graph, inputs
            else:
                self.graph_problem = "a graph of the step gives other bits"
        except (MemoryError, RuntimeError, NotImplementedError) as error:
            self.graph_problem = " ".join(str(error).split())[:120]
        buffers.restore(after)
        self.close()  # what the steps without a graph have used

    def _are_ours(self, grads, **held):
        """Whether these gradients are those of the last step, and what else is held."""
        ours = self._buffers and self._buffers.grads
        return ours and all(ours.get(name) is grad for name, grad in grads.items()) and (
            self._buffers.are_held(**held)
        )  # fmt: skip

    def clip(self, grads, max_norm):
        """As Engine's; the norm stays on the device."""
        if self._are_ours(grads):
            return self._buffers.clip(grads, max_norm)
        return clip_grad_norm(grads, max_norm)

    def update(self, optimizer, params, grads, lr=None):
        """As Engine's."""
        moments = {name: optimizer.exp_avg[name] for name in params}
        are_ours = self._are_ours(grads, params=params, exp_avg=moments)
        if are_ours and type(optimizer) in kernels.KNOWN:
            self._buffers.note_rates(optimizer, optimizer.lr if lr is None else lr)
            self._buffers.update(optimizer, grads)
        else:
            optimizer.step(params, grads, lr)

    def average(self, average, params, decay):
        """As Engine's."""
        if self._are_ours({}, average=average, params=params):
            self._buffers.average(decay)
        else:
            update_average(average, params, decay)

    def logits(self, load, n, params):
        """As Engine's: (n, num_classes), on the CPU. Takes fewer images at a time where the memory
        is too small."""

        def run(start, stop):
            loaded = load(start, stop)
            batch = loaded if isinstance(loaded, tuple) else (loaded,)
            model, _ = self._ready(params) or (None, None)
            if model:
                return model.answer(batch[0], params)
            return self.objective.answer(batch, params, self._blocks(params))

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

    def memory_mb(self):
        """What this process holds of the device's memory for arrays, in MB."""
        pools = [self.xp.get_default_memory_pool(), *([self._graph[1].pool] if self._graph else [])]
        return sum(pool.total_bytes() for pool in pools) / 2**20

    def cpu_seconds(self):
        """As Engine's."""
        return process_time()

    def wait(self):
        """Until everything is computed."""
        self.xp.cuda.get_current_stream().synchronize()

    def read(self, rows):
        """Rows of scalar arrays, equally many in each, as lists of floats. Waits for the device."""
        scalars = [scalar.astype(self.xp.float32) for row in rows for scalar in row]
        return to_cpu(self.xp.stack(scalars)).reshape(len(rows), -1).tolist() if rows else []
