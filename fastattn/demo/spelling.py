"""How byte-level vocabularies spell bytes: GPT-2's, and those of SmolLM2 and Whisper after it."""

from __future__ import annotations

__all__ = ["BYTES", "SPELLED"]

_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
#: The character that stands for each byte: itself where that is printable, else one from 256 upwards.
SPELLED = {byte: chr(byte) for byte in _PRINTABLE}
SPELLED.update((byte, chr(256 + n)) for n, byte in enumerate(b for b in range(256) if b not in _PRINTABLE))
#: The byte that each of these characters stands for.
BYTES = {char: byte for byte, char in SPELLED.items()}
