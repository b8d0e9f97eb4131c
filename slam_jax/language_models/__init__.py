"""Nine language models, one file each, and SLAM v3's text stream as a tenth.

config = make_config("jamba", "tiny", vocab_size=300)
model = make_model(config, rngs=nnx.Rngs(0))
logits = model(tokens).logits
"""

from slam_jax.language_models.accounting import Size, measure
from slam_jax.language_models.base import Cache
from slam_jax.language_models.config import LanguageModelConfig
from slam_jax.language_models.deepseek_v2 import DeepseekV2, DeepseekV2Config
from slam_jax.language_models.hunyuan_large import HunyuanLarge, HunyuanLargeConfig
from slam_jax.language_models.hunyuan_v1_moe import HunyuanV1MoE, HunyuanV1MoEConfig
from slam_jax.language_models.jamba import Jamba, JambaConfig
from slam_jax.language_models.moe import MoE, MoEConfig
from slam_jax.language_models.registry import ROCKET, SYSTEMS, System, make_config, make_model
from slam_jax.language_models.slam_v3_text import SlamV3Text, SlamV3TextConfig
from slam_jax.language_models.slam_v4 import SlamV4, SlamV4Config
from slam_jax.language_models.slam_v4_champion import SlamV4Champion, SlamV4ChampionConfig
from slam_jax.language_models.slam_v5 import SlamV5, SlamV5Config
from slam_jax.language_models.slam_v6 import SlamV6, SlamV6Config
from slam_jax.language_models.standard import Standard, StandardConfig

__all__ = [
    "ROCKET",
    "SYSTEMS",
    "Cache",
    "DeepseekV2",
    "DeepseekV2Config",
    "HunyuanLarge",
    "HunyuanLargeConfig",
    "HunyuanV1MoE",
    "HunyuanV1MoEConfig",
    "Jamba",
    "JambaConfig",
    "LanguageModelConfig",
    "MoE",
    "MoEConfig",
    "Size",
    "SlamV3Text",
    "SlamV3TextConfig",
    "SlamV4",
    "SlamV4Champion",
    "SlamV4ChampionConfig",
    "SlamV4Config",
    "SlamV5",
    "SlamV5Config",
    "SlamV6",
    "SlamV6Config",
    "Standard",
    "StandardConfig",
    "System",
    "make_config",
    "make_model",
    "measure",
]
