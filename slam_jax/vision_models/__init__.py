"""Published vision towers: ViT, DINOv2, and the image halves of CLIP and SigLIP.

    tower, config = slam_jax.interop.load_vision(folder)
    states = tower(pixels)

`preprocess` makes the pixels of a picture.
"""

from slam_jax.vision_models.config import KINDS as KINDS
from slam_jax.vision_models.config import VisionConfig as VisionConfig
from slam_jax.vision_models.preprocessing import Preprocessing as Preprocessing
from slam_jax.vision_models.preprocessing import preprocess as preprocess
from slam_jax.vision_models.preprocessing import published_preprocessing as published_preprocessing
from slam_jax.vision_models.tower import VisionTower as VisionTower
