"""Answers from a shell: slam-generate --workdir=DIR --image=FILE --prompt="..."

--model is another name of --workdir. A published language model may be a folder or a GGUF file:
slam-generate --model=FILE.gguf --prompt="..." asks it through its chat template.

--text and --aux, with or without --image, are further inputs; --aux is a file of numbers: JSON
(rows, or numbers by name) or CSV (rows, with or without a line of names). The answer is printed as
it is generated; an answer that was cut says so on stderr. With --num_samples above 1 each answer is
a line, --choices scores given answers instead, and --json prints tokens, log-probabilities and how
each answer ended as well.
"""

import json
import math
import sys
from dataclasses import fields
from typing import Any

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags

shared_flags.define_model()
flags.DEFINE_string("prompt", "", "The text that the answer continues.")
flags.DEFINE_string("system", None, "The system message of a conversation.")
flags.DEFINE_boolean(
    "chat",
    None,
    "Ask through the chat template of the model; by default where it has one. --nochat: as it is.",
)
flags.DEFINE_string("text", None, "A text to answer from.")
flags.DEFINE_multi_string(
    "image", [], "A picture to answer from; repeatable where a model reads several."
)
flags.DEFINE_string("aux", None, "A .json or .csv file with numbers to answer from.")
flags.DEFINE_integer("seed", 0, "The seed of sampling.")
shared_flags.define_texts(
    "choices",
    "Answers to score, separated by commas. Spaces beside a comma belong to the answers; an answer "
    "with a comma needs double quotes around it.",
)
flags.DEFINE_boolean("json", False, "Print JSON.")
shared_flags.define_sampling()
flags.DEFINE_integer("num_samples", 1, "The number of answers.")


def main(arguments: list[str]) -> None:
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from slam_jax.data.numbers import read_numbers
    from slam_jax.generation import ModelAndTokenizer, Request, Sampling, generate, score, stream
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.training import load

    cli.refuse(arguments)
    enable_compile_cache()
    given: Any = flags.FLAGS
    sampling = Sampling(**{each.name: given[each.name].value for each in fields(Sampling)})
    aux = None if given.aux is None else read_numbers(given.aux)
    loaded = load(given.model, given.step, given.base, weights=given.weights)
    prompt, messages = given.prompt, None
    # A SLAM v3 was trained on prompts as they are, whatever its language model was.
    own = isinstance(loaded, ModelAndTokenizer) and loaded.tokenizer.chat_template is not None
    if given.chat or (given.chat is None and own):
        system = [] if given.system is None else [{"role": "system", "content": given.system}]
        prompt, messages = "", [*system, {"role": "user", "content": prompt}]
    elif given.system is not None:
        raise InputError("--system: this model has no chat template, or --nochat was given")
    [image] = given.image if len(given.image) == 1 else [given.image or None]
    request = Request(prompt, given.text, image, aux, given.seed, messages)
    if given.choices is not None:
        _print_scores(score(loaded, request, given.choices), given.json)
        return
    if given.json or sampling.num_samples > 1:
        [answer] = generate(loaded, [request], sampling)
        finishes = [sample.finish for sample in answer.samples]
        if given.json:
            print(json.dumps([each._asdict() for each in answer.samples], ensure_ascii=False))
            return
        for sample in answer.samples:
            print(sample.text)
    else:
        pieces = stream(loaded, request, sampling)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
        finishes = [pieces.finish]
    if cut := finishes.count("length"):
        which = "the answer was" if len(finishes) == 1 else f"{cut} of {len(finishes)} answers were"
        print(f"{which} cut at the limit of tokens; raise --max_new_tokens", file=sys.stderr)


def _print_scores(scores: list[Any], as_json: bool) -> None:
    scores = sorted(scores, key=lambda each: -each.logprob)
    if as_json:
        print(json.dumps([each._asdict() for each in scores], ensure_ascii=False))
        return
    total = math.fsum(math.exp(each.logprob) for each in scores)
    for each in scores:
        share = math.exp(each.logprob) / total if total else 1 / len(scores)
        print(f"{100 * share:5.1f}%  {each.logprob:8.3f}  {each.text}")


if __name__ == "__main__":
    cli.run(main)
