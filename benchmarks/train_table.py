"""What benchmarks/train.py measured becomes its table; what was wrong has no speed there.

    python benchmarks/train_table.py a.json b.json      contenders of several calls, in one table

The first losses, and the first gradient's norm, are compared with an eager fp32 reference: HF Trainer's where
it has the method, else Tuneoff's plain loop. A row that is off by more than is allowed is WRONG. Allowed is a
share of how far the reference's losses are apart (TOLERANCE), or in bf16 twice what plain eager bf16 is off
by (HF Trainer's, else Tuneoff's), if that itself stays below MOST of it.
"""

import argparse
import json
import sys
from math import inf
from pathlib import Path
from statistics import median

from peers import CONTENDERS

from harness.errors import BadRequest

GIB = 2**30
WARMUP = 8  # steps before those that are timed: compiling, capturing, lazy initialisation
CHECKED = 8  # steps whose losses are compared; what differs grows from step to step
TOLERANCE = {"fp32": 0.002, "bf16": 0.02}  # of the reference's range; sums are taken in another order
MOST = 0.1  # likewise: plain bf16 that is off by more says nothing of what bf16 costs
GRADIENT = {"fp32": 0.002, "bf16": 0.05}  # relative, of the first gradient's norm: AdamW hides its scale
UNEVEN = 0.05  # of the steps' time: what passes between them beyond this is told
ALIKE = ("model", "precision", "real", "learned", "steps")  # asked of calls that stand in one table


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("json", nargs="+", help="what train.py --json kept")
    try:
        paths = parser.parse_args(given).json
        found = together({path: json.loads(Path(path).read_text("utf-8")) for path in paths})
    except (BadRequest, OSError, ValueError) as error:
        sys.exit(str(error))
    print(*about(found), *rows_of(found["groups"], found), "", *below(found), sep="\n")


def together(calls: dict[str, dict]) -> dict:
    """What calls found, by their files' names, as one call would have. Of a contender that several measured
    the last counts; an error gives way. Raises BadRequest where they are not alike."""
    (first, whole), *others = calls.items()
    groups = {(group["method"], group["shape"]): group for group in whole["groups"]}
    for path, call in others:
        for what in ("device", "torch", *ALIKE):
            a, b = ((c["asked"] | c["ceiling"]).get(what) for c in (whole, call))
            if a != b:
                raise BadRequest(f"{first} and {path} are not alike: {what}, {a} and {b}")
        for group in call["groups"]:
            key = group["method"], group["shape"]
            groups[key] = joined(groups[key], group, path) if key in groups else group
    ceiling = max((call["ceiling"] for call in calls.values()), key=lambda ceiling: ceiling.get("flops", 0))
    return whole | {"ceiling": ceiling, "groups": list(groups.values())}


def joined(a: dict, b: dict, path: str) -> dict:
    """One group of two that read the same rows from the same start."""
    bad, good = sorted([a, b], key=lambda group: "error" not in group["reference"])
    both = "error" not in bad["reference"] and comparable(a["objective"])
    if [a["lengths"], a["targets"]] != [b["lengths"], b["targets"]]:
        raise BadRequest(f"{path}: its rows of {b['method']} {b['shape']} are others")
    if both and not off(b["reference"], a["reference"]) <= allowed(a, "fp32"):
        raise BadRequest(f"{path}: its reference of {b['method']} {b['shape']} has other losses")
    ran = {key: row for key, row in b["rows"].items() if "error" not in row or key not in a["rows"]}
    return good | {"rows": a["rows"] | ran, "flops": a["flops"] or b["flops"]}


