"""Prints the sizes of the language models: python -m slam_jax.language_models [--preset=seed]

They are counted from the shapes of the arrays; nothing is allocated. "active" are the parameters
used for one token, "embedding" the tables and the head, "cache" the bytes that a row needs for each
token, and "state" the bytes that it needs besides.
"""

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli

PRESET = flags.DEFINE_string(
    "preset", "seed", 'The preset to print; "published" = all sizes of published models.'
)


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    # Imported here, because importing JAX takes seconds and Ctrl-C must work from the start.
    from slam_jax.language_models.flops import measure
    from slam_jax.language_models.registry import SYSTEMS, make_config

    each = [(name, preset) for name, system in SYSTEMS.items() for preset in system.presets]
    own, asked = ("seed", "small", "tiny"), PRESET.value
    wanted = [p for p in each if p[1] == asked or (asked == "published" and p[1] not in own)]
    if not wanted:
        known = ", ".join(sorted({preset for _, preset in each}))
        raise InputError(f"--preset is {asked!r}; expected published, {known}")
    print("| system | preset | parameters | active | embedding | cache, B/token | state, B |")
    print("|---|---|---|---|---|---|---|")
    for name, preset in wanted:
        counts = " | ".join(f"{n:,}" for n in measure(make_config(name, preset)))
        print(f"| `{name}` | {preset} | {counts} |")


if __name__ == "__main__":
    cli.run(main)
