"""Writes the model of a run as a folder to share.

    python -m slam_jax.trained --workdir=DIR --output=NEW

The folder has the weights (model.safetensors), the configuration, the tokenizer and a model card.
That of a language model has the form of its publisher, with the dtype of its parameters.
`slam_jax.load`, the demo page and `python -m slam_jax.generation --workdir` take it like a workdir.
It has no optimizer state, so training cannot resume from it.
"""

from absl import flags

from slam_jax.runtime import cli, shared_flags

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
OUTPUT = flags.DEFINE_string("output", None, "The folder to write.", required=True)
STEP = flags.DEFINE_string("step", None, "The checkpoint: a step, best or latest.")
BASE = shared_flags.define_base()
DTYPE = flags.DEFINE_enum(
    "dtype", "float16", ["float32", "bfloat16", "float16"], "Of the stored weights."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", None, ["bfloat16", "int8"], "For inference alone, instead of --dtype."
)
COMMAND = flags.DEFINE_string("command", None, "The command of the run, for the model card.")
COMMIT = flags.DEFINE_string("commit", None, "The commit that it ran on, for the model card.")


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from slam_jax.generation import ModelAndTokenizer
    from slam_jax.layers.quantization import weights_of
    from slam_jax.trained.card import make_card
    from slam_jax.trained.folder import write_folder
    from slam_jax.trained.saving import merged, save_pretrained
    from slam_jax.training import load, split_model
    from slam_jax.training.checkpoint.trees import by_name
    from slam_jax.training.loading import read_saved

    loaded = load(WORKDIR.value, STEP.value, BASE.value, weights=WEIGHTS.value)
    if isinstance(loaded, ModelAndTokenizer):
        save_pretrained(loaded, OUTPUT.value)
        print(f"{OUTPUT.value}: a language model in the form of its publisher")
        return
    saved, loaded = read_saved(WORKDIR.value, STEP.value), merged(loaded)
    weights = weights_of(loaded.model)
    dtype = DTYPE.value if weights == "float32" else None
    saved = saved._replace(config=loaded.config, weights=weights)
    card = make_card(loaded, WORKDIR.value, COMMAND.value, COMMIT.value, dtype or weights)
    _, params = split_model(loaded.model)
    write_folder(OUTPUT.value, saved, by_name(params), card, dtype=dtype)
    print(f"{OUTPUT.value}: {loaded.step:,} steps, weights in {dtype or weights}")


if __name__ == "__main__":
    cli.run(main)
