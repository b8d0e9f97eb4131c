"""Plans a run: python -m slam_jax.planning --config=configs/NAME.py --devices=N

Prints what the run would take of each of N devices, what the devices would send each other, and
how long a step is at the stated speeds. With --search=M the mesh with the shortest step is chosen;
the M fastest by a formula are compiled. No accelerator is needed. docs/planning.md has two plans.
"""

import os

from absl import flags

from slam_jax.runtime import cli

CONFIG = flags.DEFINE_string("config", None, "A file of configs/; it is run.", required=True)
DEVICES = flags.DEFINE_integer("devices", 1, "Number of devices.", 1, 4_096)
SEARCH = flags.DEFINE_integer(
    "search", 0, "Search the best mesh; compile this many of the candidates.", 0, 1_000
)
MEMORY = flags.DEFINE_float("device_memory_gib", 80.0, "Memory of one device in GiB.")
TFLOPS = flags.DEFINE_float("device_tflops", 989.0, "Speed of one device in 1e12 operations/s.")
LINK = flags.DEFINE_float(
    "link_gb_s", 450.0, "From a device to others of its host, in 1e9 bytes/s."
)
NETWORK = flags.DEFINE_float("network_gb_s", 50.0, "From a device to other hosts, in 1e9 bytes/s.")
PER_HOST = flags.DEFINE_integer("devices_per_host", 8, "Devices of one host.")


def main(arguments: list[str]) -> None:
    # JAX reads these when it is imported. Virtual CPU devices stand for devices of any kind.
    count = f"--xla_force_host_platform_device_count={DEVICES.value}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"
    os.environ["JAX_PLATFORMS"] = "cpu"
    # XLA warns about slow compilation and about resharding, which the plan reports itself.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from slam_jax import planning
    from slam_jax.training import override, read_config

    machine = planning.Machine(
        MEMORY.value, TFLOPS.value, LINK.value, NETWORK.value, PER_HOST.value
    )
    config = override(read_config(CONFIG.value), arguments)
    if SEARCH.value:
        found = planning.search(planning.subject_of(config), machine, SEARCH.value)
        print(planning.describe_search(found))
    else:
        print(planning.describe(planning.plan(config, machine)))


if __name__ == "__main__":
    cli.run(main)
