"""A SLAM v3 with seven billion parameters, for planning.

Command:   python -m slam_jax.planning --config=configs/slam_v3_7b.py --devices=256 \
               --device_memory_gib=80
Hardware:  a CPU; the plan is for 256 accelerators of 80 GiB. Plans for 8 and 32 work too.
Duration and score: it has not been trained. docs/plans.md shows the plan.

The model is 2,048 wide, with four processes of 16 layers, a ViT of 24 layers and a decoder of 32
layers, computed in bfloat16 on float32 parameters. It reads image and text of Sort-of-CLEVR, so the
command works as it is; change `data` and `model.image` for your own data.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("base")
    config.model.embed_dim = 2_048
    config.model.num_heads = 16
    config.model.mlp_dim = 5_632
    config.model.num_process_layers = 16
    config.model.num_decoder_layers = 32
    config.model.num_memory_tokens = 128
    config.model.kv_lora_rank = 512
    config.model.q_lora_rank = 1_024
    config.model.aux_dim = 10
    config.model.remat = "layers"
    config.model.image.size = 75
    config.model.image.patch_size = 15
    config.model.image.num_layers = 24
    config.data.batch_size = 1_024
    config.data.stages = ((0, {"image_text": 1.0}),)
    config.optimizer.learning_rate = 2e-4
    config.optimizer.warmup_steps = 2_000
    config.optimizer.weight_decay = 0.1
    config.run.num_steps = 100_000
    config.run.evaluate_every = 5_000
    # 8 devices divide the weights; four times as many also divide the processes, then the batch.
    config.mesh.fsdp = 8
    return config
