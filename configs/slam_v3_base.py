"""A SLAM v3 of the width of ViT-B, as a starting point for your own data.

Command:   python train.py --config=configs/slam_v3_base.py --workdir=runs/base
Hardware:  an accelerator of 40 GB or more.
Duration and score: it has not been trained.

The model is 768 wide, with four processes of six layers, a ViT of 12 layers, 128 memory tokens and
a decoder of 12 layers. The preset is for images of 224 pixels in patches of 16. Here it reads
Sort-of-CLEVR, so the command works as it is; change `data` and `model.image` for your own data.
"""

from typing import Any

from slam_jax.data import TRAINING_VIEWS
from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("base")
    config.model.aux_dim = 10
    config.model.image.size = 75
    config.model.image.patch_size = 15
    config.data.batch_size = 64
    config.data.stages = ((0, dict.fromkeys(TRAINING_VIEWS, 1.0)),)
    config.loss.alignment = 0.1
    config.loss.z_loss = 1e-4
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.9998
    config.optimizer.accumulate_steps = 4
    config.run.num_steps = 100_000
    config.run.evaluate_every = 5_000
    config.run.keep_every = 20_000
    return config
