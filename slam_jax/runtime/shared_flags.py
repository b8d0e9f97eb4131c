"""Flags that several commands have: which model, and how it samples.

A command calls the functions when it is imported, and finds the values in `flags.FLAGS`.
"""

import csv
import math

from absl import flags

flags.disclaim_key_flags()  # they belong to the command, whose --help lists them


def define_model() -> None:
    """--model, also called --workdir, and which of its checkpoints and weights to take."""
    flags.DEFINE_string(
        "model",
        None,
        "A workdir of a training run, a folder with a model, a GGUF file, or quickstart.",
        required=True,
    )
    flags.DEFINE_alias("workdir", "model")
    flags.DEFINE_string("step", None, "The checkpoint: a step, best or latest.")
    define_base()
    flags.DEFINE_enum(
        "weights",
        None,
        ["float32", "bfloat16", "int8"],
        "The dtype of kernels and tables; by default as stored.",
    )


def define_base() -> flags.FlagHolder[list[str]]:
    """--base: folders of base weights."""
    return flags.DEFINE_multi_string(
        "base", [], "Where base weights are now that a checkpoint names; repeatable."
    )


def define_sampling() -> None:
    """The fields of `Sampling`, but for num_samples."""
    flags.DEFINE_integer(
        "max_new_tokens", None, "Longest answer, in tokens; by default that of the model.", 1
    )
    flags.DEFINE_float("temperature", 0.0, "0 = always the most probable token.")
    flags.DEFINE_integer("top_k", None, "Only the k most probable tokens; 0 = all.")
    flags.DEFINE_float("top_p", None, "Only the best tokens with this probability in sum.")
    flags.DEFINE_float("min_p", None, "Only tokens this fraction as probable as the best.")
    flags.DEFINE_float("repetition_penalty", 1.0, "Divides logits of tokens seen before.")
    flags.DEFINE_multi_string("stop", [], "The answer ends before this text; repeatable.")


def define_texts(name: str, help: str) -> flags.FlagHolder[list[str] | None]:
    """A flag of texts with commas between them, as a line of CSV; spaces are kept."""
    return flags.DEFINE(_TextsParser(), name, None, help, serializer=flags.CsvListSerializer(","))


class _TextsParser(flags.ListParser):
    def parse(self, argument: str | list[str]) -> list[str]:
        super().parse(argument)  # refuses what is no line of CSV
        return next(csv.reader([argument])) if isinstance(argument, str) else argument


def define_seconds(name: str, default: float, help: str) -> flags.FlagHolder[float]:
    """A flag of a number of seconds, which must be at least 1 and finite."""
    return flags.DEFINE(_SecondsParser(), name, default, help)


class _SecondsParser(flags.FloatParser):
    syntactic_help = "a finite number of seconds, at least 1"

    def is_outside_bounds(self, val: float) -> bool:
        return not (val >= 1 and math.isfinite(val))
