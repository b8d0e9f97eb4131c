"""Four encoder processes against one of as many operations, on Sort-of-CLEVR.

Command:   python -m slam_jax.rocket --protocol=processes \
               --config=configs/experiments/processes.py --workdir=experiments/processes --jobs=2
Hardware:  2 CPU cores, some hours; it resumes.
Score:     not run yet; docs/processes.md says what is measured and how it is decided.
"""

from typing import Any

from slam_jax.training import default_config

VARIANTS: dict[str, dict[str, Any]] = {
    "four": {},
    "one_wide": {"model.num_processes": 1, "model.process_mlp_dim": 1_156},
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
    base.model.image.patch_size = 3
    base.model.image.stage_widths = (16, 32, 64)
    base.data.batch_size = 32
    base.data.questions = 5
    base.data.stages = ((0, {"text": 1.0}), (500, {"split_image_text": 0.7, "image_text": 0.3}))
    base.optimizer.name = "muon"
    base.optimizer.learning_rate = 2e-3
    base.optimizer.momentum = 0.9
    base.optimizer.warmup_steps = 20
    base.run.num_steps = 3_000
    base.run.evaluate_every = 3_000
    base.run.evaluate_batches = 4
    return {"base": base.to_dict(), "variants": VARIANTS, "seeds": tuple(range(8))}
