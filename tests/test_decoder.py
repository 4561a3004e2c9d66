"""The engine against transformers' own generate: the same text, whatever shares the batch."""

import gc
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import pytest
import tiny
import torch
from transformers import (
    BloomConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from harness.training import attention, engine, slot_attention, slots
from harness.training.decoder import left_padded
from harness.training.head import causal_lm
from harness.training.loop import train
from methods.grpo import GRPO
from methods.orpo import ORPO

ROWS = tiny.rows(13, prompt=(1, 40))
TOKENS = 14
STOPS = range(5, tiny.VOCABULARY, 6)
SIZE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.3, "tie_word_embeddings": False,  # tied, it would only say its last token again
    "pad_token_id": tiny.PAD, "eos_token_id": tiny.EOS, "bos_token_id": tiny.BOS,
}  # fmt: skip
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
SPECIAL = {k: v for k, v in SIZE.items() if k.endswith("_id") or k == "vocab_size"}
SHARING = {  # the last two layers attend to the keys of the first two
    **SIZE, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "head_dim": 16, "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 4,
}  # fmt: skip
KINDS = {
    "gemma 3": tiny.gemma(sliding_window=8, tie_word_embeddings=False),
    "gemma 2": Gemma2Config(
        **SIZE, head_dim=8, sliding_window=8, query_pre_attn_scalar=8,
        attn_logit_softcapping=0.5, final_logit_softcapping=1.0, attn_implementation="eager",
    ),
    "gemma 3n": Gemma3nTextConfig(**SHARING, vocab_size_per_layer_input=tiny.VOCABULARY, laurel_rank=4),
    "gemma 4": Gemma4TextConfig(**SHARING, vocab_size_per_layer_input=tiny.VOCABULARY, global_head_dim=32),
    "llama": LlamaConfig(**SIZE),
    "mistral": MistralConfig(**SIZE, sliding_window=8),
    "qwen 2": Qwen2Config(**SIZE),
    "qwen 3": Qwen3Config(**SIZE, head_dim=8),
    "gpt 2": GPT2Config(**SPECIAL, **GPT2),
}  # fmt: skip
STRANGE = {
    "no attention": MambaConfig(**SPECIAL, hidden_size=32, num_hidden_layers=2, initializer_range=0.3),
    "a bias by distance": BloomConfig(**SPECIAL, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.3),
    "sinks": GptOssConfig(
        **SIZE, head_dim=8, sliding_window=8, num_local_experts=2, num_experts_per_tok=1,
        attn_implementation="eager",
    ),
}  # fmt: skip


def model(kind: str):
    made = tiny.model(KINDS.get(kind) or STRANGE[kind])
    if kind == "sinks":
        for layer in made.model.layers:
            torch.nn.init.normal_(layer.self_attn.sinks)
    return made


def decoder(stops=()):
    made = tiny.decoder(tiny.hyperparams())
    made.stops = list(stops)
    return made


