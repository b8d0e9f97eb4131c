"""Answers from a shell: python -m slam_jax.generation --workdir=DIR --image=FILE --prompt="..."

--text and --aux, beside or instead of --image, are further inputs; --aux is a file, JSON (rows of
numbers, or numbers by name) or CSV (rows of numbers, maybe under a line of names). The answer is
written as it comes; --num_samples above 1 gives as many, --choices scores given answers instead,
and --json writes tokens and log-probabilities too.
"""

import dataclasses
import json
import math

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli

WORKDIR = flags.DEFINE_string("workdir", None, "The workdir of a training run.", required=True)
STEP = flags.DEFINE_string("step", None, "A step, or best, or latest.")
PROMPT = flags.DEFINE_string("prompt", "", "What the answer continues.")
TEXT = flags.DEFINE_string("text", None, "A text to answer from.")
IMAGE = flags.DEFINE_string("image", None, "A picture to answer from.")
AUX = flags.DEFINE_string("aux", None, "A .json or .csv with numbers to answer from.")
SEED = flags.DEFINE_integer("seed", 0, "Of sampling.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 32, "Longest answer, in tokens.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.0, "0 = the most probable token each time.")
TOP_K = flags.DEFINE_integer("top_k", None, "Only the k most probable tokens.")
TOP_P = flags.DEFINE_float("top_p", None, "Only those that together have this probability.")
MIN_P = flags.DEFINE_float("min_p", None, "Only those at least this fraction of the first.")
PENALTY = flags.DEFINE_float("repetition_penalty", 1.0, "Of tokens that came before.")
NUM_SAMPLES = flags.DEFINE_integer("num_samples", 1, "Answers.")
STOP = flags.DEFINE_multi_string("stop", [], "The answer ends before it; may be given again.")
CHOICES = flags.DEFINE_list("choices", None, "Answers to be scored, with commas between them.")
JSON = flags.DEFINE_boolean("json", False, "Write JSON.")


def main(arguments: list[str]) -> None:
    # Not before: importing JAX takes seconds, in which Ctrl-C can come.
    from slam_jax.data.numbers import read_numbers
    from slam_jax.generation import Request, Sampling, generate, score, stream
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.training import load

    if arguments:
        raise InputError(f"unknown argument {arguments[0]!r}; --help shows what may be given")
    enable_compile_cache()
    sampling = Sampling(
        max_new_tokens=MAX_NEW_TOKENS.value,
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        min_p=MIN_P.value,
        repetition_penalty=PENALTY.value,
        num_samples=NUM_SAMPLES.value,
        stop=STOP.value,
    )
    aux = None if AUX.value is None else read_numbers(AUX.value)
    request = Request(PROMPT.value, TEXT.value, IMAGE.value, aux, SEED.value)
    loaded = load(WORKDIR.value, STEP.value)
    if CHOICES.value is not None:
        scores = sorted(score(loaded, request, CHOICES.value), key=lambda each: -each.logprob)
        total = math.fsum(math.exp(each.logprob) for each in scores)
        if JSON.value:
            print(json.dumps([each._asdict() for each in scores], ensure_ascii=False))
            return
        for each in scores:
            share = math.exp(each.logprob) / total if total else 1 / len(scores)
            print(f"{100 * share:5.1f}%  {each.logprob:8.3f}  {each.text}")
    elif JSON.value:
        [answer] = generate(loaded, [request], sampling)
        print(json.dumps([each._asdict() for each in answer.samples], ensure_ascii=False))
    elif sampling.num_samples > 1:
        [answer] = generate(loaded, [request], sampling)
        for sample in answer.samples:
            print(sample.text)
    else:
        for piece in stream(loaded, request, dataclasses.replace(sampling, num_samples=1)):
            print(piece, end="", flush=True)
        print()


if __name__ == "__main__":
    cli.run(main)
