"""A page on this machine to ask a trained model: python -m slam_jax.demo --workdir=DIR

Prints the address of the page; Ctrl-C stops it. Only browsers on this machine can reach it, and
neither they nor the page connect to other machines. Needs `pip install 'slam_jax[demo]'`.
"""

import importlib.util
import os
import signal
import tempfile
from typing import Any

from absl import flags

from slam_jax.errors import InputError
from slam_jax.runtime import cli, shared_flags
from slam_jax.runtime.signals import SIGNALS

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "A workdir of a training run, a folder with a model, a GGUF file, or quickstart.",
    required=True,
)
STEP = flags.DEFINE_string("step", None, "The checkpoint: a step, best or latest.")
BASE = shared_flags.define_base()
PORT = flags.DEFINE_integer(
    "port", 7860, "The port of the page; 0 = any free one.", lower_bound=0, upper_bound=65535
)


def main(arguments: list[str]) -> None:
    cli.refuse(arguments)
    if importlib.util.find_spec("gradio") is None:
        raise InputError("the page needs gradio: pip install 'slam_jax[demo]'")
    for number in SIGNALS:  # so that uploaded pictures are removed however the process ends
        if signal.getsignal(number) == signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    # Imported here because importing JAX takes seconds, in which Ctrl-C must already work.
    from slam_jax.demo.serving import HOST, open_port, serve

    with (
        open_port(PORT.value) as listener,
        tempfile.TemporaryDirectory(prefix="slam_jax_demo_", ignore_cleanup_errors=True) as files,
    ):
        from slam_jax.runtime.compile_cache import enable_compile_cache
        from slam_jax.training import load

        enable_compile_cache()
        loaded = load(WORKDIR.value, STEP.value, BASE.value)
        # Gradio reads these when it is imported. Uploaded pictures go to `files`.
        os.environ |= dict(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1")
        os.environ["GRADIO_TEMP_DIR"] = files
        from slam_jax.demo.app import make_app
        from slam_jax.demo.chat import make_chat
        from slam_jax.generation import ModelAndTokenizer
        from slam_jax.serving import Engine

        make: Any = make_chat if isinstance(loaded, ModelAndTokenizer) else make_app
        app = make(loaded, Engine(loaded, slots=2))
        print(f"http://{HOST}:{listener.getsockname()[1]} (Ctrl-C stops it)", flush=True)
        serve(app, listener)


if __name__ == "__main__":
    cli.run(main)
