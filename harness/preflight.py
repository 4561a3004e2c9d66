"""What can be known before the first second on a card: whether the disk will do for what a plan keeps, and
whether the model can be opened and the card can hold it, asked where what runs need is imported.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from harness import machine, method
from harness.errors import Problem
from harness.plain import space
from harness.spec import ENSEMBLE, RunSpec

GIB = 2**30
HELD = 6  # times the weights in 16 bits: these and two moments in 32, as a checkpoint of all of them has it
AT_ONCE = 3  # checkpoints of a training: two are kept while the next is written


def weight_bytes(spec: RunSpec) -> int:
    """Of its model's files, in 16 bits; 0 where they are not here."""
    place: str | Path | None = spec.locations.get("model")
    if not place:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(spec.model, "config.json")
        place = Path(found).parent if isinstance(found, str) else None
    if not place:
        return 0
    size = sum(file.stat().st_size for file in Path(place).glob("*.safetensors"))
    with suppress(OSError, ValueError, AttributeError):
        said = json.loads(Path(place, "config.json").read_text("utf-8"))
        size //= 2 if "float32" in (said.get("dtype"), said.get("torch_dtype")) else 1
    return size


# The disk


def crowded(runs: Sequence[RunSpec], folder: Path) -> tuple[Problem | None, str]:
    """Why what these runs will save has no room in a folder, by the least that it takes; a note where only
    the checkpoints of a training have none. Adapters, small beside whole models, are not counted."""
    saving = {spec.method: saves_all(spec) for spec in runs if spec.leaves_model}
    whole = [spec for spec in runs if spec.leaves_model and saving[spec.method]]
    each = weight_bytes(whole[0]) if whole else 0
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free, saved, held = shutil.disk_usage(place).free, each * len(whole), each * HELD * AT_ONCE
    if saved > free:
        counted = f"the models of {len(whole)} runs" if len(whole) > 1 else "the model of the run"
        what = f"{counted} will take {space(saved)} or more, and {space(free)} are free"
        return Problem(
            what, remedy="choose a folder on another disk, fewer seeds, or methods with adapters"
        ), ""
    if saved + held > free:
        return None, (
            f"checkpoints may take {space(held)} while all weights are trained, and "
            f"{space(free - saved)} are left for them: a training that is stopped may begin anew"
        )
    return None, ""


def saves_all(spec: RunSpec) -> bool:
    """Whether what it leaves is a whole model: what trains all of one, or averages several."""
    if spec.method == ENSEMBLE:
        return True
    plugins = spec.locations.get("plugins", [])
    cls = method.resolve(spec.method, method.find(spec.method, method.known_methods(plugins)))
    return cls.attach is method.Method.attach


# The model and the card


def unfit(asked: dict) -> list[str]:
    """Why no run of this spec could begin here. Of the weights nothing is read, nor downloaded."""
    spec = RunSpec.from_json(asked)
    return [f"model {spec.model}: {reason}" for reason in reasons(spec)]


def reasons(spec: RunSpec) -> Iterator[str]:
    import torch
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    from harness.training import limit_hub, resolve_precision

    limit_hub()
    source = (spec.locations.get("model") or spec.model, {"trust_remote_code": False})
    yield from failed(lambda: resolve_precision(spec.hp.precision))
    yield from failed(lambda: AutoTokenizer.from_pretrained(source[0], **source[1]), "its tokenizer: ")
    found: list = []
    yield from failed(
        lambda: found.append(AutoConfig.from_pretrained(source[0], **source[1])), "its config: "
    )
    if found and type(found[0]) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        yield f"{found[0].model_type} is no causal language model of transformers"
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        if free < (least := weight_bytes(spec)) < total:
            yield (
                f"its weights take {least / GIB:.3g} GiB, and {free / GIB:.3g} of {total / GIB:.3g} GiB of "
                f"{machine.card_properties().name} are free: end other programs (nvidia-smi names them)"
            )


def failed(ask: Callable[[], object], what: str = "") -> list[str]:
    try:
        ask()
    except Exception as error:  # a library's, or a file's that is no such
        return [f"{what}{' '.join(str(error).split())[:300] or type(error).__name__}"]
    return []