@torch.inference_mode()
def generated(model, rows) -> tuple[list[list[int]], torch.Tensor]:
    """What generate writes after these prompts, and its logits (rows, TOKENS, V)."""
    ids, mask = left_padded(rows, tiny.PAD, "cpu")
    whole = model.generate(
        input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=TOKENS, pad_token_id=tiny.PAD,
        eos_token_id=None, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    return whole.sequences[:, ids.shape[1] :].tolist(), torch.stack(whole.logits, 1).float()


def until(stops, ids: list[int]) -> list[int]:
    return ids[: next((i for i, token in enumerate(ids, 1) if token in stops), len(ids))]


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_generate_whatever_shares_the_batch(kind):
    of = model(kind)
    free, _ = generated(of, ROWS)
    stops = sorted({ids[i % TOKENS] for i, ids in enumerate(free)})[::3]
    expected = [until(stops, ids) for ids in free]
    assert len(set(map(len, expected))) > 3  # answers end unevenly
    for count in (1, 3, 8):
        made = decoder(stops)
        found = [ids for [ids] in made.continuations(of, ROWS, count, TOKENS)]
        assert found == expected
        assert made.kernels == "eager"
    assert of.config._attn_implementation != slots.NAME


@pytest.mark.parametrize("kind", STRANGE)
def test_what_the_engine_cannot_decode_is_generated_and_said(kind):
    of, made = model(kind), decoder()
    with pytest.warns(UserWarning, match="is decoded by generate, slowly: ."):
        found = made.continuations(of, ROWS[:5], 3, TOKENS)
    assert made.kernels == "generate"
    assert [ids for [ids] in found] == generated(of, ROWS[:5])[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.continuations(of, ROWS[:5], 3, TOKENS)  # tried once


def test_an_engine_whose_logits_differ_is_not_used(monkeypatch):
    def everything(self, mask_function, kv_length, **_):
        return torch.ones(2, 1, 1, kv_length, dtype=torch.bool)

    monkeypatch.setattr(slots.Slots, "mask", everything)
    of, made = model("llama"), decoder()
    with pytest.warns(UserWarning, match="its logits would differ by"):
        made.continuations(of, ROWS[:5], 3, TOKENS)
    assert made.kernels == "generate"


def test_in_bf16_the_text_is_that_of_generate_up_to_ties():
    """Where they part, what generate held likeliest and what was written are no further apart than rounding
    in bf16, 2^-8 of the largest logit, after as many layers can move each."""
    of = model("gemma 3").bfloat16()
    found = [ids for [ids] in decoder().continuations(of, ROWS, 4, TOKENS)]
    for ids, expected, logits in zip(found, *generated(of, ROWS), strict=True):
        parting = next((i for i, (a, b) in enumerate(zip(ids, expected, strict=True)) if a != b), None)
        if parting is not None:
            at = logits[parting]
            assert at.max() - at[ids[parting]] <= 4 * 2**-8 * at.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_slot_takes_the_bytes_that_were_reckoned(kind, autocast):
    of = model(kind)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        made = engine.Engine(of, 3, 40, 8, [])
        made.read([row.prompt_ids for row in ROWS[:2]], [0, 2], [0, 1])
        reckoned = 3 * slots.slot_bytes(of, made.state.length)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in made.cache.held]
    shared = len(made.cache.layers) - len(held)
    assert shared == getattr(of.config, "num_kv_shared_layers", 0)
    assert sum(held) * (1 + (shared > 0)) == reckoned  # the shared half counts as well


@pytest.mark.parametrize("kind", ["gemma 3", "gemma 3n", "gemma 4"])
def test_a_step_that_reads_live_keys_alone_is_captured_whether_or_not_layers_share_them(kind, monkeypatch):
    """What only a GPU has, in plain torch: the kernel is a mask, the graph the step itself."""

    def live(query, key, value, bounds, scaling, softcap):
        places = torch.arange(key.shape[2])
        seen = ((places >= bounds[:, :1]) & (places < bounds[:, 1:]))[:, None, None]
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, seen, scale=scaling)

    monkeypatch.setattr(slot_attention, "live", live)
    monkeypatch.setattr(slot_attention, "triton", True)
    made = engine.Engine(model(kind), 13, 40, 8, [])
    monkeypatch.setattr(made, "captured", lambda: SimpleNamespace(replay=made.step))
    with torch.inference_mode():
        made.read([row.prompt_ids for row in ROWS], list(range(13)), list(range(13)))
        made.device = torch.device("cuda")
        assert made.capture(1) == "eager + graph" and made.cache.bounded and not made.refused


@pytest.mark.parametrize("window", [None, 1, 2, 7, 100])
def test_bounds_are_where_the_masks_of_places_begin_and_end(window):
    made = slots.Slots(KINDS["llama"], 5, 40, "cpu")
    made.state.place = torch.tensor([0, 1, 7, 23, 39])
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    seen = made.mask(function, 40)[:, 0, 0]
    made.bounded = True
    [first, end], places = made.mask(function, 40).T[..., None], torch.arange(40)
    assert torch.equal((places >= first) & (places < end), seen)
    assert seen.sum(1).tolist() == [min(place + 1, window or 40) for place in made.state.place.tolist()]


def test_each_prompt_is_read_once_and_answers_make_room_for_the_next():
    of, made, read = model("llama"), decoder(), []
    made.continuations(of, ROWS, 4, 2)
    hook = of.get_input_embeddings().register_forward_pre_hook(lambda _, args: read.append(args[0].shape))
    made.continuations(of, ROWS, 4, 3, copies=2, temperature=1.0)
    hook.remove()
    prompts = [shape[0] for shape in read if shape[1] > 1]
    assert sum(prompts) == len(ROWS)
    assert max(prompts) == 2  # four slots, two copies
    steps = [shape[0] for shape in read if shape[1] == 1]
    assert max(steps) == 4


