"""Plans a run: python -m slam_jax.planning --config=NAME --devices=N

NAME is that of a recipe, such as 7b, or the path of a Python file. Prints how much memory the run
takes on each of N devices, what the devices send each other, and how long a step takes at the given
speeds. --search=M compiles the M most promising meshes and prints the best one. --program prints
the number of lines of the step's StableHLO. No accelerator is needed. See docs/planning.md.
"""

import os

from absl import flags

from slam_jax.runtime import cli

CONFIG = flags.DEFINE_string(
    "config",
    None,
    "The name of a recipe, such as quickstart, or the path of a Python file; it is executed.",
    required=True,
)
DEVICES = flags.DEFINE_integer("devices", 1, "Number of devices.", 1, 4_096)
SEARCH = flags.DEFINE_integer("search", 0, "Meshes to compile; 0 = config.mesh.", 0, 1_000)
PROGRAM = flags.DEFINE_bool("program", False, "Count the lines of the step's StableHLO instead.")
MEMORY = flags.DEFINE_float("device_memory_gib", 80.0, "Memory of a device in GiB.")
TFLOPS = flags.DEFINE_float("device_tflops", 989.0, "Speed of a device in 1e12 operations/s.")
LINK = flags.DEFINE_float("link_gb_s", 450.0, "From a device within its host, in 1e9 bytes/s.")
NETWORK = flags.DEFINE_float("network_gb_s", 50.0, "From a device to other hosts, in 1e9 bytes/s.")
PER_HOST = flags.DEFINE_integer("devices_per_host", 8, "Devices of one host.")


def main(arguments: list[str]) -> None:
    # XLA would warn about slow compilation and about resharding, which the plan reports. It reads
    # the variable when JAX is imported.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import jax

    jax.config.update("jax_platforms", "cpu")  # CPU devices represent those of any kind
    jax.config.update("jax_num_cpu_devices", DEVICES.value)
    from slam_jax.planning.compiled import program_lines
    from slam_jax.planning.machine import Machine
    from slam_jax.planning.meshes import search
    from slam_jax.planning.plans import plan
    from slam_jax.planning.report import describe, describe_search
    from slam_jax.planning.subjects import subject_of
    from slam_jax.training import override, read_config
    from slam_jax.training.mesh import make_mesh

    machine = Machine(MEMORY.value, TFLOPS.value, LINK.value, NETWORK.value, PER_HOST.value)
    config = override(read_config(CONFIG.value), arguments)
    if PROGRAM.value:
        subject = subject_of(config)
        mesh = make_mesh(subject.mesh, subject.num_processes)
        print(f"{program_lines(subject, mesh):,} lines of StableHLO")
    elif SEARCH.value:
        print(describe_search(search(subject_of(config), machine, SEARCH.value)))
    else:
        print(describe(plan(config, machine)))


if __name__ == "__main__":
    cli.run(main)
