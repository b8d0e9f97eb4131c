"""Sort-of-CLEVR in minutes.

Command:   python train.py --config=configs/slam_v3_quickstart.py --workdir=runs/quickstart
Hardware:  2 CPU cores.
Duration:  21 minutes, with set-up, generation of the data, validation and test.
Score:     test accuracy in percent on non-relational / relational questions
           (`python eval.py --workdir=runs/quickstart`), the median of three seeds: image
           99.6 / 88.4, aux 99.6 / 96.7, text 100.0 / 95.9, image_text 100.0 / 95.9,
           split_image_text 99.9 / 93.7, split_image_aux 99.7 / 93.5. Relational questions about
           images range from 79.8 to 91.4.

Short inputs come first. From vectors of six objects the decoder learns what the questions mean.
Then come texts, whose words must be bound to each other; then images, which take longest; and at
last all views, with scenes that are split between two streams.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.mlp_dim = 192
    config.model.image.patch_size = 2
    config.model.image.stage_widths = (16, 32, 64, 96)
    config.data.batch_size = 16
    config.data.stages = (
        (0, {"aux": 1.0}),
        (400, {"text": 0.7, "aux": 0.3}),
        (1_000, {"image": 0.65, "text": 0.15, "aux": 0.2}),
        (
            3_000,
            {
                "image": 0.3,
                "text": 0.15,
                "aux": 0.1,
                "image_text": 0.1,
                "split_image_text": 0.2,
                "split_image_aux": 0.15,
            },
        ),
    )
    config.loss.alignment = 0.1
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.run.num_steps = 7_000
    config.run.evaluate_every = 3_500
    config.run.evaluate_batches = 12
    return config
