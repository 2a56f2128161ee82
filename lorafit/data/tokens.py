"""Rendered text -> `input_ids` and `labels`, in batches, with what is wrong with the tokens counted."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Encoding, Tokenizer
from tokenizers.processors import Sequence as NoPostProcessing
from transformers import PreTrainedTokenizerBase

from lorafit.data.findings import Findings
from lorafit.data.listing import Side
from lorafit.data.rows import Place
from lorafit.data.turns import Rendered, Span

Batch = list[tuple[Side, Rendered]]
TokenIds = npt.NDArray[np.int32]

NOT_TRAINED = -100
"""Label of a token that is context only: the index torch's cross entropy ignores."""
TEXTS_PER_BATCH = 1024
CHARACTERS_PER_BATCH = 1 << 20
"""An encoded token takes some two hundred bytes, as long as its batch is looked at."""
MOST_LISTED = 8
"""Tokens of a list that is to be copied into a recipe; a tokenizer may hold thousands."""
TOKENS_AFTER_STOP = 4
"""How far before the end of an answer its stop token is looked for: templates write a newline or two after it."""


@dataclass(frozen=True)
class Limits:
    """What the tokens of a sequence are held to."""

    max_length: int
    over_length: Literal["error", "drop", "truncate"]
    stop_token_ids: frozenset[int]
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Sequence:
    """One training sequence."""

    place: Place
    input_ids: TokenIds
    labels: TokenIds


class TextTokenizer:
    """The tokenizer's own fast core, without truncation, padding and added tokens: offsets as they are."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        serialised = tokenizer.backend_tokenizer.to_str()
        self.content = serialised
        # A copy, since the caller's tokenizer must stay as it is. Byte-level post-processing would trim the offsets of
        # tokens that begin with a space, and move answers by a character.
        self._core = Tokenizer.from_str(serialised)
        self._core.no_truncation()
        self._core.no_padding()
        self._core.post_processor = NoPostProcessing([])
        self._tokenizer = tokenizer
        self._opening = opening_ids(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._added = frozenset(tokenizer.added_tokens_decoder)

    def sequences(
        self, rendered: Iterable[tuple[Side, Rendered]], limits: Limits, findings: Mapping[Side, Findings]
    ) -> Iterator[tuple[Side, Sequence]]:
        """The sequences that can be trained on, in order, each with its side.

        While one batch is encoded, which leaves Python to others, the next is read and rendered.
        """
        with ThreadPoolExecutor(1) as encoder:
            ahead: tuple[Batch, Future[list[Encoding]]] | None = None
            for batch in _batches(rendered):
                started = encoder.submit(self._encode, batch)
                if ahead:
                    yield from self._ended(*ahead, limits, findings)
                ahead = batch, started
            if ahead:
                yield from self._ended(*ahead, limits, findings)

    def prompt_ids(self, item: Rendered) -> tuple[list[int], bool]:
        """The tokens before the first answer, and whether the answer's first holds the end of the prompt, too."""
        encoding = self._core.encode(item.text, add_special_tokens=False)
        first, _ = self._answer(encoding, item.spans[0], item, Findings())
        opening = self._opening if item.needs_opening and encoding.ids[: len(self._opening)] != self._opening else []
        return opening + encoding.ids[:first], _straddles(encoding, item.spans[0])

    def _encode(self, batch: Batch) -> list[Encoding]:
        return self._core.encode_batch([item.text for _, item in batch], add_special_tokens=False)

    def _ended(
        self, batch: Batch, encoded: Future[list[Encoding]], limits: Limits, findings: Mapping[Side, Findings]
    ) -> Iterator[tuple[Side, Sequence]]:
        for (side, item), encoding in zip(batch, encoded.result(), strict=True):
            sequence = self._sequence(item, encoding, limits, findings[side])
            if sequence is not None:
                yield side, sequence

    def _sequence(self, item: Rendered, encoding: Encoding, limits: Limits, findings: Findings) -> Sequence | None:
        ids: list[int] = encoding.ids
        spans = [self._answer(encoding, span, item, findings) for span in item.spans]
        if not item.is_whole and all(first >= end for first, end in spans):
            findings.add("no_answer", item.place)
            return None
        for first, end in spans:
            self._find_missing_stop(ids[max(first, end - TOKENS_AFTER_STOP) : end], item, limits, findings)
        opening = self._opening if item.needs_opening and ids[: len(self._opening)] != self._opening else []
        # int32 arrays, since Python's integers would take eight times the memory of the tokens.
        input_ids = np.array(opening + ids, np.int32)
        labels = input_ids.copy() if item.is_whole else np.full_like(input_ids, NOT_TRAINED)
        for first, end in spans:
            answer = slice(first + len(opening), end + len(opening))
            labels[answer] = input_ids[answer]
        for span in item.left_out:
            first, end = _token_span(encoding, span, len(item.text))
            labels[first + len(opening) : end + len(opening)] = NOT_TRAINED
        if (labels == NOT_TRAINED).all():
            findings.add("no_answer", item.place)
            return None
        if len(input_ids) > 1 and input_ids[0] == input_ids[1] == self._bos:
            findings.add("double_bos", item.place)
        if len(ids) and (largest := int(input_ids.max())) >= limits.vocab_size:
            findings.add("outside_vocabulary", item.place, self._foreign(largest, limits.vocab_size))
        return _fit(Sequence(item.place, input_ids, labels), limits, findings)

    def _answer(self, encoding: Encoding, span: Span, item: Rendered, findings: Findings) -> Span:
        """Tokens of an answer. A special token of the prompt is never one, though it may hold the answer's space."""
        first, end = _token_span(encoding, span, len(item.text))
        if item.is_whole or not span[0] or not _straddles(encoding, span):
            return first, end
        if encoding.ids[first] not in self._added:
            findings.add("straddling", item.place)
            return first, end
        if not item.text[span[0] : encoding.offsets[first][1]].isspace():
            return first, end  # the answer's own, of which the prompt of generation has the same beginning
        findings.add("eaten_space", item.place, str(self._tokenizer.decode([encoding.ids[first]])))
        return first + 1, end

    def _find_missing_stop(self, end: list[int], item: Rendered, limits: Limits, findings: Findings) -> None:
        if limits.stop_token_ids.isdisjoint(end):
            stops = " or ".join(repr(self._tokenizer.decode([stop])) for stop in sorted(limits.stop_token_ids))
            stops = stops or "nothing"
            findings.add(
                "no_stop",
                item.place,
                f"the answer ends with {self._tokenizer.decode(end)!r}, generation stops on {stops}; use a template "
                "that ends answers with it, or name the token that ends them: data.stop_token",
            )

    def _foreign(self, token: int, vocab_size: int) -> str:
        added = self._tokenizer.added_tokens_decoder
        beyond = [added[id_].content for id_ in sorted(added) if id_ >= vocab_size]
        mend = "use the model's own tokenizer, or remove the token"
        if token in added:
            more = ", ..." if len(beyond) > MOST_LISTED else ""
            listed = ", ".join(json.dumps(content, ensure_ascii=False) for content in beyond[:MOST_LISTED])
            mend = f"give them rows with model.add_tokens: [{listed}{more}], or use the model's own tokenizer"
        text = self._tokenizer.decode([token])
        return f"token {text!r} has id {token}, the base model has {vocab_size} embeddings; {mend}"


