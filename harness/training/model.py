"""The model of a run: found, loaded, tried, and told how large it is."""

import tempfile
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from harness import machine
from harness.data import Example, Template, collate, pack
from harness.method import Unsupported
from harness.spec import RunSpec
from harness.training import head
from harness.training.sharding import local


def resolve_precision(asked: str) -> str:
    """auto: bf16 where the device truly computes in it (a T4 only emulates it), else fp32."""
    real = machine.computes_bf16()
    if asked == "bf16" and torch.cuda.is_available() and not real:
        raise Unsupported("this card has no bf16 arithmetic: use --set hp.precision=fp32")
    return ("bf16" if real else "fp32") if asked == "auto" else asked


HUB_SECONDS = 10  # without a byte; the hub's own limit for files


def limit_hub() -> None:
    """A hub that falls silent ends a run: some requests of its client would wait for ever."""
    from huggingface_hub import get_session, set_client_factory

    def limit(request) -> None:
        if not any((request.extensions.get("timeout") or {}).values()):
            request.extensions["timeout"] = dict.fromkeys(("connect", "read", "write", "pool"), HUB_SECONDS)

    client = get_session()
    hooks = {**client.event_hooks, "request": [*client.event_hooks["request"], limit]}
    set_client_factory(lambda: type(client)(event_hooks=hooks, follow_redirects=True))


def load_tokenizer(spec: RunSpec):
    tokenizer = AutoTokenizer.from_pretrained(model_source(spec), trust_remote_code=False)
    if tokenizer.pad_token_id is None:  # never learned: padding carries no loss, by its place
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: RunSpec, dtype, device, **more):
    """The untouched model in the compute dtype, on the device, which has the rest of its memory again.
    `more` goes to from_pretrained."""
    source = model_source(spec)
    read = partial(
        AutoModelForCausalLM.from_pretrained, dtype=dtype, device_map={"": device}, trust_remote_code=False,
        use_safetensors=True, **more,
    )  # fmt: skip
    if not spec.model.startswith("random:"):
        model = read(source)
    else:
        model = draw_weights(source, dtype, device)
        if more:
            with tempfile.TemporaryDirectory() as folder:  # what read does to weights, it does to files
                model.save_pretrained(folder)
                del model
                model = read(folder)
    torch.cuda.empty_cache()
    return model


def draw_weights(source: str, dtype, device):
    """A model of this architecture with random weights: the same for every method and seed."""
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # of a run's cards, this one
    with torch.random.fork_rng(own), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_source(spec: RunSpec) -> str:
    return spec.locations.get("model") or spec.model


def stop_tokens(template: Template, model, examples: list[Example]) -> list[int]:
    """The end of sequence, and the token that ends a turn in the rows trained on."""
    tokenizer, configured = template.tokenizer, model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    ends = [example.response_ids[-1] for example in examples]
    last = max(set(ends), key=ends.count, default=None)
    if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder:
        stops.add(last)
    return sorted(stop for stop in stops if stop is not None)


def check_model(model, run) -> None:
    """Tries some tokens on the model. Raises where the one LM head, or packing, would measure it wrongly."""
    with run.accelerator.autocast():
        tokens = [list((e.prompt_ids + e.response_ids)[:8]) for e in run.scored[:1]]
        head.check(model.eval(), torch.tensor(tokens).to(run.device))
        if not run.hp.packing:
            return
        together = max(pack(run.splits["train"][:32], run.hp.max_length), key=len)
        if len(together) > 1:
            apart, packed = (collate(together, run.pad, run.device, packed=w) for w in (0, run.hp.max_length))
            if reason := head.unpackable(model, apart, packed):
                raise Unsupported(reason)


def sizes(model) -> dict:
    """parameters, trainable: counts. weight_bytes, trainable_bytes: as they lie in memory.

    A 4-bit weight counts its values, not the bytes that hold them, and its bytes with its scales.
    """
    found = {"parameters": 0, "trainable": 0, "weight_bytes": 0, "trainable_bytes": 0}
    for parameter in model.parameters():
        count, held = parameter.numel(), parameter.numel() * parameter.element_size()
        if state := getattr(parameter, "quant_state", None):
            count = state.shape.numel()
            held += sum(
                t.numel() * t.element_size()
                for t in state.as_dict(packed=True).values()
                if hasattr(t, "numel")
            )
        found["parameters"] += count
        found["weight_bytes"] += held
        if parameter.requires_grad:
            found["trainable"] += count
            found["trainable_bytes"] += held
    return found


def optimizer_bytes(optimizer) -> int:
    """Tensors of the optimizer's state; the one-element step counters are left out."""
    states = [v for state in optimizer.state.values() for v in state.values()]
    held = {
        local(t).data_ptr(): t for t in states if hasattr(t, "numel") and t.numel() > 1
    }  # some are shared
    return sum(t.numel() * t.element_size() for t in held.values())
