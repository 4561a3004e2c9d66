"""One RunSpec becomes one RunRecord: the child process. `python -m harness.run FOLDER`.

FOLDER holds spec.json; this process leaves events.jsonl, outputs.jsonl, model/ and, last, result.json.
"""

import ctypes
import json
import math
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path

from harness import ROOT, method
from harness.data import (
    COUNTED,
    SPLITS,
    Batches,
    Row,
    Template,
    answered,
    collate,
    pack,
    rows_hash,
    study,
    token_rows,
)
from harness.errors import BadRequest
from harness.plain import redacted
from harness.record import RunRecord, answers_hash
from harness.spec import RunSpec, content_hash
from harness.store import EVENTS, MODEL, OUTPUTS, RECORD, append, save

SPEC, RESULT = "spec.json", "result.json"
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # of OpenMP's threads
BUSY_BYTES = 2**30  # a driver and a desktop hold less
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "sacrebleu", "rouge-score")


def main(folder: Path) -> None:
    die_with_parent()
    for number in ENDING:
        signal.signal(number, interrupt)
    job = json.loads((folder / SPEC).read_text("utf-8"))
    spec = RunSpec.from_json(job["spec"])
    record = RunRecord(
        spec=spec,
        status="failed",
        command=job["command"],
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    ended_by = None
    try:
        execute(spec, record, folder)
        record.status = "ok"
    except BaseException as error:  # whatever ends a run is its status, never its absence
        record.status, record.error = diagnose(error)
        ended_by = error
    leave(record, folder)
    if ended_by:
        traceback.print_exception(ended_by)


ENDING = (signal.SIGINT, signal.SIGTERM)  # the first is ignored below a script's & until it is handled


def interrupt(*_) -> None:
    """Once: another must not disturb the writing of what was measured."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def leave(record: RunRecord, folder: Path) -> None:
    """What was measured so far, as the bench will find it."""
    record.warnings = [redacted(warning) for warning in record.warnings]
    save(folder / RESULT, record.to_json())


def die_with_parent() -> None:
    """A child whose bench was killed must not keep the card."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != int(os.environ.get("TUNEOFF_BENCH", os.getppid())):
        sys.exit("the bench is gone")


AGAIN = "the same command runs it again"
SMALLER = "lower hp.micro_batch_size or hp.max_length, or set hp.gradient_checkpointing=true"
OUT_OF_MEMORY = {  # how those say it who hold the memory: allocators, drivers, libraries, C++ and the system
    "oom_gpu": (
        "CUDA out of memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "[CUDA]: out of memory",
        "CUDA_ERROR_OUT_OF_MEMORY",
        "cudaErrorMemoryAllocation",
        "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN, cuSOLVER, cuSPARSE
        "HIP out of memory",
    ),
    "oom_host": ("DefaultCPUAllocator", "std::bad_alloc", "Cannot allocate memory"),
}


def exhausted(text: str) -> str | None:
    """The status of what says that memory ran out."""
    return next((status for status, marks in OUT_OF_MEMORY.items() if any(m in text for m in marks)), None)


def out_of_memory(status: str, text: str) -> tuple[str, str]:
    return status, f"out of memory on the {'GPU' if status == 'oom_gpu' else 'host'}: {SMALLER}. {text[:300]}"


def diagnose(error: BaseException) -> tuple[str, str]:
    """-> status and one line of what went wrong, with the remedy where there is one."""
    text = redacted(" ".join(str(error).split()))
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", f"interrupted; {AGAIN}"
    if kind == "Diverged":
        return "diverged", f"{text}: try a lower hp.learning_rate"
    if isinstance(error, method.Unsupported):
        return "unsupported", text
    said = "oom_gpu" if kind == "OutOfMemoryError" else "oom_host" if isinstance(error, MemoryError) else None
    if status := said or exhausted(text):
        return out_of_memory(status, text)
    return "failed", f"{kind}: {text[:500]}"


def execute(spec: RunSpec, record: RunRecord, folder: Path) -> None:
    """Fills the record as far as it comes."""
    sources = method.available(spec.locations.get("plugins", []))
    cls = method.resolve(spec.method, method.find(spec.method, sources))
    record.card, record.hashes["method_code"] = method.card(cls), method.code_hash(cls)
    record.overrides = {name: list(value) for name, value in cls.overrides.items()}
    missing = [name for name in cls.needs if not installed(name)]
    if missing:
        raise method.Unsupported(f"{spec.method} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    chosen = method.build(cls, spec.options)
    hp = cls.own(spec.hp)

    import torch
    from accelerate import Accelerator

    from harness import metrics
    from harness.measuring.meter import Meter
    from harness.training import generate, head

    precision = resolve_precision(hp.precision)
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision="bf16" if precision == "bf16" else "no"
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    def report(**values):
        with suppress(OSError):  # a full disk: what is only shown does not end a run
            append(folder / EVENTS, values)

    def load(**more):
        return load_base(spec, dtype, accelerator.device, **more)

    meter = Meter(accelerator.device, on_enter=lambda name: report(phase=name))
    if meter.card and meter.card.before and meter.card.before > BUSY_BYTES:
        record.warnings.append(
            f"{meter.card.before / 2**30:.1f} GiB of the card were in use before the run: its times and "
            "device memory are not its own"
        )
    record.phases = meter.phases
    record.environment = environment(accelerator.device, precision)
    seed_everything(spec.seed)
    # cuDNN's attention builds a plan for each new length, a tenth of a second: more than a small step.
    torch.backends.cuda.enable_cudnn_sdp(False)

    limit_hub()
    with meter.phase("load"):
        tokenizer = load_tokenizer(spec)
        template = Template(tokenizer, spec.dataset["template"], spec.dataset.get("loss", "all"))
        read = token_rows(spec.dataset, spec.locations.get("sources", {}), template, hp.max_length)
        rows = read.rows
        for split in SPLITS:
            record.hashes[split] = rows_hash(rows[split])
            if spec.dataset[split] and not rows[split]:
                why = {what: read.left_out.get(f"{split}_{what}", 0) for what in COUNTED}
                raise BadRequest(
                    f"no {split} row is left: {why['too_long']} prompts fill "
                    f"hp.max_length={hp.max_length} tokens, {why['refused']} the chat template refuses"
                    + (f", {why['answered']} are answered in training" if why["answered"] else "")
                )
        record.tokens = {
            "left_out": {what: count for what, count in read.left_out.items() if count},
            "refused": read.refused,
            "unused": read.unused,
            "revisions": read.revisions,
            "origins": read.origins,
            "splits": {split: len(rows[split]) for split in SPLITS},
            "answered": {split: answered(rows[split], rows["train"]) for split in SPLITS[:-1]},
            "template": template.kind,
            "loss": template.loss,
            "plain_text": all(not row.prompt for row in rows["train"]),
        }
        record.study = study(tokenizer, read.sample, template.loss)
        model = chosen.load(load)
        record.environment["attention"] = model.config._attn_implementation
        record.environment["model_revision"] = getattr(model.config, "_commit_hash", None)
        with accelerator.autocast():
            sample = torch.tensor([list((r.prompt_ids + r.response_ids)[:8]) for r in rows["test"][:1]])
            head.check(model.eval(), sample.to(accelerator.device))
            if hp.packing:
                check_packing(model, rows["train"], hp.max_length, tokenizer.pad_token_id)
    scorer = metrics.TextScorer(spec.dataset["language"], spec.dataset["reward"])
    stops = stop_tokens(tokenizer, model, rows["train"])
    decoder = generate.Decoder(tokenizer, stops, hp, accelerator, scorer, meter)
    pad = tokenizer.pad_token_id

    def validate() -> float | None:
        if not rows["validation"]:
            return None
        with meter.phase("validate"):
            scores = generate.likelihoods(model, rows["validation"], pad, hp, accelerator)
            return generate.mean_loss(scores)

    asked = [template.question(row, hp.max_new_tokens) for row in rows["test"]]

    def test() -> list[dict]:
        """An output of the model as it is for each test row, with its likelihood and scores."""
        with meter.phase("evaluate"), head.arithmetic(model) as types:
            likelihoods = generate.likelihoods(model, rows["test"], pad, hp, accelerator)
        record.arithmetic["scoring"] = types
        check_finite(likelihoods, spec)
        with meter.phase("generate"):
            answers = decoder.answers(model, asked, report)
        return [
            {"id": row.id, "part": row.part, "prompt": row.prompt, "reference": row.reference}
            | answer | likelihood | scorer.score(answer["output"], row.reference)
            for row, answer, likelihood in zip(asked, answers, likelihoods, strict=True)
        ]  # fmt: skip

    def summary(outputs: list[dict]) -> dict:
        return metrics.summarise(outputs, scorer.signature(), spec.dataset["reward"])

    if spec.trains:
        from harness.training.loop import check, fingerprints, train

        batches = Batches(rows["train"], hp, spec.seed, pad, accelerator.device, decoder)
        record.hashes["batches"] = batches.hashes
        with meter.phase("attach"), read_in(meter, "attach", model) as read:
            model = chosen.attach(model, batches)
            trained = loaded_types(model)
            record.weights = master_weights(model, precision)
            one_arithmetic(model, trained)
            if hp.gradient_checkpointing:
                head.causal_lm(model).gradient_checkpointing_enable({"use_reentrant": False})
        record.sizes = sizes(model)
        if not trained:
            raise ValueError(f"{spec.method} attached nothing to train")
        record.tokens["attach"] = int(sum(read))
        if not chosen.starts_at_base:
            record.start = summary(test())
        record.validation = [{"step": 0, "loss": validate()}]
        told, start = step_report(report, batches), fingerprints(trained)
        optimizer = train(chosen, model, batches, hp, accelerator, meter, record, told, validate)
        check(start, fingerprints(trained), record.training)
        record.sizes["optimizer_bytes"] = optimizer_bytes(optimizer)
        record.tokens["sampled"] = decoder.sampled
        record.notes = chosen.notes
        del optimizer
        model.zero_grad()
        put_back(trained)
        model = chosen.keep(load, model)  # what is kept is what is scored
    else:
        record.sizes = sizes(model.requires_grad_(False))
    outputs = test()
    before = outputs if spec.method == "base" else untouched(spec.locations.get("before"))
    if any(row.prompt and not row.rejected_ids for row in rows["test"]):
        record.hashes["before"] = answers_hash(before)
    with meter.phase("evaluate"):
        worse = rejected(rows["test"], before, template, stops, hp)
        found = generate.likelihoods(model, worse, pad, hp, accelerator) if worse else []
        found = {row.id: generate.mean_loss([score]) for row, score in zip(worse, found, strict=True)}
    for output in outputs:
        if output["id"] in found:
            output["margin"] = found[output["id"]] - generate.mean_loss([output])
        append(folder / OUTPUTS, output)
    record.hashes["outputs"] = content_hash(folder / OUTPUTS)
    record.scores = summary(outputs)
    if spec.trains:
        save_model(chosen, model, tokenizer, record, folder, meter)


@contextmanager
def read_in(meter, phase: str, model):
    """-> a list that takes the tokens of each forward in a phase: in the attach phase, those of a method's
    warm-up. What the decoder reads has a phase of its own. Without a mask, packed padding counts too."""
    read = []

    def count(decoder, args, kwargs):
        if meter.stack[-1] == phase:
            mask = kwargs.get("attention_mask")
            read.append(kwargs["input_ids"].numel() if mask is None else mask.sum())

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield read
    finally:
        hook.remove()


def check_packing(model, rows: list[Row], width: int, pad: int) -> None:
    """Tries some rows of the training on the model. Raises Unsupported where packing would mix them."""
    from harness.training import head

    together = max(pack(rows[:32], width), key=len)
    if len(together) > 1:
        apart, packed = (collate(together, pad, model.device, packed=w) for w in (0, width))
        if reason := head.unpackable(model, apart, packed):
            raise method.Unsupported(reason)


def step_report(report, batches: Batches):
    """Adds to a step's event what progress shows: tokens so far, seconds, peak bytes."""
    import torch

    from harness.measuring.meter import host_peak

    started = time.perf_counter()
    tokens = list(accumulate(batches.tokens))

    def step(**values):
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else host_peak()
        seconds = time.perf_counter() - started
        report(**values, tokens=tokens[values["step"] - 1], seconds=seconds, peak=peak)

    return step


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# Model and tokenizer


def resolve_precision(asked: str) -> str:
    """auto: bf16 where the device truly computes in it (a T4 only emulates it), else fp32."""
    import torch

    real = torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked == "bf16" and torch.cuda.is_available() and not real:
        raise method.Unsupported("this card has no bf16 arithmetic: use --set hp.precision=fp32")
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
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_source(spec), trust_remote_code=False)
    if tokenizer.pad_token_id is None:  # never learned: padding carries no loss, by its place
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(spec: RunSpec, dtype, device, **more):
    """The untouched model in the compute dtype, on the device. `more` goes to from_pretrained."""
    from transformers import AutoModelForCausalLM

    source = model_source(spec)
    if not spec.model.startswith("random:"):
        return AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype,
            device_map={"": device},
            trust_remote_code=False,
            use_safetensors=True,
            **more,
        )
    model = draw_weights(source, dtype, device)
    if not more:
        return model
    with tempfile.TemporaryDirectory() as folder:  # what from_pretrained does to weights, it does to files
        model.save_pretrained(folder)
        del model
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map={"": device}, **more)


