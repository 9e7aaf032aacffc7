"""What an exercise is, and what it is judged on: data alone, in which no answer's source stands."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Unit:
    """One function pair `name_forward`, `name_backward`; what each returns, by name.

    A gradient called `grads` stands for a dict of gradients. `adamw_steps` has no backward.
    """

    name: str
    gradients: tuple[str, ...]
    outputs: tuple[str, ...] = ("y",)

    @property
    def forward(self):
        return f"{self.name}_forward" if self.gradients else self.name

    @property
    def backward(self):
        return f"{self.name}_backward"


@dataclass(frozen=True)
class Exercise:
    """One file of a student.

    module: the library's module that it is cut from. mistakes: common ones, beside those of the
    catalogue of mutants. goal is for the instructor and the student, minutes a guess for one who
    knows NumPy.
    """

    name: str
    module: str
    units: tuple[Unit, ...]
    points: int
    minutes: int = 0
    goal: str = ""
    hint: str = ""
    mistakes: tuple[str, ...] = ()

    @property
    def file(self):
        return f"{self.name}.py"

    @property
    def functions(self):
        """The public names that the student writes."""
        if self.name == "adamw":
            return ("AdamW.step",)
        return tuple(name for unit in self.units for name in (unit.forward, unit.backward))


@dataclass(frozen=True)
class Size:
    """B images of a grid of patches, H heads of width d, M hidden features, C classes; images of
    `channels` channels in patches of (height, width) pixels."""

    B: int
    grid: tuple[int, int]
    H: int
    d: int
    M: int
    C: int
    channels: int
    patch: tuple[int, int]
    dtype: str = "float64"

    @property
    def N(self):
        return self.grid[0] * self.grid[1]

    @property
    def D(self):
        return self.H * self.d

    def __str__(self):
        rows, cols = self.grid
        heads = f"{self.H} head{'s' * (self.H > 1)} of width {self.d}"
        kind = "" if self.dtype == "float64" else f", {self.dtype}"
        return f"{self.B} image{'s' * (self.B > 1)}, grid {rows} x {cols}, {heads}{kind}"


@dataclass(frozen=True)
class Draw:
    """One set of arguments, the gradient of the output, and the right answers."""

    args: tuple
    y: object
    dy: object = None
    gradients: object = None
    of_first_image: object = None


@dataclass(frozen=True)
class Case:
    """Two draws of one size: the second is run between forward and backward of the first.

    parameters: function to the names of its parameters.
    """

    size: Size
    first: Draw
    second: Draw
    parameters: dict[str, tuple[str, ...]]


def map_arrays(function, value):
    """The value with every array in it, however nested, replaced by function(array)."""
    if isinstance(value, np.ndarray | np.generic):
        return function(value)
    if isinstance(value, tuple):
        return tuple(map_arrays(function, item) for item in value)
    if isinstance(value, dict):
        return {key: map_arrays(function, item) for key, item in value.items()}
    return value
