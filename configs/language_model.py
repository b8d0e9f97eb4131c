"""A language model on text of your own: one of the registry from scratch, or a published one.

Command:   python train.py --config=configs/language_model.py --config.data.path=TEXTS \
               --workdir=runs/language
Hardware:  2 CPU cores.
Duration and score: depend on the texts.

`TEXTS` is a folder of .txt and .md files, or a table (.jsonl, .csv, .parquet) with a column `text`,
or with `prompt` and `answer`. --config.language_model.name=jamba trains another model of the
registry; --config.run.init_from=FOLDER or FILE.gguf fine-tunes a published one, and with
--config.lora.rank and .patterns its adapters alone. docs/language_models.md has all fields.
"""

from typing import Any

from slam_jax.training import default_language_config


def get_config() -> Any:
    config: Any = default_language_config()
    config.data.batch_size = 16
    config.data.length = 128
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 50
    config.run.num_steps = 1_000
    config.run.evaluate_every = 100
    return config
