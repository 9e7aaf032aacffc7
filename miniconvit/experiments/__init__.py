"""The paper's experiments, at a size that fits the machine at hand: plan, runs, tables, figures."""
