"""The catalogue of planted bugs under other gradient checkers, each as it comes.

Every checker sees the same pairs, inputs and planted bugs as `miniconvit gradcheck`, wrapped as its
own kind of custom function. A bug counts as missed where every case passes. Beside them the right
layers are checked: what refuses those too has found nothing.

The pairs are NumPy's, so each framework calls back. Its differentiation is not what is tested.
Needs torch, jax, autograd and scipy:

    pip install torch jax autograd scipy
    python benchmarks/checkers.py
"""

import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import click
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from miniconvit import check_gradients
from miniconvit.gradcheck.cases import CASES, FUNCTIONS
from miniconvit.gradcheck.mutants import MUTANTS, mutate


class Flat:
    """A case as one function of arrays, in the order of its inputs, to one vector."""

    def __init__(self, case):
        self.case = case
        self.names = list(case.inputs)
        self.inputs = list(case.inputs.values())

    def forward(self, *arrays):
        """The vector, and what backward needs. The arrays are copied: they may be a framework's."""
        arrays = dict(zip(self.names, (np.array(x) for x in arrays), strict=True))
        y, cache = self.case.forward(**arrays)
        parts = y if isinstance(y, tuple) else (y,)
        vector = np.concatenate([np.ravel(part) for part in parts])
        return vector, (cache, [np.shape(part) for part in parts], isinstance(y, tuple))

    def backward(self, dvector, kept):
        """The gradients in the order of the inputs."""
        cache, shapes, is_tuple = kept
        ends = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]
        parts = np.split(np.array(dvector), ends)
        dys = [p.reshape(s) if s else p.item() for p, s in zip(parts, shapes, strict=True)]
        grads = self.case.backward(tuple(dys) if is_tuple else dys[0], cache)
        if isinstance(grads, dict):
            return tuple(grads[name] for name in self.names)
        return (grads if isinstance(grads, tuple) else (grads,))[: len(self.names)]

    def gradients(self, dvector, *arrays):
        """The gradients at these inputs, of a backward pass on a fresh cache."""
        return self.backward(dvector, self.forward(*arrays)[1])


def ours(flat, seed):
    c = flat.case
    return check_gradients(c.forward, c.backward, c.inputs, seed, expect_zero=c.expect_zero).ok


def torch_gradcheck(flat, seed, fast=False):
    import torch

    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            arrays = [t.detach().numpy() for t in tensors]
            vector, ctx.kept = flat.forward(*arrays)
            ctx.arrays = arrays if getattr(flat.case, "spends", False) else None
            return torch.from_numpy(vector)

        @staticmethod
        def backward(ctx, dvector):
            kept = ctx.kept if ctx.arrays is None else flat.forward(*ctx.arrays)[1]
            grads = flat.backward(dvector.numpy(), kept)
            return tuple(torch.from_numpy(np.ascontiguousarray(g)) for g in grads)

    torch.manual_seed(seed)
    tensors = [torch.tensor(x, requires_grad=True) for x in flat.inputs]
    return torch.autograd.gradcheck(Layer.apply, tensors, fast_mode=fast, raise_exception=False)


def jax_check_grads(flat, seed, dtype="float64"):
    import jax
    from jax.test_util import check_grads

    jax.config.update("jax_enable_x64", dtype == "float64")
    inputs = [np.asarray(x, dtype) for x in flat.inputs]
    size = len(flat.forward(*inputs)[0])

    @jax.custom_vjp
    def layer(*arrays):
        shape = jax.ShapeDtypeStruct((size,), dtype)
        return jax.pure_callback(lambda *a: flat.forward(*a)[0], shape, *arrays)

    def backward(arrays, dvector):
        shapes = tuple(jax.ShapeDtypeStruct(x.shape, dtype) for x in arrays)
        return jax.pure_callback(
            lambda d, *a: tuple(flat.gradients(d, *a)), shapes, dvector, *arrays
        )

    layer.defvjp(lambda *arrays: (layer(*arrays), arrays), backward)
    check_grads(layer, [jax.numpy.asarray(x) for x in inputs], order=1, modes=["rev"])
    return True


