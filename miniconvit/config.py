"""What a ConViT is: one frozen description, and the named variants."""

from dataclasses import asdict, dataclass, fields, replace
from math import isfinite
from sys import float_info
from typing import Any, Self

from .errors import UserError, unknown_name

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # per channel, where white is 1
IMAGENET_STD = (0.229, 0.224, 0.225)


def as_pair(size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of an int, which means a square, or of a pair of ints."""
    return (size, size) if isinstance(size, int) else tuple(size)


@dataclass(frozen=True)
class ConViTConfig:
    """Shape of a ConViT (d'Ascoli et al. 2021), under the official names.

    img_size and patch_size are pixels: an int or (height, width). embed_dim is the full width D.
    The first local_up_to_layer blocks are GPSA; the class token joins after them and the rest are
    plain self-attention. With local_up_to_layer=0 the model is a plain ViT; with
    local_up_to_layer >= depth no class token ever joins and the head reads patch 0, as in the
    official code. attention="psa" takes the gates from the GPSA blocks: content and position scores
    are then added before one softmax. use_local_init=False begins these blocks at random, not as a
    soft convolution. Raises UserError where the numbers do not fit together.
    """

    img_size: int | tuple[int, int] = 32
    patch_size: int | tuple[int, int] = 4
    in_chans: int = 3
    num_classes: int = 10
    embed_dim: int = 192
    depth: int = 12
    num_heads: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: bool = False
    local_up_to_layer: int = 10
    locality_strength: float = 1.0
    use_pos_embed: bool = True
    drop_path_rate: float = 0.0
    attention: str = "gpsa"
    use_local_init: bool = True

    def __post_init__(self):
        for name in ("img_size", "patch_size"):
            pair = as_pair(getattr(self, name))
            if len(pair) != 2 or not all(is_count(side, 1) for side in pair):
                raise UserError(f"{name} must be one or two positive integers, not {pair}")
            height, width = pair
            object.__setattr__(self, name, height if height == width else pair)
        for name in ("mlp_ratio", "locality_strength", "drop_path_rate"):
            object.__setattr__(self, name, float(getattr(self, name)))  # np.float64 would spread
        counts = {"in_chans": 1, "num_classes": 1, "embed_dim": 1, "depth": 1, "num_heads": 1}
        for name, least in (counts | {"local_up_to_layer": 0}).items():
            value = getattr(self, name)
            if not is_count(value, least):
                raise UserError(f"{name} must be an integer of at least {least}, not {value!r}")
        if any(side % patch for side, patch in zip(self.image, self.patch, strict=True)):
            raise UserError(
                f"an image of {self.image[0]}x{self.image[1]} pixels cannot be cut into patches of "
                f"{self.patch[0]}x{self.patch[1]}: choose sides that are multiples of the patch's"
            )
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} cannot be split over {self.num_heads} heads: "
                "choose a multiple of num_heads"
            )
        if not 0 <= self.drop_path_rate < 1:
            raise UserError(f"drop_path_rate must lie in [0, 1), not {self.drop_path_rate}")
        if not (isfinite(self.mlp_ratio) and self.hidden_dim >= 1):
            raise UserError(f"mlp_ratio must give at least one hidden unit, not {self.mlp_ratio}")
        if self.attention not in ("gpsa", "psa"):
            raise UserError(f"attention must be gpsa or psa, not {self.attention!r}")
        if not isfinite(self.locality_strength):
            raise UserError(f"locality_strength must be finite, not {self.locality_strength}")

    @property
    def image(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return as_pair(self.img_size)

    @property
    def patch(self) -> tuple[int, int]:
        """(height, width) of a patch in pixels."""
        return as_pair(self.patch_size)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, cols) of patches."""
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def num_patches(self) -> int:
        """N = rows * cols."""
        return self.grid[0] * self.grid[1]

    @property
    def hidden_dim(self) -> int:
        """Width of the MLP's hidden layer."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def has_cls_token(self) -> bool:
        """Whether the class token ever joins the patch tokens."""
        return self.local_up_to_layer < self.depth

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The inverse of to_dict. Raises UserError on an unknown field."""
        return from_fields(cls, values)


def from_fields(cls: type, values: dict[str, Any]) -> Any:
    """A configuration of the class cls. Raises UserError on an unknown field."""
    known = {field.name for field in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise UserError(unknown_name("model setting", unknown[0], sorted(known)))
    return cls(**values)


def is_count(value: object, least: int = 0) -> bool:
    """Whether value is an integer, no bool, and at least `least`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether value is a finite number, no bool."""
    is_real = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_real and abs(value) <= float_info.max


def _variants():
    published = {
        name: ConViTConfig(224, 16, 3, 1000, heads * width, num_heads=heads, drop_path_rate=0.1)
        for name, heads, width in (
            ("convit_tiny", 4, 48),
            ("convit_tiny_plus", 4, 64),
            ("convit_small", 9, 48),
            ("convit_small_plus", 9, 64),
            ("convit_base", 16, 48),
            ("convit_base_plus", 16, 64),
        )
    }
    small = {
        "convit_micro32": ConViTConfig(embed_dim=48, depth=4, local_up_to_layer=3),
        "convit_mini32": ConViTConfig(embed_dim=72, depth=5, num_heads=9, local_up_to_layer=4),
        "convit_tiny32": ConViTConfig(),
        "convit_deep32": ConViTConfig(embed_dim=48),
        "convit_micro64": ConViTConfig(64, 8, embed_dim=48, depth=4, local_up_to_layer=3),
    }
    convits = published | small
    twins = {
        name.replace("convit", "vit"): replace(config, local_up_to_layer=0)
        for name, config in convits.items()
    }
    return convits | twins


VARIANTS: dict[str, ConViTConfig] = _variants()
"""Name to configuration: the six published ConViTs (224 px, 1000 classes), four sizes for 32 px
images, one for 64 px, and of each the plain ViT twin `vit_*`: same widths, same heads, no GPSA
block."""
