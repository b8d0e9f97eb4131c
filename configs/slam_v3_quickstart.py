"""Sort-of-CLEVR on 2 CPU cores.

python train.py --config=configs/slam_v3_quickstart.py --workdir=runs/quickstart
"""

from typing import Any

from slam_jax.training import default_config


def get_config() -> Any:
    config: Any = default_config("small")
    config.data.batch_size = 32
    return config
