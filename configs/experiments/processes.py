"""Four encoder processes against one of as many operations, on Sort-of-CLEVR.

Command:   python -m slam_jax.rocket --protocol=processes \
               --config=configs/experiments/processes.py --workdir=runs/processes --jobs=2
Hardware:  2 CPU cores, about 12 minutes a run on one of them; it resumes.
Score:     docs/processes.md says what is measured, in which two rounds, and how it is decided; it
           has the results. The candidates, which are no longer in the code, were others with four
           processes; version 0.27 has the last two.
"""

from typing import Any

from slam_jax.training import default_config

# All have as many operations a training step, within 1% (tests/test_rocket_processes.py).
VARIANTS: dict[str, dict[str, Any]] = {
    "four": {},
    "one_wide": {"model.num_processes": 1, "model.process_mlp_dim": 1_196},
    "one_deep": {
        "model.num_processes": 1,
        "model.num_process_layers": 8,
        "model.process_mlp_dim": 136,
    },
}


def get_config() -> Any:
    base: Any = default_config("small")
    base.model.embed_dim = 64
    base.model.mlp_dim = 128
    base.model.kv_lora_rank = 32
    base.model.num_process_layers = 2
    base.model.num_decoder_layers = 1
    base.model.num_memory_tokens = 6
    base.model.num_bottleneck_blocks = 1
    base.model.image.patch_size = 5
    base.model.image.stage_widths = (16, 64)
    base.data.batch_size = 32
    base.data.questions = 5
    base.data.descriptions = 2
    base.data.closest_objects = 1
    base.data.stages = (
        (0, {"aux": 1.0}),
        (700, {"text": 0.75, "aux": 0.25}),
        (
            950,
            {"split_image_text": 0.4, "image_text": 0.2, "image": 0.2, "text": 0.15, "aux": 0.05},
        ),
    )
    base.optimizer.name = "muon"
    base.optimizer.learning_rate = 4e-3
    base.optimizer.momentum = 0.9
    base.optimizer.warmup_steps = 20
    base.optimizer.constant_fraction = 0.6
    base.optimizer.ema_decay = 0.99
    base.run.num_steps = 2_200
    base.run.evaluate_every = 2_200
    base.run.save_every = 200
    base.run.evaluate_batches = 4
    return {
        "base": base.to_dict(),
        "variants": VARIANTS,
        "seeds": tuple(range(8)),
        "learning_rates": (2e-3, 4e-3, 8e-3),
    }
