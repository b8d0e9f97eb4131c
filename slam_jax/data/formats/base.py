"""What a reader of a format gives: records with where they are, and pictures within files."""

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]
"""The values of a row by column. A picture is a path relative to the folder of the record's file,
a `StoredPicture`, or a list of such."""

HUB_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "file_name", "file_names"),
    "prompt": ("prompt", "question"),
    "answer": ("answer", "answers", "label", "caption", "text"),
    "text": ("text", "context"),
    "kind": ("kind",),
    "split": ("split",),
}
"""The columns of data sets of the hub that are read as each of ours; the first that is there."""

MOST_PICTURE_BYTES = 1 << 28


class StoredPicture(abc.ABC):
    """A picture within a larger file. Hashable, picklable, and small: it holds where the bytes are.

    identity: names the picture where reading all pictures to compare them would take too long.
    """

    @property
    @abc.abstractmethod
    def identity(self) -> str: ...

    @abc.abstractmethod
    def read_bytes(self) -> bytes:
        """The bytes of its file. Raises InputError or OSError where it cannot be read."""


class Located(NamedTuple):
    """A record, or why it cannot be read.

    line: of the file, from 1 on. messages: of a conversation, those before the answer, with a
    "role" and a "content".
    """

    file: Path
    line: int
    record: Record | str
    messages: tuple[dict[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class Found:
    """The data at a place, in one format.

    name: of the format, for people. path: the place, for messages. files: those that hold the
    data. read: iterates over all records; called several times. aliases: the columns that are read
    as each of ours, the first that is there. own: whether it is an own table, whose pictures may
    lie anywhere and whose columns of numbers are all inputs. compared: whether pictures are read
    to find equal ones; otherwise their `identity` decides on splits. notes: for the user.
    """

    name: str
    path: Path
    files: tuple[Path, ...]
    read: Callable[[], Iterator[Located]]
    aliases: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=lambda: HUB_NAMES)
    own: bool = False
    compared: bool = True
    notes: tuple[str, ...] = ()


def open_picture(picture: Any) -> Any:
    """What `load_image` takes: the bytes of a `StoredPicture`, anything else as it is."""
    if isinstance(picture, tuple):
        return tuple(map(open_picture, picture))
    return picture.read_bytes() if isinstance(picture, StoredPicture) else picture
