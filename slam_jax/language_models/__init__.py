"""Nine language models, one file each, and SLAM v3's text stream as a tenth.

    config = make_config("jamba", "tiny", vocab_size=300)
    model = make_model(config, rngs=nnx.Rngs(0))
    logits = model(tokens).logits

`slam_jax.protocol` says what all of them can do.
"""

from slam_jax.language_models.base import Cache as Cache
from slam_jax.language_models.config import LanguageModelConfig as LanguageModelConfig
from slam_jax.language_models.deepseek_v2 import DeepseekV2 as DeepseekV2
from slam_jax.language_models.deepseek_v2 import DeepseekV2Config as DeepseekV2Config
from slam_jax.language_models.flops import Size as Size
from slam_jax.language_models.flops import measure as measure
from slam_jax.language_models.hunyuan_large import HunyuanLarge as HunyuanLarge
from slam_jax.language_models.hunyuan_large import HunyuanLargeConfig as HunyuanLargeConfig
from slam_jax.language_models.hunyuan_v1_moe import HunyuanV1MoE as HunyuanV1MoE
from slam_jax.language_models.hunyuan_v1_moe import HunyuanV1MoEConfig as HunyuanV1MoEConfig
from slam_jax.language_models.jamba import Jamba as Jamba
from slam_jax.language_models.jamba import JambaConfig as JambaConfig
from slam_jax.language_models.moe import MoE as MoE
from slam_jax.language_models.moe import MoEConfig as MoEConfig
from slam_jax.language_models.registry import ROCKET as ROCKET
from slam_jax.language_models.registry import SYSTEMS as SYSTEMS
from slam_jax.language_models.registry import System as System
from slam_jax.language_models.registry import make_config as make_config
from slam_jax.language_models.registry import make_model as make_model
from slam_jax.language_models.slam_v3_text import SlamV3Text as SlamV3Text
from slam_jax.language_models.slam_v3_text import SlamV3TextConfig as SlamV3TextConfig
from slam_jax.language_models.slam_v4 import SlamV4 as SlamV4
from slam_jax.language_models.slam_v4 import SlamV4Config as SlamV4Config
from slam_jax.language_models.slam_v4_champion import SlamV4Champion as SlamV4Champion
from slam_jax.language_models.slam_v4_champion import SlamV4ChampionConfig as SlamV4ChampionConfig
from slam_jax.language_models.slam_v5 import SlamV5 as SlamV5
from slam_jax.language_models.slam_v5 import SlamV5Config as SlamV5Config
from slam_jax.language_models.slam_v6 import SlamV6 as SlamV6
from slam_jax.language_models.slam_v6 import SlamV6Config as SlamV6Config
from slam_jax.language_models.standard import Standard as Standard
from slam_jax.language_models.standard import StandardConfig as StandardConfig
