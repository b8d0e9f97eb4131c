"""The contribution of each part of SLAM v3, on Sort-of-CLEVR.

Command:   python -m slam_jax.rocket --protocol=ablation \
               --config=configs/ablations/sort_of_clevr.py --workdir=runs/ablations --jobs=2
Hardware:  2 CPU cores; a run takes minutes.
Score:     84.4% of all questions with four processes, 84.4 to 85.2% with one or two;
           docs/ablations.md has all results.

Fourteen models with three seeds each are trained alike: first on vectors, then on scenes of which
three objects are in a text and three in vectors, so that two streams have to be combined. There are
no images; `--config.base.data.stages=..` measures any other mix.

Where there are one or two processes, their MLPs are wider, so that the model has the parameters or
the forward operations of four (tests/test_ablation.py checks both within 1%). `one_process_deep`
has the four layers one after the other.
"""

from typing import Any

from slam_jax.training import default_config

VARIANTS: dict[str, dict[str, Any]] = {
    "four_processes": {},
    "two_processes_same_parameters": {"model.num_processes": 2, "model.process_mlp_dim": 405},
    "two_processes_same_flops": {"model.num_processes": 2, "model.process_mlp_dim": 430},
    "one_process_same_parameters": {"model.num_processes": 1, "model.process_mlp_dim": 960},
    "one_process_same_flops": {"model.num_processes": 1, "model.process_mlp_dim": 1_030},
    "one_process_deep": {"model.num_processes": 1, "model.num_process_layers": 4},
    "isolated_only": {"model.without": ["shared"]},
    "shared_only": {"model.without": ["isolated"]},
    "without_residual": {"model.without": ["residual"]},
    "without_mean": {"model.without": ["mean"]},
    "without_concat": {"model.without": ["concat"]},
    "without_cross_modal": {"model.without": ["cross_modal"]},
    "without_fusion_mlp": {"model.without": ["fusion_mlp"]},
    "plain_attention": {"model.without": ["latent"]},
}


def get_config() -> dict[str, Any]:
    config: Any = default_config("small")
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.kv_lora_rank = 32
    # As up to version 0.11; the published runs are of version 0.5.0.
    config.model.decoder_input_norm = False
    config.model.rotate_all_streams = True
    config.model.text_kernel_size = 0
    config.model.image.stage_widths = (8,)  # no view has an image
    config.data.batch_size = 16
    config.data.stages = ((0, {"aux": 1.0}), (200, {"split_text_aux": 0.8, "aux": 0.2}))
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.run.num_steps = 800
    config.run.evaluate_every = 800
    config.run.evaluate_batches = 6
    return {"base": config.to_dict(), "variants": VARIANTS, "seeds": [0, 1, 2]}
