"""The paper's data filters (appendix C): which captions and shapes are not worth training on."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Each pattern is matched against a short, whole text and has no nested repetition: a hostile caption costs no time.
_TAKEN_ON = re.compile(
    r"(?:a )?(?:photo|photograph|picture|image)? ?(?:photographed|taken|made|uploaded|shot)? ?on (?:the )?(.+)"
)
_DATE_WORD = re.compile(
    r"\d{1,8}(?:st|nd|rd|th)?|of|at|am|pm|(?:mon|tues?|wed(?:nes)?|thu(?:rs)?|fri|sat(?:ur)?|sun)(?:day)?"
    r"|jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?"
)
_FILE_NAME = re.compile(r"(?:img|dsc|dscn|image|photo|picture|untitled|screenshot)?[ _-]?\d*(?:\.(?:jpe?g|png|webp))?")
_LONGEST_BOILERPLATE = 100


def _is_boilerplate(caption: str) -> bool:
    """Whether a caption only says when a picture was taken, or is a camera's file name."""
    text = " ".join(caption.lower().strip(" .!").split())
    if len(text) > _LONGEST_BOILERPLATE:
        return False
    taken_on = _TAKEN_ON.fullmatch(text)
    if taken_on:
        return all(_DATE_WORD.fullmatch(word) for word in re.split(r"[\s,./:-]+", taken_on[1]) if word)
    return _FILE_NAME.fullmatch(text) is not None


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
        if _is_boilerplate(caption):
            return f"boilerplate caption: {caption[:60]!r}"
        return None

    def shape_problem(self, height: int, width: int) -> str | None:
        """Why an image of this shape is dropped, or None."""
        if max(height, width) > self.max_aspect * min(height, width):
            return f"aspect ratio: {width} x {height} is outside 1:{self.max_aspect:g} .. {self.max_aspect:g}:1"
        return None
