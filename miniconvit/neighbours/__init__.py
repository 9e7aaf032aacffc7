"""Papers beside ConViT, made of its pieces. Each file is one of them, as pairs of functions.

cmt           convolutions in every part of a transformer (Guo et al. 2022: CMT)
conv          convolutions and batch normalisation, channels last, which some of them need
diversity     losses that keep patch tokens apart (Gong et al. 2021: Patch Diversification)
gan           a transformer that draws and one that judges (Lee et al. 2021: ViTGAN)
isotropic     four ways of mixing tokens (Cazenavette, Lucey 2021: the bias against biases)
lipschitz     attention by distance, and weights of a given spectral norm (Lee et al. 2021: ViTGAN)
mobile        tokens of several grids, and their weighted sum (Chen et al. 2021: mobile ViT)
"""

from .cmt import (
    cmt_attention_backward,
    cmt_attention_forward,
    cmt_backward,
    cmt_block_backward,
    cmt_block_forward,
    cmt_forward,
    irffn_backward,
    irffn_forward,
    silu_backward,
    silu_forward,
)
from .conv import (
    batchnorm_backward,
    batchnorm_forward,
    conv_backward,
    conv_forward,
    depthwise_backward,
    depthwise_forward,
)
from .diversity import (
    Taps,
    contrastive_backward,
    contrastive_forward,
    cosine_backward,
    cosine_forward,
    patch_mixing_backward,
    patch_mixing_forward,
)
from .gan import (
    consistency_backward,
    consistency_forward,
    critic_backward,
    critic_forward,
    diffaugment_backward,
    diffaugment_forward,
    generator_backward,
    generator_forward,
    logistic_backward,
    logistic_forward,
    modulated_linear_backward,
    modulated_linear_forward,
    modulated_norm_backward,
    modulated_norm_forward,
    sine_backward,
    sine_forward,
    spectral_norms_backward,
    spectral_norms_forward,
)
from .isotropic import (
    isotropic_backward,
    isotropic_forward,
    masked_loss_backward,
    masked_loss_forward,
    token_conv_backward,
    token_conv_forward,
    token_mlp_backward,
    token_mlp_forward,
)
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
from .mobile import (
    branch_backward,
    branch_forward,
    fusion_backward,
    fusion_forward,
    hardswish_backward,
    hardswish_forward,
    mobile_backward,
    mobile_forward,
    squeeze_excite_backward,
    squeeze_excite_forward,
)
