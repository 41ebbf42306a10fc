"""Captions to text tokens: byte-pair encoding trained on captions, with BPE dropout and a padding token per position.

Section 2.2 of the paper: lowercased captions, byte-pair encoding (vocabulary 16,384), at most 256 tokens, 10 % BPE
dropout in training, and a padding token of its own for every position that holds no text. Where the paper is silent:
text is normalized by NFKC, lowercased, stripped and its runs of white space become one space; the encoding works on
UTF-8 bytes (as GPT-2's does), so every text can be encoded and there is no unknown token.
"""

from __future__ import annotations

import itertools
import json
import os
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tokenizers import Regex
from tokenizers import Tokenizer as Library
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.normalizers import NFKC, Lowercase, Replace, Strip
from tokenizers.normalizers import Sequence as NormalizerSequence
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from dalle.errors import UserError
from dalle.files import atomic_write

FORMAT = "dalle tokenizer 1"
MAX_FILE_BYTES = 64 * 2**20
BYTES = 256


class Tokenizer:
    """Byte-level BPE with ``vocab_size`` text tokens; ids from ``vocab_size`` on are the padding tokens of the
    positions.

    ``vocabulary`` lists the tokens in the order of their ids and ``merges`` the pairs of tokens in the order in which
    they are merged. A small set of captions may teach fewer tokens than ``vocab_size``: the ids in between are then
    unused, so that the padding ids depend on the model's configuration alone. ``library`` is the
    ``tokenizers.Tokenizer`` behind it.
    """

    def __init__(self, vocabulary: Sequence[str], merges: Sequence[tuple[str, str]], vocab_size: int):
        if not BYTES <= len(vocabulary) <= vocab_size:
            raise UserError(
                f"expected a vocabulary of {BYTES} (the bytes) to vocab_size={vocab_size} tokens, got {len(vocabulary)}"
            )
        self.vocab_size = vocab_size
        self._ids = {token: index for index, token in enumerate(vocabulary)}
        self._ranks = {pair: rank for rank, pair in enumerate(merges)}
        if len(self._ids) != len(vocabulary):
            raise UserError("expected a vocabulary of different tokens, got one that repeats a token")
        if missing := set(ByteLevel.alphabet()) - self._ids.keys():
            raise UserError(f"expected a vocabulary with all {BYTES} bytes, got one without {len(missing)} of them")
        if any(token not in self._ids for left, right in merges for token in (left, right, left + right)):
            raise UserError("expected merges of tokens that are in the vocabulary, got a merge of another token")
        self.library = _library(BPE(self._ids, list(merges)))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int = 16384) -> Tokenizer:
        """Learn the merges from captions, always the same from the same; a pair seen only once is not merged."""
        if vocab_size < BYTES:
            raise UserError(
                f"expected a vocabulary of at least {BYTES} tokens (the bytes), got vocab_size={vocab_size}"
            )
        library = _library(BPE())
        trainer = BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=ByteLevel.alphabet()
        )
        library.train_from_iterator(captions, trainer)
        model = json.loads(library.to_str())["model"]
        return cls(
            sorted(model["vocab"], key=model["vocab"].get), [tuple(pair) for pair in model["merges"]], vocab_size
        )

    def normalize(self, text: str) -> str:
        """The text as it is encoded and as :meth:`decode` returns it: NFKC, lowercased, white space collapsed."""
        if not isinstance(text, str):
            raise UserError(f"expected a text (str), got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"expected valid Unicode text, got {text!r}: it is not UTF-8") from error
        return self.library.normalizer.normalize_str(text)

    def encode(self, text: str, dropout: float = 0.0, generator: random.Random | None = None) -> list[int]:
        """The text's token ids, without padding.

        ``dropout`` in [0, 1) is the probability with which a possible merge is passed over at each step (BPE dropout:
        Provilkov et al. 2020); the paper trains with 0.1. ``generator`` makes it reproducible; without one it is
        seeded by the system. Raises :class:`UserError` when nothing is left of the text after normalization.
        """
        if not 0 <= dropout < 1:
            raise UserError(f"expected a BPE dropout in [0, 1), got {dropout}")
        normalized = self.normalize(text)
        if not normalized:
            raise UserError(f"expected a text with at least one character, got {text!r}")
        if dropout == 0:
            return self.library.encode(normalized).ids
        generator = generator or random.Random()
        words = self.library.pre_tokenizer.pre_tokenize_str(normalized)
        return [self._ids[token] for word, _ in words for token in self._merge(word, dropout, generator)]

    def _merge(self, word: str, dropout: float, generator: random.Random) -> list[str]:
        """Apply the merges to one word, passing over each possible one with probability ``dropout`` at every step.

        The library draws its dropout from a generator that cannot be seeded, and a resumed training must see the same
        tokens; so the loop is here. At dropout 0 it gives the library's tokens.
        """
        tokens = list(word)
        while True:
            candidates = []
            for index, pair in enumerate(itertools.pairwise(tokens)):
                rank = self._ranks.get(pair)
                if rank is not None and generator.random() >= dropout:
                    candidates.append((rank, index))
            if not candidates:
                return tokens
            _, index = min(candidates)
            tokens[index : index + 2] = [tokens[index] + tokens[index + 1]]

    def encode_batch(
        self,
        texts: Sequence[str],
        text_len: int,
        dropout: float = 0.0,
        truncate: bool = False,
        generator: random.Random | None = None,
    ) -> torch.Tensor:
        """Token ids int64 ``[len(texts), text_len]``; position i holds ``vocab_size + i`` where the text has ended.

        A text of more than ``text_len`` tokens raises :class:`UserError`, or is cut off with ``truncate`` (training
        data).
        """
        padding = range(self.vocab_size, self.vocab_size + text_len)
        rows = []
        for text in texts:
            ids = self.encode(text, dropout, generator)
            if len(ids) > text_len and not truncate:
                raise UserError(
                    f"expected a text of at most {text_len} tokens, got {len(ids)}: shorten {_excerpt(text)}"
                )
            rows.append(ids[:text_len] + list(padding[len(ids) :]))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), text_len)

    def decode(self, ids: Iterable[int] | torch.Tensor) -> str:
        """The normalized text of token ids; padding tokens are dropped."""
        text = self.library.decode([index for index in map(int, ids) if index < self.vocab_size])
        return text.removeprefix(" ")

    def to_json(self) -> str:
        """The whole tokenizer as one JSON text; :meth:`from_json` reads it."""
        vocabulary = sorted(self._ids, key=self._ids.get)
        merges = sorted(self._ranks, key=self._ranks.get)
        content = {"format": FORMAT, "vocab_size": self.vocab_size, "vocabulary": vocabulary, "merges": merges}
        return json.dumps(content, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str, source: str = "the text") -> Tokenizer:
        """Read what :meth:`to_json` wrote; ``source`` names it in the error that a damaged one raises."""
        try:
            content = json.loads(text)
            if not isinstance(content, dict) or content.get("format") != FORMAT:
                raise UserError(f"its format is not {FORMAT!r}")
            vocabulary, merges, vocab_size = content["vocabulary"], content["merges"], content["vocab_size"]
            if not isinstance(vocab_size, int) or not all(isinstance(token, str) and token for token in vocabulary):
                raise UserError("its vocabulary is not a list of tokens")
            if not all(isinstance(token, str) for left, right in merges for token in (left, right)):
                raise UserError("its merges are not pairs of tokens")
            return cls(vocabulary, [(left, right) for left, right in merges], vocab_size)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"expected a tokenizer saved by dalle in {source}, got a damaged or different file: {error}"
            ) from (error)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to one JSON file, atomically."""
        atomic_write(path, self.to_json().encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """Read a tokenizer that :meth:`save` wrote; anything else raises :class:`UserError`."""
        path = Path(path)
        try:
            with path.open("rb") as file:
                content = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UserError(f"expected a tokenizer in {path}, but it cannot be read: {error.strerror}") from error
        if len(content) > MAX_FILE_BYTES:
            raise UserError(f"expected a tokenizer of at most {MAX_FILE_BYTES} bytes in {path}, got a larger file")
        return cls.from_json(content.decode(errors="replace"), str(path))


def _library(model: BPE) -> Library:
    library = Library(model)
    library.normalizer = NormalizerSequence([NFKC(), Lowercase(), Replace(Regex(r"\s+"), " "), Strip()])
    library.pre_tokenizer = ByteLevel(add_prefix_space=True)
    library.decoder = ByteLevelDecoder()
    return library


def _excerpt(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
