"""The gradient checker, in reading order: checker, drawing and cases (every layer under it),
neighbours (the papers beside ConViT), mutants (bugs)."""

from .checker import check_gradients