def test_kernels_are_chosen_for_all_that_a_training_rolls_out(monkeypatch):
    """At its first step as at its last, and on its own for who is asked once: an evaluation, ORPO's start."""
    told = []
    monkeypatch.setattr(engine.Engine, "capture", lambda self, steps: told.append(steps) or "eager")
    hp = tiny.hyperparams(max_steps=3, batch_size=4, kernels="auto")
    for own, each in ((GRPO(group=2, answer_tokens=5), 3), (ORPO(answer_tokens=5), 1)):
        told.clear()
        trained, made = tiny.attached(own, examples=ROWS, hp=hp)
        train(trained, made)
        made.decoder.answers(trained, ROWS[:2])
        assert told == [each * (5 - 1)] * each + [hp.max_new_tokens - 1]
    with pytest.raises(ValueError), made.decoder.asked(9):
        raise ValueError
    assert made.decoder.times == 1


def test_what_is_drawn_of_a_prompt_is_its_own_matter():
    of, found = model("gemma 3"), []
    for at_once, rows in ((1, ROWS), (3, ROWS), (64, ROWS), (5, ROWS[:4])):
        torch.manual_seed(5)
        found.append(decoder(STOPS).continuations(of, rows, at_once, 6, copies=3, temperature=1.0))
    assert found[0] == found[1] == found[2]
    assert found[3] == found[0][:4]
    assert len({tuple(ids) for group in found[0] for ids in group}) > 30
    assert decoder().continuations(of, ROWS, 8, 6, copies=3, temperature=1.0) != found[0]


def test_each_token_is_drawn_by_a_number_of_its_own():
    """Where all tokens are as likely, the number says which."""
    of = model("llama")
    torch.nn.init.zeros_(of.lm_head.weight)
    torch.manual_seed(5)
    found = decoder().continuations(of, ROWS, 4, 6, copies=3, temperature=1.0)
    torch.manual_seed(5)
    expected = torch.rand(len(ROWS), 3, 6) * tiny.VOCABULARY
    assert ((torch.tensor(found) - expected.floor()).abs() <= 1).all()  # one, where a sum is rounded


def test_steps_beyond_an_answers_end_change_nothing_of_it():
    """A GPU is looked at every few steps."""
    of, found = model("gemma 3"), []
    numbers = torch.rand(len(ROWS), 8, generator=torch.Generator().manual_seed(0))
    for look in (1, 30):
        with torch.inference_mode():
            made = engine.Engine(of, len(ROWS), 41, 8, STOPS, temperature=1.0)
            made.read([row.prompt_ids for row in ROWS], list(range(13)), list(range(13)), numbers)
            answers = made.ended()
            while made.ends:
                made.run(look)
                answers |= made.ended()
        found.append(answers)
    assert found[0] == found[1]
    assert len({len(ids) for ids in found[0].values()}) > 3


def test_a_token_is_drawn_as_often_as_it_is_likely():
    probabilities = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.125, 0.125, 0.0])
    numbers = torch.arange(64)[:, None] / 64
    drawn = engine.drawn(probabilities.expand(64, -1), numbers)
    assert torch.bincount(drawn, minlength=7).tolist() == [0, 16, 0, 32, 8, 8, 0]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_and_soft_cap_are_those_of_the_model(temperature):
    of, count = model("gemma 2"), 4000
    torch.manual_seed(0)
    [answers] = decoder().continuations(of, ROWS[:1], count, 1, copies=count, temperature=temperature)
    with torch.no_grad():
        logits = of(input_ids=torch.tensor([list(ROWS[0].prompt_ids)])).logits[0, -1]
    often = torch.bincount(torch.tensor(answers)[:, 0], minlength=tiny.VOCABULARY) / count
    expected = (logits / temperature).softmax(-1)
    assert (often - expected).abs().max() < 4 * (expected.max() / count).sqrt()


def test_nothing_of_the_engine_is_left_when_the_answers_are_there():
    of, made = model("llama"), decoder()
    made.continuations(of, ROWS, 4, 2)
    gc.collect()
    gc.disable()
    try:
        made.continuations(of, ROWS, 4, 3)
        left = [x for x in gc.get_objects() if isinstance(x, slots.Slots | slots.Layer | engine.Engine)]
    finally:
        gc.enable()
    assert not left
    assert slots.NAME not in slots.AttentionMaskInterface._global_mapping


