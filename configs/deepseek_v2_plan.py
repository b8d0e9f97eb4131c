"""DeepSeek V2 with 236 billion parameters, for planning only.

Command:   python -m slam_jax.planning --config=configs/deepseek_v2_plan.py --devices=1024
Hardware:  a CPU; the plan is for 1,024 accelerators.
Duration and score: it is not trained, as language models have no data set here. docs/plans.md
shows the plan.

The sizes are the published ones, with float32 parameters and optimizer state and bfloat16
computation. A step has 8,192 rows of 4,096 tokens (DeepSeek-AI 2024, section 3.1.2, has 9,216 rows)
in 64 parts, of which each device gets one row.
"""

from typing import Any

from ml_collections import ConfigDict

from slam_jax.training import default_config


def get_config() -> Any:
    usual: Any = default_config()
    config: Any = ConfigDict(
        {
            "language_model": "deepseek_v2",
            "preset": "v2",
            "model": {"param_dtype": "float32", "remat": "layers"},
            "batch_size": 8_192,
            "num_tokens": 4_096,
            "optimizer": usual.optimizer,
            "mesh": usual.mesh,
        }
    )
    config.optimizer.accumulate_steps = 64
    config.mesh.data = 1
    config.mesh.fsdp = -1
    config.mesh.tensor = 8
    return config
