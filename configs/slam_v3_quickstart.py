"""Sort-of-CLEVR in minutes.

Command:   python train.py --config=configs/slam_v3_quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores.
Duration:  15 to 20 minutes on one of the cores, beside other work, with the validation.
Score:     test accuracy in percent on non-relational / relational questions
           (`python eval.py --workdir=runs/quickstart`), the median of five seeds: image
           100.0 / 94.3, aux 99.5 / 95.0, text 100.0 / 95.5, image_text 100.0 / 95.9,
           split_image_text 99.9 / 94.8, split_image_aux 99.7 / 93.8.

Short inputs come first. From vectors of six objects the decoder learns what the questions mean.
Then come texts, then images, which take longest, and at last all views, with scenes that are split
between two streams. In pilot runs that began with images they were learned late or never.

Beside eight questions a scene, training asks five times for more than one word: three objects are
to be described, and for two the closest other object ("describe closest to red": "blue square at
20 44"). So the model is told where objects are, which no other answer says. The test has questions
only.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.mlp_dim = 192
    # 8 x 8 image tokens of 10 x 10 pixels: the centres of two objects are never in one.
    config.model.image.patch_size = 5
    config.model.image.stage_widths = (32, 96)
    config.data.batch_size = 32
    config.data.questions = 8
    config.data.descriptions = 3
    config.data.closest_objects = 2
    config.data.stages = (
        (0, {"aux": 1.0}),
        (300, {"text": 0.7, "aux": 0.3}),
        (480, {"image": 0.65, "text": 0.2, "aux": 0.07, "image_text": 0.08}),
        (
            980,
            {
                "image": 0.34,
                "text": 0.14,
                "aux": 0.08,
                "image_text": 0.14,
                "split_image_text": 0.16,
                "split_image_aux": 0.14,
            },
        ),
    )
    config.loss.alignment = 0.3
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.optimizer.constant_fraction = 0.6
    config.optimizer.ema_decay = 0.995
    config.run.num_steps = 1_500
    config.run.evaluate_every = 1_500
    config.run.save_every = 500
    config.run.evaluate_batches = 6
    return config