def test_one_compiled_layer_serves_all_and_the_model_is_as_it_was(monkeypatch):
    """Compiled by dynamo alone: what a graph is made of, not how fast it is."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    engine.compiled_forward.cache_clear()
    torch._dynamo.utils.counters.clear()
    kinds = ["sliding_attention", "full_attention"] * 2
    of = tiny.model(tiny.gemma(num_hidden_layers=4, layer_types=kinds, sliding_window=8))
    prompts = [row.prompt_ids for row in ROWS]
    with torch.inference_mode():
        expected, found = (engine.Engine(of, len(ROWS), 40, 8, []) for _ in range(2))
        for made in (expected, found):
            made.read(prompts, list(range(13)), list(range(13)))
        expected.run(3)
        found.state.seen = found.state.length
        with engine.compiled(found.layers, found.cache, "step"):
            for _ in range(3):
                found.step()
    assert torch.equal(found.answer[:, :4], expected.answer[:, :4])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not any("forward" in vars(layer) for layer in causal_lm(of).model.layers)
    engine.compiled_forward.cache_clear()


def test_layers_are_as_they_were_also_where_one_of_them_cannot_be_compiled(monkeypatch):
    compilable = {torch.nn.Identity: None}
    monkeypatch.setattr(engine, "compiled_forward", lambda kind, what: compilable[kind])
    layers, own = [torch.nn.Identity(), torch.nn.Tanh()], lambda x: x
    layers[0].forward = own
    cache = slots.Slots(KINDS["llama"], 1, 8, "cpu")
    with pytest.raises(KeyError), engine.compiled(layers, cache, "step"):
        pass
    assert layers[0].forward is own and "forward" not in vars(layers[1])


def test_compiled_layers_read_prompts_of_any_length(monkeypatch):
    """Dynamo alone, as above: the same logits, keys and values, by few programs."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(engine, "FEW", 2)
    engine.compiled_forward.cache_clear()
    torch._dynamo.utils.counters.clear()
    kinds = ["sliding_attention", "full_attention"] * 2
    of = tiny.model(tiny.gemma(num_hidden_layers=4, layer_types=kinds, sliding_window=8))
    draw = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        plain, fast = (engine.Engine(of, 6, 40, 8, []) for _ in range(2))
        for count, *lengths in [(6, 20, 40), (6, 12, 30), (4, 9, 20), (3, 5, 12), (5, 8, 33), (2, 4, 7)]:
            sizes = torch.linspace(*lengths, count).int().tolist()
            prompts = [torch.randint(3, 40, (size,), generator=draw).tolist() for size in sizes]
            slots = list(range(count))[::-1]
            expected = plain.read(prompts, slots, list(range(count)))
            assert torch.equal(fast.read(prompts, slots, list(range(count))), expected)
            fast.reading = "compiled"
    assert fast.reading == "compiled" and fast.compared and not fast.refused
    for a, b in zip(fast.cache.layers, plain.cache.layers, strict=True):
        assert torch.equal(a.keys, b.keys) and torch.equal(a.values, b.values)
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3
    engine.compiled_forward.cache_clear()


def test_prompts_read_otherwise_by_compiled_layers_are_read_plainly(monkeypatch):
    monkeypatch.setattr(engine, "FEW", 4)
    of = tiny.model(tiny.gemma(num_hidden_layers=2))
    prompts = [row.prompt_ids for row in ROWS][:4]
    with torch.inference_mode():
        plain, fast = (engine.Engine(of, 4, 40, 8, []) for _ in range(2))
        expected = plain.read(prompts, [0, 1, 2, 3], [0, 1, 2, 3])
        fast.reading = "compiled"

        @contextmanager
        def wrong(layers, cache, what):
            with monkeypatch.context() as patched:
                patched.setattr(fast, "scored", lambda hidden: -of.lm_head(hidden))
                yield

        monkeypatch.setattr(engine, "compiled", wrong)
        assert torch.equal(fast.read(prompts, [0, 1, 2, 3], [0, 1, 2, 3]), expected)
    assert fast.reading == "eager" and "logits differ" in fast.refused[0]


