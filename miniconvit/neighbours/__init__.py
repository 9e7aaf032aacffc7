"""Papers beside ConViT, made of its pieces. Each file is one of them, as pairs of functions.

lipschitz     attention by distance, and weights of a given spectral norm (Lee et al. 2021: ViTGAN)
"""

from .lipschitz import (
    kim_attention_backward,
    kim_attention_forward,
    l2_attention_backward,
    l2_attention_forward,
    spectral_backward,
    spectral_forward,
    tied_attention_backward,
    tied_attention_forward,
)
