"""SLAM v3 on published parts: SmolLM2-135M writes, SigLIP-B/16 sees, what is between them learns.

Command:   hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir=parts/smollm2
           hf download google/siglip-base-patch16-224 --local-dir=parts/siglip
           python train.py --config=configs/slam_v3_pretrained.py --config.data.path=DIR \
               --workdir=runs/pretrained
Hardware:  one accelerator.
Duration and score: it has not been trained.

`DIR` holds a table of questions, answers and pictures, as for configs/slam_v3_folder.py. These two
parts are the pair that small open vision-language models use. Other folders will do:
--config.model.decoder.pretrained=FOLDER, --config.model.image.pretrained=FOLDER.
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("medium")
    config.model.embed_dim = 576
    config.model.num_heads = 9
    config.model.mlp_dim = 1_536
    config.model.num_memory_tokens = 64
    config.model.kv_lora_rank = 256
    config.model.dropout = 0.1
    config.model.context_length = 2_048
    config.model.remat = "maps"
    config.model.decoder.pretrained = "parts/smollm2"
    config.model.decoder.memory_every = 3
    config.model.image.pretrained = "parts/siglip"
    config.model.aux_slots = True
    config.data.name = "folder"
    config.data.batch_size = 32
    config.data.augment = 0.1
    config.data.drop_inputs = 0.1
    config.data.stages = ((0, {"all": 1.0}),)
    config.loss.chunk_tokens = 1_024
    config.optimizer.learning_rate = 3e-4
    config.optimizer.warmup_steps = 500
    config.optimizer.weight_decay = 0.05
    config.optimizer.ema_decay = 0.999
    config.run.num_steps = 10_000
    config.run.evaluate_every = 1_000
    return config