@pytest.mark.skipif(not (slot_attention.triton and torch.cuda.is_available()), reason="a kernel of a GPU")
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("groups, heads, width", [(1, 4, 256), (2, 1, 64), (8, 3, 128)])
def test_attention_to_live_keys_is_that_under_a_mask(groups, heads, width, softcap):
    query, key, value = (
        torch.randn(3, *shape, width, device="cuda", dtype=torch.bfloat16)
        for shape in ((groups * heads, 1), (groups, 150), (groups, 150))
    )
    bounds = torch.tensor([[0, 1], [10, 150], [70, 133]], dtype=torch.int32, device="cuda")
    places = torch.arange(150, device="cuda")
    mask = ((places >= bounds[:, :1]) & (places < bounds[:, 1:]))[:, None, None]
    found, expected = (
        slot_attention.attend(None, query, key, value, x, softcap=softcap)[0] for x in (bounds, mask)
    )
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("length, copied", [(65, True), (66, False), (97, True)])
def test_no_key_head_is_repeated_without_a_copy_where_attention_misreads_the_last_mask(
    length, copied, monkeypatch
):
    """A mask and one key head for several queries': as Gemma 3 1B, beyond its window."""
    of, strides = tiny.model(tiny.gemma(num_key_value_heads=1, sliding_window=16)), []
    own = torch.nn.functional.scaled_dot_product_attention

    def told(query, key, value, attn_mask=None, **more):
        if attn_mask is not None:
            strides.extend(x.stride(1) for x in (key, value))
        return own(query, key, value, attn_mask=attn_mask, **more)

    ids = torch.randint(5, 60, (1, length))
    expected = of(input_ids=ids).logits
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", told)
    torch.testing.assert_close(of(input_ids=ids).logits, expected)
    assert strides and all(bool(stride) is copied for stride in strides)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a kernel of a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [33, 64, 65, 97, 129])
def test_attention_of_one_key_head_is_the_plain_one_at_every_length(length, dtype):
    torch.backends.cuda.enable_cudnn_sdp(False)  # as a run does
    of = tiny.model(tiny.gemma(num_key_value_heads=1, sliding_window=16)).to("cuda", dtype)
    ids = torch.randint(5, 60, (2, length), device="cuda")
    logits, gradients = {}, {}
    for name in ("sdpa", "eager"):
        of.set_attn_implementation(name)
        logits[name] = of(input_ids=ids).logits
        of.zero_grad()
        logits[name].float().square().mean().backward()
        gradients[name] = torch.cat([p.grad.flatten() for p in of.parameters()])
    assert engine.distance(logits["sdpa"], logits["eager"]) < (0.05 if dtype == torch.bfloat16 else 1e-3)
    assert apart(gradients["sdpa"], gradients["eager"]) < (0.05 if dtype == torch.bfloat16 else 1e-3)


# Rows one behind another

BORDERS = [0, 20, 48, 49, 90, 96, 96]  # of 2 * 48 tokens; the last row is empty, as a padding's may be


def apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def each_by_itself(query, key, value, borders, before: int, scale: float):
    """(T, heads, d), (T, key heads, d) -> (T, heads, d): a token sees its row's own up to itself, of those
    before it at most so many."""
    outputs = []
    for start, end in pairwise(borders):
        q, k, v = (x[start:end].transpose(0, 1).float() for x in (query, key, value))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        back = torch.arange(end - start)[:, None] - torch.arange(end - start)
        hidden = ((back < 0) | (back > before)).to(q.device)
        outputs.append(((q @ k.mT * scale).masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


def flash_in_plain_torch(
    query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, dropout_p, is_causal, return_debug_mask,
    *, scale, window_size_left, window_size_right,
):  # fmt: skip
    """torch.ops.aten._flash_attention_forward, which no CPU has."""
    borders = cum_seq_q.tolist()
    assert torch.equal(cum_seq_q, cum_seq_k) and is_causal and not dropout_p and window_size_right <= 0
    assert max_q == max_k >= max(b - a for a, b in pairwise(borders))
    before = window_size_left if window_size_left >= 0 else len(query)
    return each_by_itself(query, key, value, borders, before, scale), None, None, None, None


@pytest.mark.parametrize("window", [None, 2, 5, 40, 41, 64])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))],
)
def test_attention_to_rows_one_behind_another_is_that_to_each_by_itself(device, window, monkeypatch):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if device == "cpu":
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_in_plain_torch)
    draw = torch.Generator().manual_seed(0)
    given = [
        torch.randn(2, heads, 48, 16, generator=draw).to(device, dtype).requires_grad_()
        for heads in (4, 2, 2)
    ]
    weights = torch.randn(2, 48, 4, 16, generator=draw).to(device, dtype)
    found, _ = attention.rows_apart(
        None, *given, None, scaling=0.3, sliding_window=window, max_length_q=41,
        cu_seq_lens_q=torch.tensor(BORDERS, dtype=torch.int32, device=device),
    )  # fmt: skip
    rows = [x.transpose(1, 2).flatten(0, 1) for x in given]
    expected = each_by_itself(*rows, BORDERS, (window or 96) - 1, 0.3).view(found.shape)
    assert found.dtype == dtype
    close = 0.02 if device == "cuda" else 1e-5
    assert apart(found, expected) < close
    learned = torch.autograd.grad(found, given, weights)
    for own, other in zip(learned, torch.autograd.grad(expected, given, weights.float()), strict=True):
        assert apart(own, other) < close
