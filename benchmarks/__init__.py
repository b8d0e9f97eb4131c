"""Speed against what a user would run instead: `python -m benchmarks`, docs/speed.md.

Each module named in `BENCHMARKS` has `comparisons(quick, folder)`, which yields what is measured.
The other scripts here are run one by one.
"""

# In the order of the table.
ON_GPU = ("training", "decoding")
ON_CPU = (
    "standard",
    "bfloat16",
    "jamba",
    "mixtures",
    "deepseek",
    "latent_cache",
    "generating",
    "processes",
    "chunked_loss",
    "first_step",
    "input_pipeline",
)
BENCHMARKS = (*ON_GPU, *ON_CPU)
# The entry of `--device` in the figures of a machine.
DEVICE = "device"
