"""Makes the demo from nothing: data, tokenizer, and a small base model pre-trained on the world's prose.

python demo/build.py [--out DIR] [--steps N]
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import world
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GenerationConfig, PreTrainedTokenizerFast

SEED = 20
ROWS = 480  # per part of the instruction data
DOCUMENTS = 100_000
LENGTH = 256
BATCH = 64
HELD_OUT = 512  # sequences
PEAK_LR = 3e-3
WARM_UP = 0.03  # of all steps

SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
PAD, EOS, BOS, UNK, START, END = range(len(SPECIALS))

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}
    {%- set preface = messages[0].content | trim + '\\n\\n' -%}
    {%- set turns = messages[1:] -%}
{%- else -%}
    {%- set preface = '' -%}
    {%- set turns = messages -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if turn.role != ['user', 'assistant'][loop.index0 % 2] -%}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
    {%- endif -%}
    {%- if turn.role == 'user' -%}
        {{- '<start_of_turn>user\\n' + (preface if loop.first else '') + turn.content | trim + '<end_of_turn>\\n' -}}
    {%- else -%}
        {{- '<start_of_turn>model\\n' -}}
        {%- generation -%}
        {{- turn.content | trim + '<end_of_turn>' -}}
        {%- endgeneration -%}
        {{- '\\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<start_of_turn>model\\n' -}}
{%- endif -%}
"""


def write_data(out):
    out.mkdir(parents=True, exist_ok=True)
    for part, rows in world.conversations(ROWS, SEED).items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (out / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


def train_tokenizer(texts):
    bpe = Tokenizer(models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1984,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", BOS)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        additional_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def pack(tokenizer, texts):
    """All documents in a row, each from <bos> to <eos>, cut into sequences of one length."""
    stream = []
    for start in range(0, len(texts), 10_000):
        for ids in tokenizer(texts[start : start + 10_000])["input_ids"]:
            stream += [*ids, EOS]
    whole = len(stream) // LENGTH * LENGTH
    return torch.tensor(stream[:whole], dtype=torch.int16).view(-1, LENGTH)


def new_model(vocab_size):
    torch.manual_seed(SEED)
    config = Gemma3TextConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        query_pre_attn_scalar=64,
        max_position_embeddings=1024,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=BOS,
    )
    return Gemma3ForCausalLM(config)


def loss_of(model, batch):
    batch = batch.to(model.device, torch.long)
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        logits = model(input_ids=batch, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())


def pretrain(model, sequences, steps):
    # Gemma's norm weights are offsets from one, so that decay may act on all parameters alike.
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    warm_up = math.ceil(WARM_UP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    epochs = math.ceil(steps * BATCH / len(sequences))
    order = torch.cat([torch.randperm(len(sequences)) for _ in range(epochs)])
    start = time.time()
    for step in range(steps):
        loss = loss_of(model, sequences[order[step * BATCH : (step + 1) * BATCH]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if (step + 1) % max(1, steps // 20) == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {time.time() - start:.0f} s", flush=True)


@torch.no_grad()
def rescale(model):
    """Long training at a high rate leaves large weights, on which a usual learning rate has little effect.

    A norm follows each of these products, so that their scale is free and the model's function the same.
    """
    for name, weight in model.named_parameters():
        if name.split(".")[-2] in {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}:
            weight *= model.config.initializer_range / weight.square().mean().sqrt()


@torch.no_grad()
def settle_unseen_tokens(model, seen):
    """Tokens that the prose never showed, the turn marks among them, look like an average token instead of an impossible one."""
    rows = model.get_input_embeddings().weight
    mean, deviation = rows[seen].mean(0), rows[seen].std(0)
    noise = torch.randn(int((~seen).sum()), len(mean), generator=torch.Generator().manual_seed(SEED))
    rows[~seen] = mean + deviation * noise.to(rows.device)


@torch.no_grad()
def perplexity(model, sequences):
    losses = [loss_of(model, batch).item() for batch in sequences.split(BATCH)]
    return math.exp(sum(losses) / len(losses))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--steps", type=int, default=4000)
    args = parser.parse_args()

    write_data(args.out / "data")
    texts = world.documents(DOCUMENTS, SEED)
    tokenizer = train_tokenizer(texts[:20_000])
    sequences = pack(tokenizer, texts)
    print(
        f"{len(texts)} documents, {sequences.numel() / 1e6:.1f} M tokens, vocabulary of {len(tokenizer)}",
        flush=True,
    )

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = new_model(len(tokenizer)).to(device)
    print(f"{model.num_parameters() / 1e6:.2f} M parameters on {device}", flush=True)
    pretrain(model, sequences[HELD_OUT:], args.steps)
    rescale(model)
    settle_unseen_tokens(model, torch.bincount(sequences.flatten().int(), minlength=len(tokenizer)) > 0)
    model.to(torch.bfloat16)
    print(f"held-out perplexity {perplexity(model, sequences[:HELD_OUT]):.3f}")

    model.generation_config = GenerationConfig(eos_token_id=[EOS, END], pad_token_id=PAD, bos_token_id=BOS)
    model.save_pretrained(args.out / "model")
    tokenizer.save_pretrained(args.out / "model")
    print(f"saved to {args.out}")


if __name__ == "__main__":
    main()
