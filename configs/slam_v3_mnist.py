"""The digits of MNIST: the model reads the picture and writes the digit.

Command:   pip install tensorflow
           python train.py --config=configs/slam_v3_mnist.py --workdir=runs/mnist
Hardware:  2 CPU cores or an accelerator.
Duration and score: it has not been trained; configs/slam_v3_digits.py is similar.

TFDS downloads 12 MB and builds the data set once; only this needs TensorFlow. If the data set was
built elsewhere with file_format='array_record', its folder `mnist` can be copied into
`data.data_dir`.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.kv_lora_rank = 32
    config.model.dropout = 0.1
    config.model.image.size = 28
    config.model.image.patch_size = 2
    config.model.image.stage_widths = (32, 64)
    config.data.name = "mnist"
    config.data.batch_size = 64
    config.data.vocab_size = 300
    config.data.stages = ((0, {"image": 1.0}),)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.999
    config.run.num_steps = 10_000
    config.run.evaluate_every = 1_000
    return config
