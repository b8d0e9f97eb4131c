"""Handwritten digits: the model reads the picture and writes the digit. No download.

Command:   pip install -e '.[digits]'
           python train.py --config=configs/slam_v3_digits.py --workdir=runs/digits
Hardware:  2 CPU cores.
Duration:  3 minutes.
Score:     99.2% of the 360 test digits (`python eval.py --workdir=runs/digits`).

The data are the 1,797 digits of scikit-learn.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.kv_lora_rank = 32
    config.model.dropout = 0.1
    config.model.image.size = 8
    config.model.image.patch_size = 1
    config.model.image.stage_widths = (32, 64)
    config.data.name = "digits"
    config.data.batch_size = 32
    config.data.vocab_size = 300
    config.data.stages = ((0, {"image": 1.0}),)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.optimizer.ema_decay = 0.995
    config.run.num_steps = 2_000
    config.run.evaluate_every = 500
    return config