def draw_weights(source: str, dtype, device):
    """A model of this architecture with random weights: the same for every method and seed."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def model_source(spec: RunSpec) -> str:
    return spec.locations.get("model") or spec.model


def stop_tokens(tokenizer, model, rows: list[Row]) -> list[int]:
    """The end of sequence, and the token that ends a turn in the rows trained on."""
    configured = model.generation_config.eos_token_id
    stops = {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}
    ends = [row.response_ids[-1] for row in rows]
    last = max(set(ends), key=ends.count)
    if last in tokenizer.all_special_ids or last in tokenizer.added_tokens_decoder:
        stops.add(last)
    return sorted(stop for stop in stops if stop is not None)


def loaded_types(model) -> dict:
    """Trained parameter -> the type that it was loaded in."""
    return {p: p.dtype for p in model.parameters() if p.requires_grad}


def master_weights(model, precision: str) -> str:
    """One policy for every method: what is trained is held in fp32, what is frozen in the compute
    precision, and autocast computes. Pure bf16 weights would swallow small updates."""
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.float32)
    trained, frozen = (
        ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()
                          if p.requires_grad is chosen}))
        for chosen in (True, False)
    )  # fmt: skip
    return (
        f"trained parameters in {trained}"
        + f", frozen in {frozen}" * bool(frozen)
        + (f", computed in {precision}")
    )


def put_back(types: dict) -> None:
    """After the training: what was held in fp32 returns to the type in which it is saved and used."""
    for parameter, loaded in types.items():
        parameter.data = parameter.data.to(loaded)


def one_arithmetic(model, types: dict) -> None:
    """An embedding or a norm held in fp32 would lift what follows to it, up to the whole residual stream, and
    a frozen one would not: here both give the type that they were loaded in. What an embedding multiplies by
    is rounded to it as well, as Gemma's 33.94 that is 34 in bf16. Torch's own norms go by autocast alone."""
    import torch

    for module in model.modules():
        weight = getattr(module, "weight", None)
        loaded = types.get(weight) if isinstance(weight, torch.nn.Parameter) else None
        embeds = isinstance(module, torch.nn.Embedding)
        norm = loaded and weight.ndim == 1 and not type(module).__module__.startswith("torch.")
        if loaded in (None, torch.float32) or not (embeds or norm):
            continue
        for factor in filter(torch.is_floating_point, module.buffers() if embeds else ()):
            factor.data = factor.data.to(loaded).to(factor.dtype)
        module.register_forward_hook(partial(give, loaded))


def give(dtype, module, inputs, output):
    return output.to(dtype)


def check_finite(scores: list[dict], spec: RunSpec) -> None:
    """Raises where the loss on the test rows is no number, or one whose perplexity is none."""
    from harness.training.generate import mean_loss

    if mean_loss(scores) < math.log(sys.float_info.max):
        return
    what = f"the loss on the test rows is {mean_loss(scores):.3g} nats a token"
    if not spec.trains:
        raise ValueError(f"{what} without any training")
    from harness.training.loop import Diverged

    raise Diverged(what)


def untouched(folder: str | None) -> list[dict]:
    """The test outputs of the untouched model, which ran before; none where that failed."""
    try:
        ended = RunRecord.from_json((Path(folder or "") / RECORD).read_text("utf-8"))
        lines = (Path(folder or "") / OUTPUTS).read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines] if ended.ok else []
    except (OSError, ValueError):
        return []


def rejected(rows: list[Row], before: list[dict], template, stops, hp) -> list[Row]:
    """The test rows with a worse response: the preference pair's, else the untouched model's own
    answer, as far as that is another one than the reference."""
    found = []
    answers = {answer.get("id", row.id): answer for row, answer in zip(rows, before, strict=False)}
    for row in rows:
        if not row.prompt:  # plain text has no better and worse answer
            continue
        ids = row.rejected_ids
        answer = answers.get(row.id) if row.prompt else None  # a plain text has no answer to prefer
        if not ids and answer and answer["output"] != row.reference:
            ids = template.response_ids(row.prompt, answer["output"])[: hp.max_length - len(row.prompt_ids)]
            if answer["stopped"] and row.response_ids[-1] in stops:
                ids.append(row.response_ids[-1])
        if ids:
            found.append(replace(row, response_ids=ids))
    return found


def save_model(chosen, model, tokenizer, record: RunRecord, folder: Path, meter) -> None:
    """Writes the trained model after what was measured: a full disk, a fault of the method's or a kill
    costs the model alone."""
    record.status = "ok"
    record.warnings.append(f"the trained model of {record.spec.folder} was not saved")
    leave(record, folder)
    try:
        with meter.phase("save"):
            (folder / MODEL).mkdir()
            chosen.save(model, folder / MODEL)
            tokenizer.save_pretrained(folder / MODEL)
        sizes = [file.stat().st_size for file in (folder / MODEL).rglob("*.safetensors")]
        if sizes:
            record.sizes["saved_bytes"] = sum(sizes)
            record.warnings.pop()
        else:
            record.warnings[-1] += ": it wrote no weights"
    except BaseException as error:
        traceback.print_exc()
        shutil.rmtree(folder / MODEL, ignore_errors=True)  # half a model is none, and fills the disk
        record.warnings[-1] += f": {type(error).__name__}: {redacted(' '.join(str(error).split()))[:300]}"


# What is recorded


def seed_everything(seed: int) -> None:
    import numpy
    import torch

    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


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
    held = {t.data_ptr(): t for t in states if hasattr(t, "numel") and t.numel() > 1}  # some are shared
    return sum(t.numel() * t.element_size() for t in held.values())


def environment(device, precision: str) -> dict:
    """By an allow-list: never the whole of os.environ."""
    import torch

    cuda = device.type == "cuda"
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": properties.name if cuda else "cpu",
        "device_bytes": properties.total_memory if cuda else None,
        "driver": driver() if cuda else None,
        "cuda": torch.version.cuda,
        "precision": precision,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "waiting": ", ".join(f"{name}={os.environ[name]}" for name in WAITING if name in os.environ)
        or "as the library does",
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES if installed(name)},
        "allocator": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "commit": commit(),
    }


def driver() -> str | None:
    try:
        import pynvml

        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except Exception:  # NVML raises many kinds; whichever it is, the driver is unknown
        return None


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} threads" if names else platform.processor()


def commit() -> str | None:
    """Of this code, with a + where it was changed since."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True)
    except OSError:
        return None
    return head.stdout.strip() + "+" * bool(dirty.stdout.strip()) if head.returncode == 0 else None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    os._exit(0)  # the record is whole: no thread that a method has left holds up the bench
