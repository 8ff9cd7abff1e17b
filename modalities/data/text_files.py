"""Text as it lies on the disk: whatever program wrote it, with a byte-order mark or without."""

from __future__ import annotations

import codecs
import os
import stat
from pathlib import Path

from modalities.data.listing import printable, read_whole, say
from nepa_core.basics import UserError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),  # before UTF-16's, which it begins with
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
EIGHT_BIT = ("utf-8", "cp1252", "latin-1")
"""Encodings of a text that has no byte-order mark, and no zeros."""
_NOT_WINDOWS = (b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d")
"""Bytes that Windows-1252 has no letters for."""
_HEAD = 2**16  # bytes that tell UTF-16 and the like
LARGEST_TEXT = 2**33
"""Bytes of a text file that is read whole."""


def encoding_of(head: bytes) -> str:
    """The encoding of a text that begins like this, by Python's name.

    A byte-order mark decides. Without one it is UTF-8 where that fits, UTF-16 where every other byte is zero, else see
    `EightBit`.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    if 2 * head[1::2].count(0) > len(head) // 2:
        return "utf-16-le"
    if 2 * head[::2].count(0) > len(head) // 2:
        return "utf-16-be"
    found = EightBit()
    found.add(head)
    return found.encoding


class EightBit:
    """Which of UTF-8, Windows-1252 and Latin-1 a text without a byte-order mark is in, block by block.

    Bytes that are no UTF-8 behind letters that are some are damage, and the text stays UTF-8. Else it is Windows-1252,
    or Latin-1 where not even that fits.
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # a letter may be cut in two at the end of a block
        self._fits = self._windows = True
        self._letters = False  # beyond ASCII, that are UTF-8

    def add(self, block: bytes) -> None:
        """Look at one more block."""
        self._windows = self._windows and not any(byte in block for byte in _NOT_WINDOWS)
        if not self._fits:
            return
        try:
            self._letters |= not self._decoder.decode(block).isascii()
        except UnicodeDecodeError as error:
            self._fits = False
            self._letters |= not error.object[: error.start].isascii()

    def end(self) -> None:
        """There is no further block: a letter that is cut in two is none."""
        if self._fits and self._decoder.getstate()[0]:
            self._fits = False

    @property
    def encoding(self) -> str:
        """By Python's name."""
        return "utf-8" if self._fits or self._letters else "cp1252" if self._windows else "latin-1"

    @property
    def damaged(self) -> bool:
        """It is UTF-8, but for some bytes."""
        return self._letters and not self._fits


def decoded(content: bytes) -> tuple[str, str | None]:
    """A whole text without its byte-order mark, and what `how_read` says of it."""
    encoding = encoding_of(content[:_HEAD])
    try:
        return content.decode("utf-8" if encoding in EIGHT_BIT else encoding).removeprefix("\ufeff"), None
    except UnicodeDecodeError:
        pass
    if encoding in EIGHT_BIT:
        found = EightBit()
        found.add(content)
        found.end()
        encoding = found.encoding
    return content.decode(encoding, "replace").removeprefix("\ufeff"), how_read(encoding, damaged=True)


def how_read(encoding: str, *, damaged: bool) -> str | None:
    """The words for a text that is no UTF-8, or damaged; None for any other."""
    if encoding in ("cp1252", "latin-1"):
        return f"no UTF-8; its text is read as {'Windows-1252' if encoding == 'cp1252' else 'Latin-1'}"
    return "bytes in it are no letters in its encoding, and are read as U+FFFD" if damaged else None


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
    """The lines of a text file, without their ends, however these are written. What is no UTF-8 is said.

    Raises:
        UserError: it can't be read.
    """
    try:
        text, how = decoded(read_whole(str(path), LARGEST_TEXT))
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path))}: {' '.join(str(error).split())}") from error
    if how is not None:
        say(f"{printable(str(path))}: {how}")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
