"""The decoder against transformers' generate: first whether it writes the same text, then how fast.

    python benchmarks/decode.py                       # Gemma-3-1b's shape on a GPU, a small one on a CPU
    python benchmarks/decode.py --model DIR --variants base lora --slots 64 256

Prompts have 32 to 512 tokens on a GPU, and answers end unevenly: every so many token ids is a stop. Weights
are drawn, with a head of their own, so that texts wander. generate has one batch of as many rows as the
engine has slots, and no stops: its answers are about as long as the engine's in the mean, lest prompts weigh
more, and it waits for no longest one, as it would in use. It is timed as torch comes, and without cuDNN's
attention, which plans anew for each length; a run has it off.
"""

import argparse
import sys
import tempfile
import time
from array import array
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, Gemma3TextConfig

sys.path.insert(0, str(Path(__file__).parents[1]))

from harness.data import Example
from harness.spec import Hyperparams
from harness.training import decoder, engine, slot_attention
from harness.training.graphs import recorded
from harness.training.head import causal_lm

GPU = torch.cuda.is_available()
torch.backends.cuda.enable_cudnn_sdp(False)  # as a run does
DEVICE, DTYPE = torch.device("cuda" if GPU else "cpu"), torch.bfloat16 if GPU else torch.float32
NEVER = 10**9  # steps
LAYERS = 50  # whose attention is timed
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2, "tie_word_embeddings": False}
SHAPES = {
    "gemma-3-1b": {
        "vocab_size": 262144, "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512,
    },
    "small": {
        "vocab_size": 2048, "hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64, "sliding_window": 32,
    },
}  # fmt: skip


HEADER = [
    "model", "kernels", "slots", "rows", "new tokens", "new tokens/s", "and without capture", "ms a step",
    "seconds", "of them reading", "of them capture", "peak GiB", "x generate", "x generate without cuDNN",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--model", default="gemma-3-1b" if GPU else "small", help="folder, random:FOLDER, gemma-3-1b or small"
    )
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    add("--slots", nargs="+", type=int, default=[64, 256] if GPU else [8, 32])
    add("--new-tokens", type=int, default=256 if GPU else 32)
    add("--prompts", nargs=2, type=int, default=[32, 512] if GPU else [8, 64], metavar="TOKENS")
    add("--rows", type=int, default=6000 if GPU else 128, help="of a whole job at the end; 0: none")
    add("--static", action="store_true", help="generate with a static cache too: it compiles for a minute")
    asked = parser.parse_args()
    same_text()
    if GPU:
        attention_kernels()
    print(f"\n{asked.model}, prompts of {asked.prompts} tokens, at most {asked.new_tokens} new ones\n")
    line(*HEADER)
    line(*["---"] * len(HEADER))
    for variant in asked.variants:
        try:
            model = VARIANTS[variant](base(asked.model))
        except Exception as error:  # a package that this machine lacks
            line(variant, f"not loaded: {type(error).__name__}: {str(error)[:80]}")
            continue
        for slots in asked.slots if variant == "base" else asked.slots[-1:]:
            compare(variant, model, slots, asked)
        line(variant, ties(model, asked))
        del model
    if asked.rows:
        model, slots = base(asked.model), asked.slots[-1]
        with compiled_from(0):
            show(
                "base, first",
                slots,
                timed(model, slots, 2 * slots, asked),
                slow := speeds(model, slots, asked),
            )
            show("base", slots, timed(model, slots, asked.rows, asked), slow)


# Models


def base(name: str):
    torch.manual_seed(0)
    if name not in SHAPES and not name.startswith("random:"):
        return AutoModelForCausalLM.from_pretrained(name, dtype=DTYPE, device_map={"": DEVICE}).eval()
    shape = SHAPES.get(name)
    config = Gemma3TextConfig(**shape, **SPECIAL) if shape else AutoConfig.from_pretrained(name[7:])
    with DEVICE:
        return AutoModelForCausalLM.from_config(config, dtype=DTYPE).eval()


def lora(model):
    from peft import LoraConfig, get_peft_model

    made = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False))
    return made.to(DTYPE).eval()


def four_bits(model):
    bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPE)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=bits, device_map={"": DEVICE}, dtype=DTYPE
        ).eval()


def reft(model):
    from methods.reft import LoReFT

    return LoReFT().intervene(model).eval()


VARIANTS = {"base": lambda model: model, "lora": lora, "4-bit": four_bits, "reft": reft}


