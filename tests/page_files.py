"""Makes the files that the pages name, small enough for a test: python tests/page_files.py NAME..

`needed` lists those that a text names. Each is made in the folder that is given, as the page has
it: `FOLDER`, `DIR/data.jsonl`, `runs/own`. A block of which a page says "Save this as `NAME`" is
such a file as well, and so is a picture that a block saves.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pages

ROOT = pages.ROOT
GGUF = "SLAM_JAX_GGUF"  # a real file; without it a tiny one of random weights is written


def _pictures(folder: Path) -> None:
    """Squares in two colours with their questions; a number for each."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    rows = []
    for i in range(30):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        pixels[4 + i % 7 : 22, 5 + i % 5 : 24] = (200, 40, i) if i % 2 else (40, i, 200)
        kind = ("cat", "dog")[i % 2]
        name = f"{kind}{i // 2 + 1}.jpg"
        Image.fromarray(pixels).save(folder / name)
        rows.append({"image": name, "prompt": "what is it?", "answer": f"a {kind}", "weight": i})
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _texts(folder: Path) -> None:
    folder.mkdir(parents=True)
    text = "\n\n".join((ROOT / name).read_text("utf-8") for name in ("LICENSE", "CHANGELOG.md"))
    for i, paragraph in enumerate(re.split(r"\n\s*\n|\n- ", text)[:150]):
        (folder / f"{i}.txt").write_text(" ".join(paragraph.split()), encoding="utf-8")


def _rows(file: Path) -> None:
    """Sums, as prompts and answers."""
    rows = [{"prompt": f"{i} + {i + 1} = ?", "answer": str(2 * i + 1)} for i in range(20)]
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def _language_model(folder: Path) -> None:
    from bases import write_language_model

    folder.parent.mkdir(parents=True, exist_ok=True)
    write_language_model(folder)


def _tower(folder: Path) -> None:
    folder.symlink_to(ROOT / "tests" / "goldens" / "vision" / "siglip_vision")


def _gguf(file: Path) -> None:
    if given := os.environ.get(GGUF):
        file.symlink_to(given)
        return
    import numpy as np
    from gguf_files import write_golden
    from test_hub_tokenizer import SPECIALS, TEMPLATE, byte_level

    model = json.loads(byte_level(bos=False).to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    fields = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "bos_token_id": 0}
    fields["merges"] = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    fields["token_type"] = [3 if token in SPECIALS else 1 for token in tokens]
    fields["eos_token_id"] = 1
    metadata: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in fields.items()}
    metadata |= {"tokenizer.chat_template": TEMPLATE, ".vocab_size": len(tokens)}
    metadata |= {".context_length": 2048}
    table = np.random.default_rng(0).normal(size=(len(tokens), 64)).astype(np.float32)
    write_golden(file, "llama", metadata, {"token_embd.weight": table, "output.weight": None})


def _train(workdir: Path, config: str, *changes: str) -> None:
    from slam_jax.training import override, read_config, train

    config_file = ROOT / "configs" / config
    train(override(read_config(config_file), list(changes)), workdir)


def _own_run(workdir: Path) -> None:
    """Some steps of configs/slam_v3_folder.py on DIR, with a tiny model."""
    data = workdir.parents[1] / "DIR"
    if not data.exists():
        _pictures(data)
    changes = ["--config.model.image.size=12", "--config.model.image.stage_widths=(8,)"]
    changes += [
        "--config.data.batch_size=4",
        "--config.run.num_steps=4",
        "--config.run.log_every=1",
    ]
    changes += [f"--config.data.path={data}", "--config.run.evaluate_every=2"]
    changes += [f"--config.seed={int(workdir.name != 'own')}"]
    _train(workdir, "slam_v3_folder.py", *changes)


def _language_run(workdir: Path) -> None:
    """Some steps of configs/language_model.py on TEXTS, with a tiny model."""
    data = workdir.parents[1] / "TEXTS"
    if not data.exists():
        _texts(data)
    changes = [f"--config.data.path={data}", "--config.language_model.preset=tiny"]
    changes += ["--config.data.batch_size=2", "--config.data.length=64"]
    changes += ["--config.run.num_steps=4", "--config.run.evaluate_every=2"]
    _train(workdir, "language_model.py", *changes)


def _quickstart(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(ROOT / "slam_jax" / "trained" / "quickstart")


def _export(folder: Path) -> None:
    import slam_jax
    from slam_jax.interop.export import export_model

    export_model(slam_jax.load("quickstart"), folder, platforms=["cpu"])


def _scene(file: Path) -> None:
    import numpy as np

    from slam_jax.data.sort_of_clevr import draw, make_scene

    np.save(file, draw(make_scene(9_800)[0], range(6)))


MAKERS: dict[str, Callable[[Path], None]] = {
    "DIR": _pictures,
    "TEXTS": _texts,
    "rows.jsonl": _rows,
    "FOLDER": _language_model,
    "TOWER": _tower,
    "FILE.gguf": _gguf,
    "SmolLM2-135M-Instruct.Q4_1.gguf": _gguf,
    "runs/own": _own_run,
    "runs/other": _own_run,
    "runs/language": _language_run,
    "runs/quickstart": _quickstart,
    "OUT": _export,
    "scene.npy": _scene,
}


def needed(text: str) -> list[str]:
    """The names of files in a text that can be made."""
    known = {**MAKERS, **pages.saved_blocks(), **pages.drawing_blocks()}
    return [name for name in known if re.search(rf"(?<![\w./-]){re.escape(name)}(?![\w-])", text)]


def make(name: str, folder: Path) -> Path:
    """The file or folder of this name in `folder`; it is made if it is not there."""
    path = folder / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        if name in MAKERS:
            MAKERS[name](path)
        elif name in (saved := pages.saved_blocks()):
            path.write_text(saved[name], encoding="utf-8")
        else:
            with contextlib.chdir(folder):
                exec(pages.drawing_blocks()[name], {"__name__": "page"})
    return path


if __name__ == "__main__":
    for each in sys.argv[1:]:
        make(each, Path.cwd())
