"""Captions of COCO pictures: 82,783 for training, with five captions each.

    pip install tensorflow
    python train.py --config=configs/slam_v3_coco_captions.py --workdir=runs/coco_captions

TFDS downloads 40 GB and builds the data set once, for which alone TensorFlow is needed; where it
was built before with file_format='array_record', its folder `coco_captions` can be copied into
`data.data_dir`. A model of medium width reads 224 pixels in patches of 16. It wants an accelerator
and has not been trained: no duration or score stands here.

The accuracy counts captions that are word for word the one that was drawn, which hardly happens:
follow the loss, and evaluate and generate with --step=latest rather than the best.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("medium")
    config.model.num_memory_tokens = 64
    config.model.context_length = 64
    config.model.dropout = 0.1
    config.model.dtype = "bfloat16"
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