# Whether


def rows(count: int, lengths, vocabulary: int) -> list[Example]:
    draw = torch.Generator().manual_seed(1)
    sizes = torch.randint(lengths[0], lengths[1] + 1, (count,), generator=draw).tolist()
    texts = [torch.randint(3, vocabulary, (size,), generator=draw).tolist() for size in sizes]
    return [Example(f"row {i}", "", "", "", array("i", ids), array("i")) for i, ids in enumerate(texts)]


def made(stops=()) -> decoder.Decoder:
    tokenizer = SimpleNamespace(pad_token_id=0, bos_token_id=2)
    return decoder.Decoder(tokenizer, list(stops), Hyperparams(), Accelerator(cpu=not GPU))


def generating(model, stops=()) -> decoder.Decoder:
    """The same decoder, by transformers' own loop."""
    other = made(stops)
    other.reasons[causal_lm(model)] = "asked for"
    return other


@contextmanager
def compiled_from(steps: int):
    own, engine.COMPILED_FROM = engine.COMPILED_FROM, steps
    try:
        yield
    finally:
        engine.COMPILED_FROM = own


def same_text() -> None:
    """A small model in fp32: every text must be generate's, on each of the engine's kernels."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"] * 2
    config = Gemma3TextConfig(**SHAPES["small"], **SPECIAL, layer_types=kinds)
    with DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    some, stops = rows(24, (4, 80), 2048), range(0, 2048, 24)
    expected = generating(model, stops).continuations(model, some, 24, 32)
    for steps, slots in [(NEVER, 1), (NEVER, 5), (0, 5), (0, 24)]:
        own = made(stops)
        with compiled_from(steps):
            found = own.continuations(model, some, slots, 32)
        gaps = partings(model, some, found, expected)
        said = f"{len(some) - len(gaps)} of {len(some)} texts are generate's"
        if gaps:
            said += f"; the others part where logits differ by {max(gaps):.1e} of the largest"
        wrong = "WRONG" if max(gaps, default=0) > 1e-5 else ""  # fp32 rounds 6e-8, and sums of many more
        print(f"fp32, {slots} slots, {own.kernels}: {said}", wrong, *own.refused, flush=True)


@torch.inference_mode()
def ties(model, asked) -> str:
    """Where the engine's text parts from generate's, how far apart the two tokens' logits are."""
    some = rows(16, asked.prompts, model.config.vocab_size)
    texts = [d.continuations(model, some, 16, min(48, asked.new_tokens)) for d in (made(), generating(model))]
    gaps = partings(model, some, *texts)
    said = f"{len(some) - len(gaps)} of {len(some)} texts are generate's in {DTYPE}"
    if not gaps:
        return said
    return (
        f"{said}; where {len(gaps)} part, logits differ by {max(gaps):.2%} of the largest; bf16 rounds 0.4 %"
    )


@torch.inference_mode()
def partings(model, some, own, other) -> list[float]:
    """Of each text that is another, how far apart the logits of the first two tokens that differ are."""
    gaps = []
    for row, [mine], [theirs] in zip(some, own, other, strict=True):
        pairs = enumerate(zip(mine, theirs, strict=False))
        at = next((i for i, (a, b) in pairs if a != b), None)
        if at is None and len(mine) != len(theirs):
            gaps.append(1.0)  # one goes on where the other has stopped
        elif at is not None:
            logits = engine.forced([row.prompt_ids], torch.tensor([mine[: at + 1]], device=DEVICE), model)
            logits = logits[0, -1].float()
            gaps.append((abs(logits[mine[at]] - logits[theirs[at]]) / logits.abs().max()).item())
    return gaps


def attention_kernels() -> None:
    """One layer's attention of 256 slots, each half full, by what there is to compute it."""
    key, value = torch.randn(2, 256, 1, 768, 256, device=DEVICE, dtype=torch.bfloat16)
    query = torch.randn(256, 4, 1, 256, device=DEVICE, dtype=torch.bfloat16)
    ends = torch.randint(64, 768, (256,), device=DEVICE)
    mask = (torch.arange(768, device=DEVICE) < ends[:, None])[:, None, None]
    bounds = torch.stack([torch.zeros_like(ends), ends], 1).int()
    live = 2 * ends.sum().item() * 512
    for name, given in {"live keys alone": bounds, "all keys under a mask": mask}.items():
        if name.startswith("live") and slot_attention.triton is None:
            continue

        def layers(given=given) -> None:
            for _ in range(LAYERS):
                slot_attention.attend(None, query, key, value, given)

        graph, _, _ = recorded(layers, torch.cuda.graph_pool_handle())  # else launching takes longer
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        graph.replay()  # the first is uploaded
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        each = start.elapsed_time(end) / LAYERS
        print(f"attention to {name}: {each * 1000:.0f} us, {live / each / 1e9:.2f} TB/s of live keys")


