"""The gradient checker, in reading order: checker, cases (every layer under it), mutants (bugs)."""

from .checker import check_gradients
