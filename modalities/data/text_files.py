"""Text as it lies on the disk: whatever program wrote it, with a byte-order mark or without."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from modalities.data.listing import printable, read_whole
from nepa_core.basics import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
LARGEST_TEXT = 2**33
"""Bytes of a text file that is read whole."""


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins like this, by Python's name.

    A byte-order mark decides. Without one it is UTF-8 where that fits, UTF-16 where every other byte is zero, else
    Windows-1252 (Latin-1 where not even that fits).
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if 2 * head[1::2].count(0) > len(head) // 2:
        return "utf-16-le"
    if 2 * head[::2].count(0) > len(head) // 2:
        return "utf-16-be"
    decoder = codecs.getincrementaldecoder("utf-8")()  # a letter may be cut in two at the end
    try:
        decoder.decode(head)
    except UnicodeDecodeError:
        try:
            head.decode("cp1252")
        except UnicodeDecodeError:
            return "latin-1"
        return "cp1252"
    return "utf-8"


def check_file(path: str, wanted: str) -> None:
    """See that there is a regular file with something in it.

    Args:
        wanted: what to name instead.

    Raises:
        UserError: there is none, it is a folder, a pipe or a device, or it is empty.
    """
    try:
        facts = os.stat(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(path)}: no such file; {wanted}") from error
    if not stat.S_ISREG(facts.st_mode):
        kind = "a folder" if stat.S_ISDIR(facts.st_mode) else "a pipe, a device or the like"
        raise UserError(f"{printable(path)}: no such file, but {kind}; {wanted}")
    if not facts.st_size:
        raise UserError(f"{printable(path)}: it is empty; {wanted}")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, without their ends, however these are written.

    Raises:
        UserError: it can't be read.
    """
    try:
        content = read_whole(str(path), LARGEST_TEXT)
        text = content.decode(encoding_of(content))
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"{printable(str(path))}: {' '.join(str(error).split())}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
