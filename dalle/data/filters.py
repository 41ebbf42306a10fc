"""The paper's data filters (appendix C): which captions and shapes are not worth training on."""

from __future__ import annotations

import re
from dataclasses import dataclass

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DAY = r"(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*"
_DATE = rf"(?:(?:{_MONTH}|{_DAY}|\d{{1,4}}(?:st|nd|rd|th)?|of|at|am|pm)[\s,./:-]*)+"
_BOILERPLATE = re.compile(
    rf"(?:(?:a\s+)?(?:photo|photograph|picture|image)?\s*(?:photographed|taken|made|uploaded|shot)?\s*on\s+(?:the\s+)?{_DATE}"
    r"|(?:img|dsc|dscn|image|photo|picture|untitled|screenshot)?[\s_-]*\d*(?:\.(?:jpe?g|png|webp))?)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Filters:
    """What is dropped. The paper gives the kinds of filter and the aspect ratio; the other thresholds are ours.

    A caption needs ``min_letters`` letters, of which the share ``min_ascii_letters`` must be A-Z: a rough test of
    English. One that only says when a picture was taken ("photographed on 12 May 2014") or is a camera's file name is
    boilerplate.
    Width over height must lie in [1 / max_aspect, max_aspect].
    """

    min_letters: int = 3
    min_ascii_letters: float = 0.8
    max_aspect: float = 2.0

    def caption_problem(self, caption: str) -> str | None:
        """Why the caption is dropped, or None."""
        letters = [character for character in caption if character.isalpha()]
        if len(letters) < self.min_letters:
            return f"caption too short: {caption[:60]!r}"
        if sum(letter.isascii() for letter in letters) < self.min_ascii_letters * len(letters):
            return f"caption not English: {caption[:60]!r}"
        if _BOILERPLATE.fullmatch(caption.strip(" .!")):
            return f"boilerplate caption: {caption[:60]!r}"
        return None

    def shape_problem(self, height: int, width: int) -> str | None:
        """Why an image of this shape is dropped, or None."""
        if max(height, width) > self.max_aspect * min(height, width):
            return f"aspect ratio: {width} x {height} is outside 1:{self.max_aspect:g} .. {self.max_aspect:g}:1"
        return None
