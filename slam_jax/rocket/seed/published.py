"""The leaderboard that was published for the Rocket Engine.

loss and accuracy: of the one batch that was trained on. perplexity: of the final loss.
inference_ms: of a batch, on an Apple M3. Parameters, memory and top-1 were 0 in every row: they
were never measured.
"""

_FIELDS = ("rank", "score", "initial_loss", "final_loss", "accuracy", "perplexity")
_FIELDS += ("inference_ms", "stability")
_ROWS = {
    "slam_v6": (1, 74.0, 10.1397, 1.4962, 0.9854, 4.5, 116.0, 0.2581),
    "slam_v4_champion": (2, 68.0, 9.2427, 6.3383, 0.9902, 565.8, 329.4, 0.4927),
    "slam_v5": (3, 68.0, 9.3597, 6.2865, 0.6387, 537.3, 89.4, 0.4806),
    "slam_v4": (4, 63.0, 9.3792, 6.2905, 0.5664, 539.4, 66.7, 0.4744),
    "moe": (5, 63.0, 9.3828, 6.4015, 0.5322, 602.8, 98.5, 0.4789),
    "standard": (6, 58.0, 9.3833, 6.9468, 0.2578, 1039.8, 39.2, 0.5209),
    "jamba": (7, 53.0, 9.3464, 6.8990, 0.3574, 991.3, 117.9, 0.5905),
    "deepseek_v2": (8, 32.0, 9.3558, 8.2834, 0.0029, 3957.6, 198.6, 0.6682),
    "hunyuan_large": (9, 32.0, 9.4195, 7.6015, 0.0166, 2001.1, 230.4, 0.6241),
}
PUBLISHED = {name: dict(zip(_FIELDS, row, strict=True)) for name, row in _ROWS.items()}
TARGETS = {"score_above": 80.0, "inference_ms_below": 20.0}
