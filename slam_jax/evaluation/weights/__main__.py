"""What weights of fewer bits change: the logits, and perplexity or accuracy.

    python -m slam_jax.evaluation.weights --model=WORKDIR|FOLDER|FILE.gguf --text=FILE

A language model reads the text in windows; a SLAM v3 answers the test questions of its run. The
table has the error of the logits, divided by the standard deviation of the logits with float32
weights: the largest one and the root of the mean square. Then the perplexity, or the share of
answers that greedy decoding writes exactly, and its change against float32.
"""

from typing import Any

from absl import flags

from slam_jax.errors import InputError, require_count
from slam_jax.runtime import cli

flags.DEFINE_string(
    "model", None, "A workdir, a folder with a model, or a GGUF file.", required=True
)
flags.DEFINE_string("text", None, "For a language model: a file of text in UTF-8.")
flags.DEFINE_integer("window", 256, "For a language model: tokens that are read at once.")
flags.DEFINE_integer("examples", 64, "For a SLAM v3: test examples of each view.")
_MOST_BYTES = 1 << 24


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from slam_jax.evaluation.weights.measure import (
        measure_weights,
        print_changes,
        question_batches,
        text_batches,
    )
    from slam_jax.reporting.language import is_language_model
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.runtime.files import read_limited
    from slam_jax.training import load

    given: Any = flags.FLAGS
    require_count("--window", given.window, least=2, most=1 << 16)
    require_count("--examples", given.examples, least=1, most=1 << 20)
    enable_compile_cache()
    language = is_language_model(given.model)
    if language != (given.text is not None):
        wanted = "needs --text=FILE" if language else "answers the questions of its run; no --text"
        raise InputError(f"{given.model} {wanted}")
    if language:
        loaded = load(given.model)
        model, batches = (
            loaded.model,
            text_batches(loaded, read_limited(given.text, _MOST_BYTES), given.window),
        )
    else:
        model, batches = question_batches(given.model, given.examples)
    print_changes(measure_weights(model, batches), perplexity=language)


if __name__ == "__main__":
    cli.run(main)
