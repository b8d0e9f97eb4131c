"""Prints how large the language models are: python -m slam_jax.language_models [--preset=seed]

Counted from the shapes of their arrays; nothing is allocated, whatever their size. "active" are the
parameters that one token meets, "embedding" the tables and the head among all, "cache" the bytes by
which a row grows with each token, "state" what it takes besides.
"""

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli

PRESET = flags.DEFINE_string(
    "preset", "seed", 'Of which size; "published" = all sizes that were published as models.'
)


def main(arguments: list[str]) -> None:
    if arguments:
        raise InputError(f"argument {arguments[0]!r}; expected --preset=NAME or nothing")
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.language_models.accounting import measure
    from slam_jax.language_models.registry import SYSTEMS, make_config

    wanted = [
        (name, preset)
        for name, system in SYSTEMS.items()
        for preset in system.presets
        if preset == PRESET.value or (PRESET.value == "published" and preset not in SIZES_OF_OURS)
    ]
    if not wanted:
        known = sorted({preset for system in SYSTEMS.values() for preset in system.presets})
        raise InputError(f"--preset is {PRESET.value!r}; expected published, {', '.join(known)}")
    print("| system | preset | parameters | active | embedding | cache, B/token | state, B |")
    print("|---|---|---|---|---|---|---|")
    for name, preset in wanted:
        print(
            f"| `{name}` | {preset} | "
            + " | ".join(f"{n:,}" for n in measure(make_config(name, preset)))
            + " |"
        )


SIZES_OF_OURS = ("seed", "tiny")

if __name__ == "__main__":
    cli.run(main)
