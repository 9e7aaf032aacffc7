"""Training: the loop of a run, its settings, its folder, and what it shows."""
