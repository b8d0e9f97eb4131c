"""Captions of COCO pictures: 82,783 pictures for training, with five captions each.

Command:   pip install tensorflow
           python train.py --config=configs/slam_v3_coco_captions.py --workdir=runs/coco_captions
Hardware:  an accelerator.
Duration and score: it has not been trained.

TFDS downloads 40 GB and builds the data set once; only this needs TensorFlow. If the data set was
built elsewhere with file_format='array_record', its folder `coco_captions` can be copied into
`data.data_dir`. A model of medium width reads 224 pixels in patches of 16.

The accuracy counts captions that equal the drawn one word for word, which hardly happens. Follow
the loss instead, and evaluate and generate with --step=latest, not with the best step.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("medium")
    config.model.num_memory_tokens = 64
    config.model.context_length = 64
    config.model.dropout = 0.1
    config.model.image.encoder = "vit"
    config.model.image.size = 224
    config.model.image.patch_size = 16
    config.model.image.num_layers = 8
    config.data.name = "coco_captions"
    config.data.batch_size = 128
    config.data.vocab_size = 8_192
    config.data.stages = ((0, {"image": 1.0}),)
    config.loss.z_loss = 1e-4
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.9998
    config.run.num_steps = 60_000
    config.run.evaluate_every = 5_000
    config.run.evaluate_batches = 8
    return config
