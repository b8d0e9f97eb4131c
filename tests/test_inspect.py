"""`python -m slam_jax.data inspect`: what it prints about a data set, and its contact sheet."""

import io
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image

from slam_jax.data import DataConfig
from slam_jax.data.records import DataError
from slam_jax.reporting.contact_sheet import COLUMNS, SIDE, Tile, contact_sheet
from slam_jax.reporting.inspection import inspect_data, print_inspection
from slam_jax.slam_v3 import ImageConfig, SlamV3Config

ROOT = Path(__file__).parents[1]
MODEL = SlamV3Config(vocab_size=1, aux_dim=4, aux_slots=True, image=ImageConfig(size=24))


def report(config, model=MODEL):
    """The inspection, and its printed lines with single spaces."""
    found = inspect_data(config, model)
    file = io.StringIO()
    print_inspection(found, file)
    return found, [" ".join(line.split()) for line in file.getvalue().splitlines()]


def below(lines, title, count):
    start = next(i for i, line in enumerate(lines) if line.startswith(title))
    return lines[start + 1 : start + 1 + count]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty rows with a picture, numbers and an answer.

    Five of them cannot be used. Every third row has no height.
    """
    folder = tmp_path_factory.mktemp("own")
    rows: list[dict[str, Any]] = []
    for i in range(20):
        pixels = np.random.default_rng(i).integers(0, 256, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(
            {
                "image": f"{i}.png",
                "prompt": "[red]which one",
                "answer": "left" if i % 4 else "right",
                "split": ("validation", "test")[i - 18] if i >= 18 else "train",
                "width": 100 + i,
                "height": None if i % 3 == 0 else 2.5,
                "note": "by hand",
            }
        )
    rows[2]["answer"] = ""
    rows[4]["width"] = "wide"
    rows[6]["text"] = "it ends <eos> here"
    (folder / "8.png").write_bytes((folder / "8.png").read_bytes()[:600])  # its head is whole
    rows[10]["image"] = "lost.png"
    (folder / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_every_bad_row_of_a_folder_is_listed_with_its_reason(folder, caplog):
    config = DataConfig("folder", path=str(folder), batch_size=4, max_damaged_records=0)
    found, lines = report(config)
    assert lines[0] == str(folder / "table.jsonl")
    start = lines.index(
        "rows that cannot be used: 5 (data.max_damaged_records=0; training refuses more)"
    )
    told = lines[start + 1 :]
    assert [line.partition(":")[0] for line in told] == [f"row {i}" for i in (3, 5, 7, 9, 11)]
    assert told[0] == "row 3: answer: it is empty; give every row one"
    assert told[1] == "row 5: width: 'wide' is no finite number"
    assert told[2] == "row 7: text holds '<eos>', which is added by itself; leave it out"
    assert told[3].startswith(f"row 9: image: {folder / '8.png'} cannot be read as a picture (")
    assert told[4] == f"row 11: image: {folder / 'lost.png'}: no such file"
    assert not caplog.records, "the report says it all, once"
    assert logging.getLogger("slam_jax").isEnabledFor(logging.WARNING)
    assert len(found.tiles) == 13


def test_the_figures_of_a_folder_are_those_of_its_usable_rows(folder):
    stages = ((0, {"image": 1.0}), (30, {"all": 1.0, "image": 0.0}))
    config = DataConfig("folder", path=str(folder), batch_size=4, stages=stages)
    _, lines = report(config)
    # The one whose picture cannot be decoded is a record, and skipped where it is read.
    assert below(lines, "split records", 3) == ["train 14", "validation 1", "test 1"]
    assert lines[lines.index("views, and the shapes of a batch of 4") + 1 :][:5] == [
        "view used from step text image aux tokens",
        "image 0 - 4x24x24x3 - 4x1x8",
        "aux - - - 4x2x4, mask 4x1x8",
        "image_aux - - 4x24x24x3, mask 4x2x4, mask 4x1x8",
        "all 30 - 4x24x24x3, mask 4x2x4, mask 4x1x8",
    ]
    [title] = [line for line in lines if line.startswith("tokens, of ")]
    assert title.endswith(" in the vocabulary, in 13 training examples")
    assert below(lines, "of a min median max", 2) == ["prompt 5 5 5", "answer 1 1 1"]
    assert below(lines, "answer times share", 2) == ["left 10 76.9%", "right 3 23.1%"]
    widths = [100 + i for i in range(18) if i not in (2, 4, 6, 10)]
    assert below(lines, "column mean scale", 2) == [
        f"width {np.mean(widths):.6g} {np.std(widths):.6g}",
        "height 2.5 1",
    ]
    assert "columns that are not used: 'note' (row 1: 'by hand' is no number)" in lines


def test_a_folder_without_pictures_has_no_tiles(tmp_path):
    rows = [{"text": f"text {i}", "answer": "yes"} for i in range(9)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = DataConfig("folder", path=str(tmp_path), stages=((0, {"text": 1.0}),))
    found, lines = report(config)
    assert not found.tiles
    assert "rows that cannot be used: 0 (data.max_damaged_records=10)" in lines
    assert not any("columns" in line for line in lines)


def test_a_folder_without_any_usable_row_is_refused_in_one_line(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "answer": ""}\n')
    with pytest.raises(DataError, match="row 1: answer: it is empty; .*; no row can be used"):
        inspect_data(DataConfig("folder", path=str(tmp_path)), MODEL)


def test_digits_are_counted_and_shown():
    pytest.importorskip("sklearn")
    config = DataConfig("digits", batch_size=16, vocab_size=300)
    model = SlamV3Config(vocab_size=1, image=ImageConfig(size=8, patch_size=1))
    found, lines = report(config, model)
    assert lines[0] == "digits"
    assert below(lines, "split records", 3) == ["train 1,257", "validation 180", "test 360"]
    assert "image 0 - 16x8x8x3 - 16x1x4" in lines
    assert "tokens, of 263 in the vocabulary, in 1,257 training examples" in lines
    counted = [line.split() for line in below(lines, "answer times share", 10)]
    assert {answer for answer, _, _ in counted} == set("0123456789")
    assert sum(int(times) for _, times, _ in counted) == 1_257
    assert len(found.tiles) == 30
    assert {tile.prompt for tile in found.tiles} == {"digit"}
    assert len(contact_sheet(found.tiles, "digits").axes) == 30


def test_scenes_are_counted_and_shown_with_different_questions(tmp_path):
    config = DataConfig(
        "sort_of_clevr/tiny",
        data_dir=str(tmp_path),
        batch_size=8,
        stages=((0, {"aux": 1.0}), (9, {"split_image_text": 1.0})),
    )
    found, lines = report(config, SlamV3Config(vocab_size=1))
    assert below(lines, "split records", 3) == ["train 256", "validation 32", "test 32"]
    views = {line.split()[0]: line.split()[1:] for line in below(lines, "view used", 9)}
    length = found.dataset.train.question_length(found.dataset.tokenizer) + 2
    assert views["aux"] == ["0", "-", "-", "8x6x10", f"8x20x{length}"]
    assert views["split_image_text"][0] == "9"
    assert views["split_image_text"][2:] == ["8x75x75x3", "-", f"8x20x{length}"]
    assert [view for view, cells in views.items() if cells[0] != "-"] == ["aux", "split_image_text"]
    assert any(line.startswith("numbers of an auxiliary vector: red, green,") for line in lines)
    [circles] = [line for line in lines if line.startswith("circle ")]
    assert 1_000 < int(circles.split()[1].replace(",", "")) < 1_600  # of 5,120
    assert len({tile.prompt for tile in found.tiles}) > 10


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def texts(figure):
    return [text.get_text() for text in figure.findobj(Text)]


def test_a_contact_sheet_shows_each_picture_in_its_place_and_cuts_long_texts():
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 200, (8, 3), np.uint8)
    prompts = ["short", "a word " * 40, "W" * 200, "", "\n", "größe", "[b]", "two words"]
    tiles = [
        Tile(np.full((size, size, 3), colour, np.uint8), text, text)
        for size, colour, text in zip(
            (1, 8, 28, 31, 33, 75, 168, 500), colours, prompts, strict=True
        )
    ]
    figure = contact_sheet(tiles, "a title " * 99)
    sheet = pixels(figure)
    for i, colour in enumerate(colours):
        rows, columns = np.nonzero((sheet == colour).all(-1))
        assert len(rows) >= 0.95 * (100 * SIDE) ** 2, f"picture {i}"
        assert int(np.median(columns)) // 184 == i % COLUMNS
        assert int(np.median(rows) > sheet.shape[0] / 2) == i // COLUMNS
    assert "a word a word a word a\nword a word a word a\nword a word a word a..." in texts(figure)
    assert "größe" in texts(figure) and not any("lacks" in text for text in texts(figure))
    # The wide letters of the third prompt do not run into the next column, whose prompt is empty.
    assert (sheet[45:100, 577:740] == sheet[0, 0]).all()
    with pytest.raises(ValueError, match="no pictures"):
        contact_sheet([], "none")


def test_letters_are_drawn_as_they_are_or_named_as_missing():
    """DejaVu Sans has accents and some emoji; it has no Chinese. Dollar signs are not TeX."""
    tile = Tile(np.zeros((4, 4, 3), np.uint8), "é 😀 $5 to $10 $x^2$", "是 yes")
    figure = contact_sheet([tile], "标题")
    assert {"é 😀 $5 to $10 $x^2$", "� yes", "��"} <= set(texts(figure))
    assert "� a character that the font DejaVu Sans lacks" in texts(figure)
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if text.get_text())
    pixels(figure)  # Matplotlib would warn of a missing character


def inspect(*arguments, folder):
    command = [sys.executable, "-m", "slam_jax.data", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=240, cwd=folder, env=environment
    )


@pytest.mark.release
def test_the_command_lists_bad_rows_and_writes_the_pictures(folder, tmp_path):
    ended = inspect(
        "inspect",
        f"--config={ROOT / 'configs' / 'slam_v3_folder.py'}",
        f"--config.data.path={folder}",
        "--output=made/sheet.png",
        folder=tmp_path,
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "\n  row 3: answer: it is empty; give every row one\n" in ended.stdout
    assert ended.stdout.endswith("\n13 training pictures: made/sheet.png\n")
    with Image.open(tmp_path / "made" / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.width == 1_136


def test_rows_that_are_all_bad_are_named_with_a_reason(tmp_path):
    """Rows of two pictures each, for a model that reads one."""
    rows = []
    for i in range(30):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
        rows.append({"image": [f"{i}.png"] * 2, "prompt": "same?", "answer": "yes"})
    (tmp_path / "table.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError) as raised:
        inspect_data(DataConfig(name="folder", path=str(tmp_path)), MODEL)
    assert str(raised.value).endswith(
        "table.jsonl: no row is left for train; row 1: image: 2 pictures; the model reads at most "
        "model.image.max_images=1 (and 29 more such)"
    )


def test_another_command_is_refused_in_one_line(tmp_path):
    ended = inspect("show", "--config=a.py", folder=tmp_path)
    assert ended.returncode == 2
    assert ended.stderr == "error: the command is 'show'; expected: inspect --config=NAME\n"