def flops(folder: Path, group: dict) -> list[float] | None:
    """Of the model in each step, without what is computed again: 2 a weight and token forward and 2 for the
    gradients of activations, 2 more for those of trained weights; the head where something is learned; the
    scores of causal attention within its window. Null for an objective that reads more than the rows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = next((row for row in group["rows"].values() if row.get("parameters")), None)
    if group["objective"] != "sft" or not sizes:
        return None
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    output = model.get_output_embeddings()
    matrices = [m for m in model.modules() if getattr(getattr(m, "weight", None), "ndim", 0) == 2]
    head, body = output.weight.numel(), sum(
        m.weight.numel() for m in matrices if m is not output and not isinstance(m, torch.nn.Embedding)
    )  # fmt: skip
    added = min(sizes["trainable"], sizes["parameters"] - sum(p.numel() for p in model.parameters()))
    changed = min(sizes["trainable"] - added, body + head)  # of the model's own
    heads, layers = config.num_attention_heads, config.num_hidden_layers
    wide = heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    windows = [config.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    return [
        (4 * head + 2 * max(0, changed - body)) * learned
        + (4 * body + 2 * min(changed, body) + 6 * added) * sum(lengths)
        + 12 * wide * sum(attended(n, window) for n in lengths for window in windows)
        for lengths, learned in zip(group["lengths"], group["targets"], strict=True)
    ]


def attended(length: int, window: int | None) -> int:
    """Pairs of a token and one that it sees, itself included."""
    seen = min(length, window or length)
    return seen * (seen + 1) // 2 + (length - seen) * seen


def off(row: dict, reference: dict) -> float:
    """The greatest difference of the losses that are compared, in nats; infinite where one is no number."""
    pairs = list(zip(row["losses"], reference["losses"][:CHECKED], strict=False))
    differences = [abs(a - b) if None not in (a, b) else inf for a, b in pairs]
    return max(inf if d != d else d for d in differences) if len(pairs) == CHECKED else inf


def allowed(group: dict, precision: str) -> float:
    """How far losses may be off, in nats."""
    losses = group["reference"]["losses"][:CHECKED]
    share = TOLERANCE[precision] * (apart := max(losses) - min(losses))
    plain = group["rows"].get("trainer") or group["rows"].get("eager") or {"error": "not asked for"}
    by = inf if "error" in plain or precision == "fp32" else off(plain, group["reference"])
    return max(share, 2 * by) if by <= MOST * apart else share


def wrongs(group: dict, precision: str) -> dict[str, str]:
    """Contender -> what is wrong with it, of those that ran."""
    found, planned = {}, sum(map(sum, group["lengths"]))
    for key, row in group["rows"].items() if comparable(group["objective"]) else ():
        if "error" in row:
            continue
        norm, expected = ((side["norms"] or [None])[0] for side in (row, group["reference"]))
        by, most = off(row, group["reference"]), allowed(group, precision)
        if not by <= most:  # NaN is no number that passes
            found[key] = f"its losses are off by up to {by:.2g} nats, {most:.2g} are allowed"
        elif None not in (norm, expected) and not abs(norm - expected) <= GRADIENT[precision] * expected:
            found[key] = f"its first gradient's norm is {norm:.4g}, the reference's {expected:.4g}"
        elif group["objective"] == "sft" and row["tokens"] != planned:
            found[key] = f"it read {row['tokens']:,} tokens of {planned:,}"
    return found


def comparable(objective: str) -> bool:
    """Answers that a method draws itself are other ones in every precision."""
    return objective != "reward"


def speed(row: dict, group: dict) -> float:
    """Real tokens a second of the timed steps: of the rows, and what a method reads beyond them."""
    planned = [sum(step) for step in group["lengths"]]
    return row["tokens"] / sum(planned) * sum(planned[WARMUP:]) / sum(row["seconds"][WARMUP:])


def first(row: dict) -> float:
    """Seconds that the steps before the timed ones took beyond as many usual ones: compiling, capturing,
    initialising, a first decomposition. Tuneoff's compiling is in no step's seconds, and added."""
    beyond = sum(row["seconds"][:WARMUP]) - WARMUP * median(row["seconds"][WARMUP:])
    return max(0.0, beyond) + row["compile"]


MEMORY = {"allocated GiB": "allocated", "device GiB": "device"}
HEADS = ("method", "rows x tokens", "contender", "tokens/s", "step ms", *MEMORY, "MFU", "Tuneoff is",
         "first s", "padding", "loss off by", "notes")  # fmt: skip


def about(found: dict) -> list[str]:
    """What was asked, of which machine."""
    ceiling, asked = found["ceiling"], found["asked"]
    rows = f"real rows of {asked['real']}" if asked["real"] else f"fixed rows, learned: {asked['learned']}"
    product = f"{ceiling['flops'] / 1e12:.3g}" if "flops" in ceiling else "unknown"
    return [
        f"{asked['model']}, {asked['precision']}, {rows}; median of {asked['steps']} steps after {WARMUP}; "
        f"{ceiling.get('device')}, torch {ceiling.get('torch')}; TFLOP/s in a large product: {product}",
        "",
    ]


def measured(key: str, group: dict, found: dict) -> str:
    """A contender that was just measured: its numbers, not yet judged, or its error."""
    row, cells = group["rows"][key], []
    if "error" not in row:
        cells = numbers(row, group, found["asked"]["precision"], found["ceiling"], None)
        cells = [f"{head} {cell}" for head, cell in zip(HEADS[3:-1], cells, strict=True) if cell != "–"]
    return f"{group['method']} {group['shape']}, {CONTENDERS[key].label}: {'; '.join([*cells, ended(row)])}"


def ended(row: dict) -> str:
    """Its error, if any, and where the seconds of its process went."""
    ends = ", ".join(f"{name} {seconds:.1f}" for name, seconds in row.get("spent", {}).items())
    return "; ".join(filter(None, [row.get("error"), ends and f"seconds to the end of {ends}"]))


def below(found: dict) -> list[str]:
    """What its columns mean."""
    by = dict.fromkeys(f"{group['method']}: {group['by']}'s" for group in found["groups"])
    share, most = TOLERANCE[found["asked"]["precision"]], f"{MOST:.0%}"
    return [
        "Tuneoff is: its speed over the row's. MFU: of the model's FLOPs, none counted twice, against the "
        f"large product. First s: what the first {WARMUP} steps took beyond as many usual ones, compiling "
        "included. GiB: peaks from building the optimizer to the last step, of live tensors and of the card; "
        "a peer compiles within; a note says where Tuneoff took more to attach or compile. Loss off by: "
        f"at most, in nats, over the first {CHECKED} steps, from the eager fp32 reference ({', '.join(by)}), "
        f"of what is allowed: {share:.1%} of its range; in bf16, twice what plain eager bf16 is off by, "
        f"where that is below {most} of it. On a CPU, memory is what is resident.",
    ]


def rows_of(groups: list[dict], found: dict) -> list[str]:
    """The table, of these groups."""
    lines = [line for g in groups for line in lines_of(g, found["asked"]["precision"], found["ceiling"])]
    return [
        f"| {' | '.join(HEADS)} |",
        "|" + " --- |" * 3 + " ---: |" * (len(HEADS) - 4) + " --- |",
        *(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines),
    ]


def lines_of(group: dict, precision: str, ceiling: dict):
    about, nothing = [group["method"], group["shape"]], ["–"] * (len(HEADS) - 4)
    if error := group["reference"].get("error"):
        yield [*about, "reference", *nothing, error]
        return
    bad, ours = wrongs(group, precision), group["rows"].get("tuneoff", {"error": "not asked for"})
    base = speed(ours, group) if "error" not in ours and "tuneoff" not in bad else None
    for key, row in group["rows"].items():
        cells, note = nothing, row.get("error") or f"**WRONG**: {bad.get(key)}"
        if key not in bad and "error" not in row:
            cells, note = numbers(row, group, precision, ceiling, base), "; ".join(notes(row, group))
        yield [*about, CONTENDERS[key].label, *cells, note]


def numbers(row: dict, group: dict, precision: str, ceiling: dict, base: float | None) -> list[str]:
    timed, work = row["seconds"][WARMUP:], group["flops"]
    known = work and "flops" in ceiling
    held = [row[kind] for kind in MEMORY.values()]
    if not any(held):
        held = [row["resident"], None]
    apart = "not compared"
    if comparable(group["objective"]):
        apart = f"{off(row, group['reference']):.1g} of {allowed(group, precision):.1g}"
    return [
        f"{speed(row, group):,.0f}",
        f"{1000 * median(timed):,.1f}",
        *(f"{size / GIB:.1f}" if size is not None else "–" for size in held),
        f"{sum(work[WARMUP:]) / sum(timed) / ceiling['flops']:.0%}" if known else "–",
        f"{base / speed(row, group):.2f} x" if base else "–",
        f"{first(row):.1f}",
        f"{row['padded'] / (row['padded'] + row['tokens']):.1%}",
        apart,
    ]


def notes(row: dict, group: dict) -> list[str]:
    found = [*row["disturbed"], *([f"{row['kernels']}"] if row["kernels"] else [])]
    for kind, peak in row.get("before", {}).items():
        if None not in (peak, row[kind]) and round(peak / GIB, 1) > round(row[kind] / GIB, 1):
            found.append(f"{kind} up to {peak / GIB:.1f} GiB while it attached or compiled")
    if not comparable(group["objective"]):
        found.append("it trains on answers that it draws")
    if len(row["ends"]) == len(row["seconds"]):
        passed = row["ends"][-1] - row["ends"][WARMUP - 1]
        between = passed / sum(row["seconds"][WARMUP:]) - 1
        found += [f"{between:+.0%} of time between steps"] if between > UNEVEN else []
    return found


if __name__ == "__main__":
    main()