def autograd_check_grads(flat, seed, dtype="float64"):
    from autograd.extend import defvjp_argnums, primitive
    from autograd.test_util import check_grads

    layer = primitive(lambda *arrays: flat.forward(*arrays)[0])

    def vjps(argnums, y, arrays, kwargs):
        def vjp(dvector):
            grads = flat.gradients(dvector, *arrays)
            return tuple(np.asarray(grads[i], dtype) for i in argnums)

        return vjp

    defvjp_argnums(layer, vjps)
    np.random.seed(seed)
    inputs = [np.asarray(x, dtype) for x in flat.inputs]
    every = tuple(range(len(inputs)))  # where it is not told, it looks at the first alone
    check_grads(layer, every, modes=["rev"], order=1)(*inputs)
    return True


def scipy_check_grad(flat, seed, limit=1e-6):
    """It returns the norm of all errors, and whoever reads it judges: up to `limit` is passed."""
    from scipy.optimize import check_grad

    shapes = [np.shape(x) for x in flat.inputs]
    ends = np.cumsum([x.size for x in flat.inputs])[:-1]
    start = np.concatenate([x.ravel() for x in flat.inputs])
    weights = np.random.default_rng(seed).standard_normal(len(flat.forward(*flat.inputs)[0]))

    def arrays(point):
        return [p.reshape(s) for p, s in zip(np.split(point, ends), shapes, strict=True)]

    def value(point):
        return float(flat.forward(*arrays(point))[0] @ weights)

    def gradient(point):
        return np.concatenate([np.ravel(g) for g in flat.gradients(weights, *arrays(point))])

    return check_grad(value, gradient, start) <= limit


CHECKERS = {
    "miniconvit": ours,
    "torch gradcheck": torch_gradcheck,
    "torch gradcheck, fast_mode": lambda f, s: torch_gradcheck(f, s, fast=True),
    "JAX check_grads, float64": jax_check_grads,
    "JAX check_grads, float32": lambda f, s: jax_check_grads(f, s, "float32"),
    "autograd check_grads, float64": autograd_check_grads,
    "autograd check_grads, float32": lambda f, s: autograd_check_grads(f, s, "float32"),
    "SciPy check_grad, up to 1e-6": scipy_check_grad,
    "SciPy check_grad, up to 1e-4": lambda f, s: scipy_check_grad(f, s, 1e-4),
}


def passes(checker, case, seed):
    """Whether the checker accepts the case; an exception is its way of saying no, or the bug's."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(CHECKERS[checker](Flat(case), seed))
    except Exception:
        return False


def cases_of(layer, seed, functions=FUNCTIONS):
    for case in CASES[layer](np.random.default_rng(seed), functions):
        yield SimpleNamespace(**vars(case), spends=layer == "convit")  # its cache is given up


def examine(checker, layers, seed):
    """([names of missed bugs], number of bugs, [refused right cases], number of right cases)."""
    missed, refused, planted, right = [], [], 0, 0
    for layer in layers:
        accepted = []
        for i, case in enumerate(cases_of(layer, seed)):
            right += 1
            accepted.append(passes(checker, case, seed))
            if not accepted[-1]:
                refused.append(f"{layer} {i + 1}")
        for mutant in (m for m in MUTANTS if m.function == f"{layer}_backward"):
            planted += 1
            functions = SimpleNamespace(**(vars(FUNCTIONS) | {mutant.function: mutate(mutant)}))
            wrong = cases_of(layer, seed, functions)
            # A case that is refused when it is right too says nothing of the bug.
            if all(
                passes(checker, c, seed) for c, good in zip(wrong, accepted, strict=True) if good
            ):
                missed.append(mutant.name)
    return missed, planted, refused, right


@click.command(help=__doc__.split("\n\n")[0])
@click.option("--checker", "checkers", multiple=True, type=click.Choice(CHECKERS), help="All.")
@click.option("--layer", "layers", multiple=True, type=click.Choice(CASES), help="All.")
@click.option("--seed", default=0, show_default=True, help="Random seed of the inputs.")
def main(checkers, layers, seed):
    click.echo("| checker | missed | right ones refused |\n| --- | --- | --- |")
    remarks = []
    for checker in checkers or CHECKERS:
        missed, planted, refused, right = examine(checker, layers or CASES, seed)
        click.echo(f"| {checker} | {len(missed)} of {planted} | {len(refused)} of {right} |")
        remarks.append(f"{checker} misses: {', '.join(missed) or 'none'}")
        remarks.append(f"{checker} refuses: {', '.join(refused) or 'none'}")
    click.echo("\n" + "\n".join(remarks))


if __name__ == "__main__":
    main()
