"""Sort-of-CLEVR in all views, on an accelerator.

Command:   python train.py --config=configs/slam_v3_sort_of_clevr.py --workdir=runs/sort_of_clevr
Hardware:  one accelerator.
Duration and score: it has not been run on an accelerator. On 2 CPU cores with
           --config.model.dtype=float32 --config.data.batch_size=16 --config.run.num_steps=8000
           it took 41 minutes and reached, in percent on non-relational / relational questions of
           the test scenes (`python eval.py --workdir=runs/sort_of_clevr`): image 99.8 / 93.9,
           aux 99.9 / 96.3, text 100.0 / 94.8, image_text 100.0 / 94.4,
           split_image_text 100.0 / 94.4, split_image_aux 99.9 / 95.7.

It is the quickstart with a wider model, larger batches, bfloat16 computation on float32 parameters,
and averaged parameters.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.embed_dim = 128
    config.model.mlp_dim = 344
    config.model.kv_lora_rank = 64
    config.model.image.patch_size = 2
    config.model.image.stage_widths = (16, 32, 64, 128)
    config.data.batch_size = 64
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
    config.optimizer.warmup_steps = 100
    config.optimizer.ema_decay = 0.999
    config.run.num_steps = 10_000
    config.run.evaluate_every = 2_000
    config.run.keep_every = 5_000
    return config
