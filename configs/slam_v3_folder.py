"""Your own data: a table of questions and answers, with pictures.

Command:   python train.py --config=configs/slam_v3_folder.py --config.data.path=DIR \
               --workdir=runs/own
Hardware:  2 CPU cores.
Duration and score: depend on the data; 600 steps take minutes.

`DIR` holds one `.jsonl` or `.csv` file, or data in another format that docs/data.md lists, with its
arguments. `slam_jax/data/folder.py` describes the columns of a table, and
`python -m slam_jax.data inspect --config=configs/slam_v3_folder.py --config.data.path=DIR` shows
what was found. During training some inputs of a row are left out at random, so that the model can
answer from any mix of them; the report has the score of each mix.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.aux_slots = True
    config.model.aux_dim = 8
    config.model.dropout = 0.2
    config.model.context_length = 256
    config.model.image.size = 64
    config.model.image.patch_size = 2
    config.model.image.stage_widths = (16, 32, 64)  # 8 x 8 image tokens
    config.data.name = "folder"
    config.data.batch_size = 16
    config.data.augment = 0.3
    config.data.drop_inputs = 0.2
    config.data.vocab_size = 2_048
    config.data.max_damaged_records = 0
    config.data.stages = ((0, {"all": 1.0}),)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.optimizer.ema_decay = 0.99
    config.run.num_steps = 600
    config.run.evaluate_every = 100
    return config
