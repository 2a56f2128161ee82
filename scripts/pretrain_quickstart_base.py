"""Pretrain recipes/quickstart/base, a Llama of 3.4 M parameters, on the standard library of the running Python.

    OMP_NUM_THREADS=2 python scripts/pretrain_quickstart_base.py [--out recipes/quickstart/base]

Trains a byte-level BPE tokenizer, then the model for three passes over the text: about a quarter of an hour on two
cores. The modules that scripts/build_quickstart_data.py holds out for eval are not in the text.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from build_quickstart_data import is_held_out, module_name, stdlib_files
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PAD, TURN_START, TURN_END = "<|pad|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
VOCABULARY = 4096
WINDOW = 256  # tokens per training row
ROWS_PER_STEP = 8
EPOCHS = 3
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 50
SEED = 42

# Every turn's text is a prefix of the conversation's text, and a turn ends with the token that generation stops on.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('the roles of this template are system, user and assistant, not ' + message['role']) -}}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def documents(*, held_out: bool) -> list[str]:
    """Source files between the chat markers, so that the base has seen what starts and ends a text."""
    return [
        f"{TURN_START}Module: {module_name(path)}\n{path.read_text(encoding='utf-8')}{TURN_END}"
        for path in stdlib_files()
        if is_held_out(module_name(path)) == held_out
    ]


def trained_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, TURN_START, TURN_END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=TURN_END,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def untrained_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Widths are multiples of 64, the block size of NF4; tied embeddings leave more of the 8 MB to the layers."""
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    return model


def windows(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Texts laid end to end and cut into rows, (rows, WINDOW); what is left of the last row goes."""
    ids = torch.tensor([i for row in tokenizer(texts, verbose=False)["input_ids"] for i in row])
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


def learning_rate(step: int, total_steps: int) -> float:
    """Linear warm-up, then cosine down to a hundredth of the peak."""
    if step < WARMUP_STEPS:
        return PEAK_LEARNING_RATE * (step + 1) / WARMUP_STEPS
    done = (step - WARMUP_STEPS) / (total_steps - WARMUP_STEPS)
    return PEAK_LEARNING_RATE * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done)))


def loss_of(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=rows, labels=rows, use_cache=False).loss


def train(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    """Train over all rows EPOCHS times; returns the mean loss of the last hundred steps."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    norms = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    order = torch.cat([torch.randperm(len(rows)) for _ in range(EPOCHS)])
    batches = order.split(ROWS_PER_STEP)
    started, losses = time.perf_counter(), []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, len(batches))
        loss = loss_of(model, rows[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 99:
            seconds = time.perf_counter() - started
            speed = (step + 1) * ROWS_PER_STEP * WINDOW / seconds
            recent = sum(losses[-100:]) / 100
            print(f"step {step + 1}/{len(batches)} loss {recent:.3f} {seconds:.0f} s {speed:,.0f} tokens/s", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "recipes/quickstart/base")
    out = parser.parse_args().out
    started = time.perf_counter()
    torch.manual_seed(SEED)
    texts = documents(held_out=False)
    tokenizer = trained_tokenizer(texts)
    rows, held_out_rows = windows(tokenizer, texts), windows(tokenizer, documents(held_out=True))
    model = untrained_model(tokenizer)
    print(f"{model.num_parameters():,} parameters; {rows.numel():,} tokens x {EPOCHS} epochs")
    final_loss = train(model, rows)
    with torch.no_grad():
        held_out_losses = [loss_of(model, row.unsqueeze(0)).item() for row in held_out_rows]
    held_out_loss = sum(held_out_losses) / len(held_out_losses)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"loss {final_loss:.3f}, on held-out modules {held_out_loss:.3f}; {size:,} bytes in {out.name}/; ", end="")
    print(f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time")


if __name__ == "__main__":
    main()
