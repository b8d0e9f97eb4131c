"""A chat in the terminal: slam-chat --model=DIR

The answer is printed as it is generated. Ctrl-C stops the answer, Ctrl-D ends the chat, and /help
lists the commands. Where the input is no terminal, each of its lines is asked in turn.
"""

from pathlib import Path
from typing import Any

from absl import flags

from slam_jax.runtime import cli, shared_flags

shared_flags.define_model()
flags.DEFINE_string("system", "", "The system message; for SLAM v3 the text to answer from.")
flags.DEFINE_multi_string("image", [], "A picture to answer from; repeatable.")
flags.DEFINE_string("aux", None, "A .json or .csv file with numbers to answer from.")
flags.DEFINE_integer(
    "seed", 0, "The seed of the first answer; the next ones have the numbers after it.", 0
)
flags.DEFINE_integer("context", None, "Tokens of a conversation; by default at most 2,048.", 16)
shared_flags.define_sampling()

_RULES = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop")


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from slam_jax.generation import Sampling
    from slam_jax.runtime.compile_cache import enable_compile_cache
    from slam_jax.serving import Engine
    from slam_jax.serving.chat.conversation import Conversation
    from slam_jax.serving.chat.terminal import Chat
    from slam_jax.training import load

    enable_compile_cache()
    given: Any = flags.FLAGS
    sampling = Sampling(**{name: given[name].value for name in _RULES})
    loaded = load(given.model, given.step, given.base, weights=given.weights)
    with Engine(loaded, slots=1, context=given.context) as engine:
        usual = sampling.max_new_tokens or loaded.max_new_tokens
        talk = Conversation(loaded, engine.context, usual, given.system, given.seed)
        talk.show(given.image)
        chat = Chat(engine, talk, sampling, Path(given.model).resolve().name)
        if given.aux is not None:
            chat.command("aux", given.aux)
        chat.run()


if __name__ == "__main__":
    cli.run(main)
