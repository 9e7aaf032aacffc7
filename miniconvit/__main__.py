"""`python -m miniconvit` is `miniconvit`."""

from .cli import main

main(name="python -m miniconvit")
