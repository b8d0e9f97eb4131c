"""Sort-of-CLEVR in all views, on one accelerator.

    python train.py --config=configs/slam_v3_sort_of_clevr.py --workdir=runs/sort_of_clevr

Aims at the ceiling of the published task: bfloat16 computation with float32 parameters, an average
of the parameters, a finer image grid (5 x 5 pixels a step of the stem, 8 x 8 tokens). It has not
been run on an accelerator yet, so that no duration and no score stand here.
"""

from typing import Any

from slam_jax.data import TRAINING_VIEWS
from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("medium")
    config.model.dtype = "bfloat16"
    config.model.dropout = 0.05
    config.model.image.patch_size = 5
    config.model.image.stage_widths = (96, 192)
    config.data.batch_size = 128
    config.data.stages = (
        (0, {"aux": 1.0}),
        (1_000, {"image": 0.6, "aux": 0.2, "text": 0.2}),
        (5_000, dict.fromkeys(TRAINING_VIEWS, 1.0)),
    )
    config.loss.alignment = 0.1
    config.loss.z_loss = 1e-4
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.ema_decay = 0.999
    config.run.num_steps = 30_000
    config.run.evaluate_every = 2_500
    config.run.keep_every = 10_000
    return config
