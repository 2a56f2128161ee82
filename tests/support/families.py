"""Chat templates in the style of well-known model families, each with a tiny tokenizer that has its special tokens.

The templates are short ones of our own (`tests/data/chat_templates`) that keep what makes a family hard to
train: what it strips from the history, how it closes a turn, what it refuses, what its tokenizer does to white space.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lorafit.data.rows import Message
from support import ROOT
from support.sources import ids_of, prepare_problems, prepared, section, trained_texts
from support.tiny import write_jsonl

FILES = ROOT / "tests/data/chat_templates"
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Family:
    """One family: its special tokens, and what they mean to its tokenizer and to generation."""

    templates: dict[str, str]
    """Name -> file; one alone is the tokenizer's only template."""
    special: tuple[str, ...]
    eos: str
    stops: tuple[str, ...]
    """What `eos_token_id` of its generation config holds."""
    bos: str | None = None
    adds_bos: bool = False
    """Whether the tokenizer puts `bos` before a text."""
    eats_space: bool = False
    """Whether its special tokens swallow the white space after them, as Phi-3's do."""

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a byte, besides the special ones."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        vocabulary = {token: index for index, token in enumerate(("<|pad|>", *self.special, *alphabet))}
        core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        core.decoder = decoders.ByteLevel()
        added = [AddedToken(token, special=True, normalized=False, rstrip=self.eats_space) for token in self.special]
        core.add_special_tokens([AddedToken("<|pad|>", special=True, normalized=False), *added])
        if self.adds_bos:
            single = f"{self.bos} $A"
            core.post_processor = processors.TemplateProcessing(
                single=single, special_tokens=[(str(self.bos), vocabulary[str(self.bos)])]
            )
        names = {"pad_token": "<|pad|>", "eos_token": self.eos} | ({"bos_token": self.bos} if self.bos else {})
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, **names)
        texts = {name: (FILES / f"{file}.jinja").read_text(encoding="utf-8") for name, file in self.templates.items()}
        tokenizer.chat_template = texts["default"] if len(texts) == 1 else texts
        return tokenizer

    def stop_token_ids(self, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
        """The ids of `stops`."""
        return ids_of(tokenizer, *self.stops)


LLAMA3 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
)
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
GEMMA = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
MISTRAL = (
    *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
)
DEEPSEEK = (
    *("<|begin_of_sentence|>", "<|end_of_sentence|>", "<|User|>", "<|Assistant|>"),
    *("<|tool_calls|>", "<|tool_output|>", "<|tool_end|>"),
)
PHI3 = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
HARMONY = ("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>", "<|endoftext|>")
GLM4 = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")

FAMILIES = {
    "llama3": Family(
        {"default": "llama3"},
        LLAMA3,
        eos="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>",
        adds_bos=True,
    ),
    "chatml": Family({"default": "chatml"}, CHATML, eos="<|im_end|>", stops=("<|im_end|>",)),
    "qwen25": Family({"default": "qwen25"}, CHATML, eos="<|im_end|>", stops=("<|im_end|>", "<|endoftext|>")),
    "qwen3": Family({"default": "qwen3"}, CHATML, eos="<|im_end|>", stops=("<|im_end|>", "<|endoftext|>")),
    "gemma2": Family(
        {"default": "gemma2"}, GEMMA, eos="<eos>", stops=("<eos>", "<end_of_turn>"), bos="<bos>", adds_bos=True
    ),
    "gemma3": Family(
        {"default": "gemma3"}, GEMMA, eos="<eos>", stops=("<eos>", "<end_of_turn>"), bos="<bos>", adds_bos=True
    ),
    "mistral": Family({"default": "mistral"}, MISTRAL, eos="</s>", stops=("</s>",), bos="<s>", adds_bos=True),
    "deepseek_r1": Family(
        {"default": "deepseek_r1"},
        DEEPSEEK,
        eos="<|end_of_sentence|>",
        stops=("<|end_of_sentence|>",),
        bos="<|begin_of_sentence|>",
        adds_bos=True,
    ),
    "phi3": Family(
        {"default": "phi3"},
        PHI3,
        eos="<|endoftext|>",
        stops=("<|endoftext|>", "<|end|>", "<|assistant|>"),
        bos="<s>",
        eats_space=True,
    ),
    "harmony": Family(
        {"default": "harmony"}, HARMONY, eos="<|return|>", stops=("<|return|>", "<|call|>", "<|endoftext|>")
    ),
    "glm4": Family(
        {"default": "glm4"}, GLM4, eos="<|endoftext|>", stops=("<|endoftext|>", "<|user|>", "<|observation|>")
    ),
    "named": Family({"default": "chatml", "tool_use": "qwen25"}, CHATML, eos="<|im_end|>", stops=("<|im_end|>",)),
}

ASKED, ANSWERED = {"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}
AGAIN = [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Three."}]
SYSTEM = {"role": "system", "content": "Count on."}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
RESULT = {"role": "tool", "tool_call_id": "abcdefghi", "name": "weather", "content": '{"sky": "blue"}'}
THOUGHT = {"reasoning_content": "Next."}

CONVERSATIONS: dict[str, list[Message]] = {
    "one turn": [ASKED, ANSWERED],
    "several turns": [ASKED, ANSWERED, *AGAIN],
    "system": [SYSTEM, ASKED, ANSWERED, *AGAIN],
    "tools": [ASKED, {"role": "assistant", "tool_calls": [CALL]}, RESULT, {"role": "assistant", "content": "Blue."}],
    "thinking": [ASKED, ANSWERED | THOUGHT, AGAIN[0], AGAIN[1] | THOUGHT],
    "tools and thinking": [
        *(ASKED, {"role": "assistant", "tool_calls": [CALL]} | THOUGHT, RESULT),
        *({"role": "assistant", "content": "Blue."} | THOUGHT, AGAIN[0], AGAIN[1] | THOUGHT),
    ],
}


def conversation_row(name: str) -> dict[str, Any]:
    """The row of a data file that holds one of CONVERSATIONS."""
    return {"messages": CONVERSATIONS[name]} | ({"tools": [TOOL]} if "tools" in name else {})


def made_of(tmp_path: Path, family: str, *rows: Any, **settings: Any) -> tuple[list[list[str]], Any]:
    """The trained texts of every sequence, and the prepared data."""
    tokenizer = FAMILIES[family].tokenizer()
    data = section(write_jsonl(tmp_path / "a.jsonl", list(rows)), **settings)
    made = prepared(data, tokenizer, stops=FAMILIES[family].stop_token_ids(tokenizer))
    return trained_texts(made, tokenizer), made


def refused(tmp_path: Path, family: str, *rows: Any, **settings: Any) -> list[str]:
    tokenizer = FAMILIES[family].tokenizer()
    data = section(write_jsonl(tmp_path / "a.jsonl", list(rows)), **settings)
    return prepare_problems(data, tokenizer, stops=FAMILIES[family].stop_token_ids(tokenizer))


def user(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": text} | more


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text} | more
