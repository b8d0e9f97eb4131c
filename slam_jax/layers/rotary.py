"""Rotary position embedding, and its extensions to longer contexts."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Float64, Int

from slam_jax.errors import require, require_count
from slam_jax.layers.precision import upcast

_LARGEST = 1e12


def _require_size(field: str, value: float) -> None:
    require(0 < value <= _LARGEST, field, value, f"a number above 0, up to {_LARGEST:g}")


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN: fast pairs keep their frequency, slow pairs are slowed, with a ramp between.

    factor: the new context divided by the original one. original_length: that context in tokens.
    beta_fast, beta_slow: rotations within the original context above which a pair keeps its
      frequency, and below which it is slowed.
    mscale, mscale_all_dim: DeepSeek's two factors of the temperature, None = the paper's factor.
    Source: Peng et al. 2023, "YaRN" (arXiv 2309.00071), sections 3.2 to 3.4.
    """

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None

    def __post_init__(self):
        for field in ("factor", "beta_fast", "beta_slow"):
            _require_size(f"yarn.{field}", getattr(self, field))
        require_count("yarn.original_length", self.original_length, most=1 << 40)
        for field in ("mscale", "mscale_all_dim"):
            value = getattr(self, field)
            ok = value is None or 0 <= value <= _LARGEST
            require(ok, f"yarn.{field}", value, f"None, or 0 to {_LARGEST:g}")

    def magnitude(self, mscale: float = 1.0) -> float:
        """0.1 mscale ln(factor) + 1, the factor of queries and keys at the longer context."""
        return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0


@dataclasses.dataclass(frozen=True)
class Llama3:
    """The extension of Llama 3.1: slow pairs are slowed by `factor`, with a ramp between.

    low_freq_factor, high_freq_factor: rotations within the original context up to which a pair is
      slowed whole, and from which it keeps its frequency. original_length: that context in tokens.
    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models" (arXiv 2407.21783), and its code.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int

    def __post_init__(self):
        for field in ("factor", "low_freq_factor", "high_freq_factor"):
            _require_size(f"llama3.{field}", getattr(self, field))
        low, high = self.low_freq_factor, self.high_freq_factor
        require(low < high, "llama3.high_freq_factor", high, f"above low_freq_factor={low:g}")
        require_count("llama3.original_length", self.original_length, most=1 << 40)

    def extended(self, frequency: Float64[np.ndarray, "half"]) -> Float64[np.ndarray, "half"]:
        turns = self.original_length * frequency / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0, 1)
        return frequency * kept + frequency / self.factor * (1 - kept)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE: each pair is slowed by a factor of its own.

    factors: of all pairs. magnitude: of queries and keys.
    Source: Ding et al. 2024, "LongRoPE" (arXiv 2402.13753), section 3.
    """

    factors: tuple[float, ...]
    magnitude: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "factors", tuple(self.factors))
        for factor in self.factors:
            _require_size("longrope.factors", factor)
        _require_size("longrope.magnitude", self.magnitude)


@dataclasses.dataclass(frozen=True)
class Rope:
    """The frequencies of rotary position embeddings.

    base: pair i of H/2 is rotated by base^(-2i/H) radians per position.
    interleaved: pairs are (x[2i], x[2i+1]), as in RoFormer and DeepSeek; else (x[i], x[i + H/2]),
      as in GPT-NeoX and Llama.
    ntk_alpha: the base is multiplied by alpha^(H / (H - 2)), as in Hunyuan.
    linear_factor: all pairs are slowed by it (Chen et al. 2023, "Extending Context Window of Large
      Language Models via Position Interpolation", section 2.3).
    yarn, llama3, longrope: extensions to a longer context, None = none. At most one of them.
    """

    base: float = 10_000.0
    interleaved: bool = False
    ntk_alpha: float = 1.0
    yarn: Yarn | None = None
    linear_factor: float = 1.0
    llama3: Llama3 | None = None
    longrope: LongRope | None = None

    def __post_init__(self):
        require(1 < self.base <= _LARGEST, "rope.base", self.base, f"above 1, up to {_LARGEST:g}")
        _require_size("rope.ntk_alpha", self.ntk_alpha)
        _require_size("rope.linear_factor", self.linear_factor)
        given = [n for n in ("yarn", "llama3", "longrope") if getattr(self, n) is not None]
        require(len(given) < 2, "rope", " and ".join(given), "at most one extension")

    def frequencies(self, width: int) -> Float32[np.ndarray, "half"]:
        """Radians per position of each pair of `width` features."""
        base = self.base * self.ntk_alpha ** (width / (width - 2)) if width > 2 else self.base
        pairs = np.arange(width // 2)
        frequency = base ** (-2.0 * pairs / width) / self.linear_factor
        if self.llama3 is not None:
            frequency = self.llama3.extended(frequency)
        if self.longrope is not None:
            count = len(self.longrope.factors)
            expected = f"{width // 2}, as a head has so many pairs"
            require(count == width // 2, "the number of longrope.factors", count, expected)
            frequency = frequency / np.array(self.longrope.factors)
        if self.yarn is not None:
            yarn = self.yarn

            def pair_of(turns: float) -> float:
                """The (fractional) pair that makes `turns` rotations in the original context."""
                wavelength = yarn.original_length / (turns * 2 * math.pi)
                return width * math.log(wavelength) / (2 * math.log(base))

            low = max(math.floor(pair_of(yarn.beta_fast)), 0)
            high = min(math.ceil(pair_of(yarn.beta_slow)), width - 1)
            slowed = np.clip((pairs - low) / max(high - low, 1e-3), 0, 1)
            frequency = frequency * (1 - slowed) + frequency / yarn.factor * slowed
        return frequency.astype(np.float32)

    @property
    def magnitude(self) -> float:
        """The factor of the rotated features of queries and keys."""
        if self.longrope is not None:
            return self.longrope.magnitude
        if self.yarn is None:
            return 1.0
        # A scale of 0 counts as absent, as in DeepSeek's code.
        if not self.yarn.mscale or not self.yarn.mscale_all_dim:
            return self.yarn.magnitude()
        return self.yarn.magnitude(self.yarn.mscale) / self.yarn.magnitude(self.yarn.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """DeepSeek's factor m^2 of all scores, from rotated and other features."""
        if self.yarn is None or not self.yarn.mscale_all_dim:
            return 1.0
        return self.yarn.magnitude(self.yarn.mscale_all_dim) ** 2


def rotary(
    x: Float[Array, "*B T N H"], positions: Int[Array, "*#B T"], rope: Rope | None = None
) -> Float[Array, "*B T N H"]:
    """Rotates each pair of features by its frequency times the position.

    Angles are float32 or wider and the result has the dtype of `x`. H must be even.
    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    """
    rope = rope or Rope()
    frequencies = jax.lax.broadcast_to_rank(rope.frequencies(x.shape[-1]), x.ndim)
    positions = jax.lax.broadcast_to_rank(positions, x.ndim - 2)
    angle = positions[..., None, None].astype(upcast(x.dtype)) * frequencies
    sin, cos = jnp.sin(angle) * rope.magnitude, jnp.cos(angle) * rope.magnitude
    y = x.astype(upcast(x.dtype))
    if rope.interleaved:
        pairs = y.reshape(*y.shape[:-1], -1, 2)
        a, b = pairs[..., 0], pairs[..., 1]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(y.shape)
    else:
        a, b = jnp.split(y, 2, axis=-1)
        rotated = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    return rotated.astype(x.dtype)
