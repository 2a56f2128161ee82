"""What the audit finds: counted by kind, the first places of each kept.

An error stops (exit 3). A lost row is left out of training and counted against `data.max_lost_rows`. A warning is said.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from lorafit.data.rows import Place
from lorafit.errors import DataError, Problem

SHOWN_OF_A_KIND = 20
SHOWN_IN_A_WARNING = 5

Level = Literal["error", "lost", "warning"]


class Kind(NamedTuple):
    """One thing that can be found: how bad it is, what it is called in a count, and what mends it."""

    level: Level
    name: str
    mend: str


KINDS = {
    # whole files and rows that cannot be read
    "unreadable": Kind("error", "files that cannot be read", ""),
    "ambiguous": Kind("error", "rows that fit several formats or none", ""),
    "broken": Kind("error", "rows that cannot be parsed", ""),
    "wrong_type": Kind("error", "fields that are missing, null or of the wrong type", ""),
    "unknown_role": Kind("error", "messages with an unknown role", ""),
    "preference": Kind("error", "rows of preference data", ""),
    "not_text": Kind("error", "rows with what is no text", ""),
    "unobeyed": Kind("error", "rows that say what is learnt in a way that is not read", ""),
    # rows that cannot teach anything
    "no_answer": Kind("lost", "rows without an answer to train on", "remove them, or fill in the answer"),
    "refused": Kind("lost", "rows that cannot be rendered", "mend them, or use another data.template"),
    "answer_dropped": Kind(
        "lost",
        "rows of which the template drops part of an answer",
        "use a data.template that writes it, or take it out of the rows",
    ),
    "prompt_not_prefix": Kind(
        "lost",
        "rows whose prompt is rendered differently once the answer follows",
        "use a template that renders the earlier messages the same way",
    ),
    "over_length_dropped": Kind(
        "lost", "rows dropped because they are longer than training.max_length", "raise training.max_length"
    ),
    "answer_cut_off": Kind(
        "lost", "rows of which no answer is left within training.max_length", "raise training.max_length"
    ),
    # what makes training wrong
    "over_length": Kind("error", "rows longer than training.max_length", ""),
    "no_stop": Kind("error", "answers that do not end with a token generation stops on", ""),
    "double_bos": Kind("error", "rows that begin with two BOS tokens", "write it once: in the template or in the text"),
    "outside_vocabulary": Kind("error", "rows with token ids the base model has no embedding for", ""),
    # allowed, but likely unwanted
    "answer_cut": Kind("warning", "rows whose last answer is cut by training.max_length", "raise training.max_length"),
    "generation_prompt": Kind(
        "warning",
        "answers that follow another text in training than in generation",
        "use a template whose generation prompt opens the answer the same way",
    ),
    "set_after_prompt": Kind(
        "warning",
        "answers set after the prompt that generation sees, since the template renders it differently once they follow",
        "nothing to do if the template is meant to, as those that strip reasoning are",
    ),
    "no_generation_prompt": Kind(
        "warning",
        "answers that are trained with the header before them, since the template has no generation prompt",
        "use a template that writes the header under add_generation_prompt",
    ),
    "empty_thought": Kind(
        "warning",
        "answers without reasoning before which the template writes an empty thought, trained as part of them",
        "nothing to do if the model is to answer so when it may think",
    ),
    "eaten_space": Kind(
        "warning",
        "answers whose white space at the start the tokenizer drops, as part of the special token before it",
        "nothing to do, but that white space cannot be learnt with this tokenizer",
    ),
    "straddling": Kind(
        "warning",
        "answers whose first token also holds the end of the prompt",
        "end the prompt where a token ends, e.g. without a trailing space",
    ),
    "split": Kind(
        "warning",
        "rows trained as several sequences, since the template renders earlier turns differently",
        "nothing to do if the template is meant to, as those that strip reasoning are; data.train_on: last_answer "
        "trains the last answer of each alone",
    ),
    "content_dropped": Kind(
        "warning",
        "rows of which the template drops a message's text, a call or a tool",
        "use a template that renders every role and the tools",
    ),
    "empty_answer": Kind(
        "warning", "rows with an empty answer, which is not trained", "fill it in, or leave the message out"
    ),
    "empty_prompt": Kind("warning", "rows with an empty prompt or message", "fill in or remove it"),
    "unusual_order": Kind("warning", "rows whose roles come in an unusual order", "check the order of the messages"),
    "untrained_answer": Kind(
        "warning", "rows that open with an assistant's message, which is not trained", "put a user's message before it"
    ),
    "left_out": Kind(
        "warning", "answers left out of training by train: false or weight: 0", "nothing to do if that is meant"
    ),
    "unread_message_key": Kind("warning", "messages with keys nothing reads", "remove the keys"),
    "special_tokens": Kind(
        "warning", "rows with special tokens inside their text, which become control tokens", "remove them"
    ),
    "already_rendered": Kind(
        "warning",
        "text rows that end with a special token already, so that no stop token is added",
        "nothing to do if they were rendered before; as messages only their answers would be trained",
    ),
    "duplicate": Kind("warning", "rows that are duplicates of earlier ones", "remove them, or keep them on purpose"),
    "unused_columns": Kind("warning", "sources with columns that are not used", "map them with columns, or ignore"),
    "not_learnt": Kind(
        "warning",
        "sources with columns of pictures, sounds or films, which are not learnt",
        "check that the text is enough to learn from",
    ),
    "ignored_files": Kind("warning", "files of a directory that are not data", "nothing to do if that is meant"),
    "eval_in_train": Kind("warning", "eval rows that are also in train", "remove them from one side"),
    "eval_like_train": Kind(
        "warning", "eval rows that are also in train but for case and white space", "remove them from one side"
    ),
    "eval_near_train": Kind(
        "warning", "eval rows of which nearly all is also in one row of train", "remove them from one side"
    ),
}


class Found(NamedTuple):
    """One place at which something was found."""

    place: Place
    message: str


class Findings:
    """Counts of everything found, and its first places."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, list[Found]] = {}

    def add(self, kind: str, place: Place, message: str = "", *, is_repeated: bool = False) -> None:
        """Count one more; `message` says what is wrong there. One that only repeats another is not listed."""
        self.counts[kind] += 1
        kept = self.first.setdefault(kind, [])
        if len(kept) < SHOWN_OF_A_KIND and not is_repeated:
            kept.append(Found(place, message))

    def count(self, level: Level) -> int:
        """How often anything of this level was found."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].level == level)

    def problems(self, level: Level, files: Sequence[str]) -> list[Problem]:
        """One problem per place, by file and line; what is beyond the first of a kind is counted in one more."""
        listed: list[tuple[Place, Problem]] = []
        more = []
        for kind, count in self.counts.items():
            about = KINDS[kind]
            if about.level != level:
                continue
            for found in self.first[kind]:
                message = found.message or about.name
                mended = f"{message}; {about.mend}" if about.mend else message
                listed.append((found.place, Problem(where(found.place, files), mended, found.place[1])))
            if count > len(self.first[kind]):
                last = self.first[kind][-1].place[0]
                text = f"and {count - len(self.first[kind]):,} more like this ({about.name})"
                more.append(Problem(files[last], text))
        return [problem for _, problem in sorted(listed, key=lambda pair: pair[0])] + more

    def sentences(self, level: Level, files: Sequence[str]) -> tuple[str, ...]:
        """One sentence per kind: how many, what, the first places, the mend."""
        said = []
        for kind, about in KINDS.items():
            count = self.counts.get(kind, 0)
            if about.level != level or not count:
                continue
            shown = [
                f"{where(found.place, files)}{f' ({found.message})' if found.message else ''}"
                for found in self.first[kind][:SHOWN_IN_A_WARNING]
            ]
            rest = f", and {count - len(shown):,} more" if count > len(shown) else ""
            said.append(f"{about.name}: {count:,}, at {', '.join(shown)}{rest}; {about.mend}")
        return tuple(said)

    def raise_errors(self, files: Sequence[str]) -> None:
        """Raises DataError with every error found so far."""
        problems = self.problems("error", files)
        if problems:
            raise DataError(problems)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back."""
        return {kind: {"count": count, "first": self.first[kind]} for kind, count in sorted(self.counts.items())}

    @classmethod
    def from_dict(cls, facts: dict[str, Any]) -> Findings:
        """The findings that `as_dict` wrote."""
        findings = cls()
        for kind, fact in facts.items():
            findings.counts[kind] = fact["count"]
            findings.first[kind] = [Found((place[0], place[1]), message) for place, message in fact["first"]]
        return findings


def where(place: Place, files: Sequence[str]) -> str:
    """`file:line`; only the file when the whole of it is meant (line 0)."""
    file, line = place
    return f"{files[file]}:{line}" if line else files[file]


def refuse_too_many_lost(findings: Findings, *, rows: int, allowed: float, files: Sequence[str], side: str) -> None:
    """Raises DataError when a larger share of the rows than `allowed` is lost, or none is left."""
    lost = findings.count("lost")
    if rows and lost <= allowed * rows and lost < rows:
        return
    if not rows:
        raise DataError(f"no rows: the files of data.{side} hold none; check path and limit", where=f"data.{side}")
    share = (
        f"{lost:,} of {rows:,} rows ({lost / rows:.1%}) cannot be trained on, more than data.max_lost_rows "
        f"{allowed:g} allows; mend them, or raise it"
        if lost < rows
        else f"none of the {rows:,} rows can be trained on"
    )
    raise DataError([Problem(f"data.{side}", share), *_as_problems(findings.sentences("lost", files), side)])


def _as_problems(sentences: Iterable[str], side: str) -> list[Problem]:
    return [Problem(f"data.{side}", sentence) for sentence in sentences]