# How fast


def compare(variant: str, model, slots: int, asked) -> None:
    slow = speeds(model, slots, asked)
    show(variant, slots, timed(model, slots, 4 * slots, asked), slow)
    if variant != "base" or slots != asked.slots[-1]:
        return
    if GPU:
        with compiled_from(NEVER):
            show(variant, slots, timed(model, slots, 4 * slots, asked), slow)
    for call in ("first", "second") if asked.static else ():
        speed = generated(model, slots, asked, cache_implementation="static")
        name = f"generate, static cache, {call} call"
        line(variant, name, slots, slots, "", f"{speed:,.0f}", *[""] * 6, *(f"{speed / s:.1f}" for s in slow))


def speeds(model, slots: int, asked) -> list[float]:
    """generate's new tokens a second, as torch comes and without cuDNN's attention; on a CPU once."""
    without = generated(model, slots, asked)
    if not GPU:
        return [without]
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        return [generated(model, slots, asked), without]
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def generated(model, slots: int, asked, **more) -> float:
    """New tokens a second of one batch."""
    other, tokens = generating(model), asked.new_tokens // 2  # as long as in `timed`
    batch = rows(slots, asked.prompts, model.config.vocab_size)
    config = other.config(0.0, tokens, eos_token_id=None, **more)
    with torch.inference_mode():
        if not more:
            other.generate(model, batch[:2], 1, other.config(0.0, 2, eos_token_id=None))  # libraries loaded
        synchronize()
        start = time.perf_counter()
        other.generate(model, batch, 1, config)
        synchronize()
    return slots * tokens / (time.perf_counter() - start)


def timed(model, slots: int, count: int, asked) -> dict:
    """The engine's answers to `count` rows: tokens, seconds of all and of its parts, kernels, peak."""
    some = rows(count, asked.prompts, model.config.vocab_size)
    # One id in so many is a stop: about the mean of the answers, which is `tokens` by `rows`.
    stops = range(0, model.config.vocab_size, asked.new_tokens // 2)
    own, spent = made(stops), defaultdict(float)
    own.continuations(model, some[:2], 2, 2)  # tried, and libraries loaded
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    with clocked(engine.Engine, ("read", "run", "capture"), spent):
        start = time.perf_counter()
        found = own.continuations(model, some, slots, asked.new_tokens)
        synchronize()
        spent["all"] = time.perf_counter() - start
    tokens = sum(len(ids) for [ids] in found)
    peak = torch.cuda.max_memory_allocated() / 2**30 if GPU else None
    return {
        **spent,
        "tokens": tokens,
        "rows": count,
        "kernels": own.kernels,
        "refused": own.refused,
        "peak": peak,
    }


@contextmanager
def clocked(kind, names, spent):
    """Within, the seconds of these methods are added up; `steps` counts those of run."""
    before = {name: getattr(kind, name) for name in names}

    def clock(name):
        def method(self, *args, **kwargs):
            synchronize()
            start = time.perf_counter()
            found = before[name](self, *args, **kwargs)
            synchronize()
            spent[name] += time.perf_counter() - start
            spent["steps"] += args[0] if name == "run" else 0
            return found

        return method

    for name in names:
        setattr(kind, name, clock(name))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(kind, name, method)


def synchronize() -> None:
    if GPU:
        torch.cuda.synchronize()


def show(variant: str, slots: int, own: dict, slow: list[float]) -> None:
    warm = own["tokens"] / (own["all"] - own["capture"])
    line(
        variant, own["kernels"], slots, own["rows"], f"{own['tokens']:,}",
        f"{own['tokens'] / own['all']:,.0f}", f"{warm:,.0f}",
        f"{1000 * own['run'] / own['steps']:.2f}", *(f"{own[x]:.1f}" for x in ("all", "read", "capture")),
        f"{own['peak']:.1f}" if own["peak"] else "", *(f"{warm / s:.1f}" for s in slow), *own["refused"],
    )  # fmt: skip


def line(*cells) -> None:
    print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
