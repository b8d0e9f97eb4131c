"""Exports a model, to run with jax and numpy alone.

    python -m slam_jax.interop.export --model=WORKDIR OUT [--platforms=cpu,cuda,tpu]

The model is a workdir, a folder, a GGUF file of a language model, or quickstart. OUT is a new
folder with the functions of the model as StableHLO (encode, prefill for some lengths of prompts,
decode_step), its weights, its tokenizer and run.py, which loads and calls them.
"""

from typing import Any

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags

shared_flags.define_model()
flags.DEFINE_list("platforms", ["cpu", "cuda"], "Some of cpu, cuda, rocm and tpu.")
flags.DEFINE_integer("batch", 1, "Rows of every call.")
flags.DEFINE_integer(
    "max_length", None, "Tokens of a row, prompt and answer; by default the context, at most 1024."
)
flags.DEFINE_list(
    "prompt_lengths", None, "A prompt is padded to the next of these; by default 16, 32, .."
)
flags.DEFINE_list("inputs", ["text", "image", "aux"], "What a SLAM v3 may be asked about.")
flags.DEFINE_integer("text_length", 128, "Tokens of a text to answer from, at most.")


def main(arguments: list[str]) -> None:
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from pathlib import Path

    from slam_jax.interop.export.folder import export_model
    from slam_jax.training import load

    if len(arguments) != 1:
        raise InputError("give one folder to write; --help shows what may be given")
    [out], given = arguments, flags.FLAGS
    lengths: Any = given.prompt_lengths
    if lengths is not None:
        if not all(each.isdecimal() for each in lengths):
            raise InputError("--prompt_lengths: expected whole numbers, separated by commas")
        lengths = list(map(int, lengths))
    if Path(out).exists():  # also checked later, but loading takes a while
        raise InputError(f"{out}: it exists already; give the name of a new folder")
    loaded = load(given.model, given.step, given.base, weights=given.weights)
    manifest = export_model(
        loaded,
        out,
        platforms=given.platforms,
        batch=given.batch,
        max_length=given.max_length,
        prompt_lengths=lengths,
        inputs=given.inputs,
        text_length=given.text_length,
    )
    files = [Path(out) / name for name in manifest["files"]]
    size = sum(file.stat().st_size for file in files)
    print(
        f"{out}: {len(files)} files, {size / 1e6:,.1f} MB, for {', '.join(manifest['platforms'])}"
    )
    print(f'run it: python {Path(out) / "run.py"} --prompt="..."')


if __name__ == "__main__":
    cli.run(main)
