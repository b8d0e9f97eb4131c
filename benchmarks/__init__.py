"""How fast this is beside what a user would run instead: `python -m benchmarks`, docs/speed.md.

Each file named in `BENCHMARKS` has `comparisons(quick, folder)`, which yields what is to be
measured; the other scripts here are run one by one.
"""

# In the order of the table; of a GPU first.
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
