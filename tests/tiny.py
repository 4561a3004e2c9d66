"""A tokenizer, models and rows small enough for tests, made in memory: nothing is downloaded."""

from contextlib import contextmanager
from functools import cache
from itertools import chain

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast

from harness import contract
from harness.contract import stage
from harness.data.template import Example, Template
from harness.measuring.meter import Meter
from harness.method import Method
from harness.record import RunRecord
from harness.spec import Hyperparams, RunSpec
from harness.training import evaluation, weights
from harness.training.decoder import Decoder
from harness.training.loop import train
from harness.training.run import Run

PAD, EOS, BOS, START, END = range(5)  # ids of the special tokens, as they stand in SPECIAL
SPECIAL = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
VOCABULARY = 300
# Gemma 3's own template: a first system message joins the first user's, what does not alternate is refused.
CHAT = """{{ bos_token }}{%- if messages[0]['role'] == 'system' -%}
{%- set first = messages[0]['content'] + '\n\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set first = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif -%}
{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n'
+ (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""
# Published architectures, for counts on the meta device.
GEMMA_3_1B = Gemma3TextConfig(
    vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_hidden_layers=26,
    num_attention_heads=4, num_key_value_heads=1, head_dim=256,
)  # fmt: skip
LLAMA_32_1B = LlamaConfig(
    vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
    num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True,
)  # fmt: skip
TEXT = "\n\n### Response:\nthe cat sat on the mat. model\nthe dog ran to the red house. user\nthe "


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE, which begins every text with <bos> as Llama's and Gemma's do. It merges across lines
    and words, so that where a text is cut before it is tokenised shows."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([TEXT * 3], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        extra_special_tokens=SPECIAL[3:],
    )
    fast.chat_template = CHAT
    return fast


def gemma(**changes) -> Gemma3TextConfig:
    """Two layers, one of them with a sliding window, and a tied head, as Gemma 3 has them."""
    return Gemma3TextConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
            "max_position_embeddings": 256,
            "initializer_range": 0.1,  # so that the tiny model's answers depend on what it reads
            "pad_token_id": PAD,
            "eos_token_id": EOS,
            "bos_token_id": BOS,
            **changes,
        }
    )


def model(config=None, seed: int = 0):
    """The same random weights for the same seed, in fp32."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config or gemma(), dtype=torch.float32).eval()


def rows(count: int, seed: int = 0, prompt=(3, 24), response=(1, 12)) -> list[Example]:
    """Rows of random ordinary tokens, their lengths unequal."""
    draw = torch.Generator().manual_seed(seed)

    def ids(low, high):
        length = torch.randint(low, high + 1, (), generator=draw)
        return torch.randint(len(SPECIAL), VOCABULARY, (length,), generator=draw).tolist()

    made = [([BOS, *ids(*prompt)], ids(*response)) for _ in range(count)]
    return [Example(f"tiny:{i:012x}", "tiny", "", "", array(p), array(r)) for i, (p, r) in enumerate(made)]


def array(ids):
    from array import array

    return array("i", ids)


def hyperparams(**changes) -> Hyperparams:
    return Hyperparams(
        **{
            "learning_rate": 1e-3,
            "batch_size": 8,
            "micro_batch_size": 8,
            "warmup_ratio": 0.25,
            "precision": "fp32",
            "validations": 0,
            **changes,
        }
    )


@cache
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def settings(*groups) -> list[str]:
    """Of a request, KEY=VALUE each; of two values the later one."""
    return list({text.partition("=")[0]: text for text in chain(*groups)}.values())


@contextmanager
def computing(precision: str):
    """Within, accelerators compute in `no` (fp32) or `bf16`: there is one precision a process."""
    accelerator.cache_clear()
    try:
        with stage.computing(precision):
            yield
    finally:
        accelerator.cache_clear()


def examine(name: str, base, options: dict, examples, hp, plugins=()) -> list[contract.Finding]:
    """What a method by its name comes to; `base`: the folder of its model."""
    locations = {"model": str(base), "plugins": list(map(str, plugins))}
    spec = RunSpec(name, 0, "tiny", {"language": "en", "reward": "rouge_l"}, hp, options, locations=locations)
    splits = {"train": list(examples), "validation": [], "test": []}
    with computing("no"):
        return list(contract.examine(contract.Stage(spec, Template(tokenizer(), "chat"), splits)))


def run(
    examples=(), hp=None, seed: int = 0, method=None, reward: str = "rouge_l", devices=None, **splits
) -> Run:
    """A run on examples as its training split, which fills a record of its own; `splits` are the others."""
    hp = hp or hyperparams()
    return Run(
        method, hp, seed, {"validation": [], "test": [], **splits, "train": list(examples)},
        template=Template(tokenizer(), "chat"), stops=[EOS, END], accelerator=accelerator(),
        dataset={"language": "en", "reward": reward}, meter=Meter(accelerator().device), load_base=model,
        record=RunRecord(RunSpec("tiny", seed, "tiny", {}, hp), "ok"), devices=devices,
    )  # fmt: skip


def steps(examples, hp=None, seed: int = 0) -> list[list[dict]]:
    """The micro-batches of each step, as a method that changes nothing is given them."""
    made = run(examples, hp, seed)
    return [Method().prepare(None, step, made) for step in made.batches]


def batch(examples) -> dict:
    """All of them in one."""
    return run(examples).collate(list(examples))


def likelihoods(model, examples, hp=None) -> list[dict]:
    return evaluation.likelihoods(model, examples, run(hp=hp))


def decoder(hp) -> Decoder:
    return Decoder(tokenizer(), [EOS, END], hp, accelerator())


def attached(method, base=None, examples=(), hp=None, seed: int = 0, devices=None):
    """-> a model with the method on it, and the run that it was given."""
    base, made = base or model(), run(examples, hp, seed, method, devices=devices)
    torch.manual_seed(seed)
    return method.attach(base, made), made


def fit(method, hp, examples, seed: int = 0, base=None, validation=(), on_step=lambda **_: None):
    """Trains as a run does, from the same base and the same random state. -> model, optimizer, record."""
    trained, made = attached(method, base, examples, hp, seed)
    made.splits["validation"], made.report = list(validation), on_step
    types = weights.loaded_types(trained) if trained.dtype == torch.bfloat16 else {}  # some oracles: fp64
    if types:
        weights.master_weights(trained, "bf16")
        weights.one_arithmetic(trained, types)
    optimizer = train(trained, made).optimizer
    weights.put_back(types)
    return trained, optimizer, made.record


def losses(record) -> list[float]:
    return [step["loss"] for step in record.training]


def copy_of(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def trained_weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