def _batches(rendered: Iterable[tuple[Side, Rendered]]) -> Iterator[Batch]:
    batch: Batch = []
    characters = 0
    for side, item in rendered:
        batch.append((side, item))
        characters += len(item.text)
        if len(batch) == TEXTS_PER_BATCH or characters >= CHARACTERS_PER_BATCH:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def opening_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text by itself: BOS, or nothing."""
    full, bare = tokenizer("a")["input_ids"], tokenizer("a", add_special_tokens=False)["input_ids"]
    start = next(index for index in range(len(full)) if full[index : index + len(bare)] == bare)
    return full[:start]


def _token_span(encoding: Encoding, span: Span, length: int) -> Span:
    """Tokens of the answer: from the one that holds its first character, up to the one after its last.

    A token that also holds the end of the prompt is trained (the answer's first character is learnt nowhere else, and
    TRL's labels have it too); one that also holds what follows the answer is not.
    """
    start, end = span
    return _token_at(encoding, start, length), _token_at(encoding, end, length)


def _token_at(encoding: Encoding, character: int, length: int) -> int:
    """The token that holds the character, or the next one that is held by any: tokenizers may drop white space."""
    while character < length:
        token = encoding.char_to_token(character)
        if token is not None:
            return token
        character += 1
    return len(encoding)


def _straddles(encoding: Encoding, span: Span) -> bool:
    token = encoding.char_to_token(span[0])
    held = None if token is None else encoding.token_to_chars(token)
    return held is not None and held[0] < span[0]


def _fit(sequence: Sequence, limits: Limits, findings: Findings) -> Sequence | None:
    """The sequence within `max_length`, as the recipe wants it; None when it is left out."""
    length, longest = len(sequence.input_ids), limits.max_length
    if length <= longest:
        return sequence
    message = f"{length:,} tokens"
    if limits.over_length == "error":
        findings.add("over_length", sequence.place, f"{message}, training.max_length is {longest:,}")
        return sequence
    if limits.over_length == "drop":
        findings.add("over_length_dropped", sequence.place, message)
        return None
    kept, cut = sequence.labels[:longest], sequence.labels[longest:]
    if (kept == NOT_TRAINED).all():
        findings.add("answer_cut_off", sequence.place, message)
        return None
    if (cut != NOT_TRAINED).any():
        findings.add("answer_cut", sequence.place, message)
    return Sequence(sequence.place, sequence.input_ids[:longest], kept)
