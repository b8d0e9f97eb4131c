"""Letters of array shapes, and aliases. A letter means the same in layers and models.

    B   batch; *B: any leading axes       D    width of the model (embed_dim)
    Q   prompts per example               F    width of an MLP (mlp_dim)
    S   encoder tokens, or keys           N    heads of queries
    T   decoder tokens, or queries        K    heads of keys and values
    M   memory tokens                     H    width of a head; H_r of rotary parts, H_v of values
    P   processes                         R    rank of a latent
    A   auxiliary vectors                 E    experts; k of them per token
    C   numbers of an auxiliary vector    V    vocabulary
    I O inputs and outputs of a linear map, or the inner channels of Mamba
    W   tokens of a window or of a convolution

Image axes are `height width 3`, or `H W 3` where pixels are all there is. What is local to one
function is written as a word, such as `rows`. In masks True = present or may be attended to.
"""

import jax
import numpy as np

AnyArray = jax.Array | np.ndarray
"""An array of JAX or of NumPy."""
