"""Named settings of `train`: where a run starts from, before explicit flags change it."""

BASE = {
    "subset": 1.0,
    "steps": None,
    "weight_decay": 0.05,
    "clip_grad": None,
    "label_smoothing": 0.0,
    "drop_path": 0.0,
    "seed": 0,
}

RECIPES = {
    "shapes-minute": BASE
    | {
        "data": "shapes",
        "model": "convit_micro32",
        "epochs": 12,
        "batch_size": 64,
        "lr": 2e-3,
        "warmup_epochs": 1.0,
        "augment": "none",
    },
    "cifar10-10min": BASE
    | {
        "data": "cifar10",
        "model": "convit_mini32",
        "epochs": 20,
        "batch_size": 128,
        "lr": 1e-3,
        "warmup_epochs": 1.0,
        "augment": "crop-flip",
    },
}

DEFAULT_RECIPE = {"shapes": "shapes-minute", "cifar10": "cifar10-10min"}
"""Data set to recipe."""
