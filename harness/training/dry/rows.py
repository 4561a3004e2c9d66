"""The rows of a forecast: the dataset's own, where they lie here, else rows as long as may be."""

from array import array

from harness.data import Example
from harness.spec import RunSpec

MOST = 50_000  # made-up rows of a split


def rows_of(spec: RunSpec) -> tuple[dict[str, list[Example]], bool]:
    """-> the examples of each split, and whether these are the dataset's own."""
    sources = spec.locations.get("sources", {})
    if len(sources) == len(spec.dataset["parts"]):
        try:
            return own(spec, sources), True
        except Exception:  # a tokenizer that is not here, rows that the run itself will refuse
            pass
    hp = spec.own_hp
    parts = len([part for part in spec.dataset["parts"] if not part.get("unseen")]) or 1
    row = longest(hp.max_length)
    counts = {split: min(MOST, spec.dataset[split] * parts) for split in ("train", "validation", "test")}
    return {split: [row] * count for split, count in counts.items()}, False


def own(spec: RunSpec, sources: dict) -> dict[str, list[Example]]:
    from harness.data import Template, token_rows
    from harness.training.model import load_tokenizer

    dataset: dict = dict(spec.dataset)
    template = Template(load_tokenizer(spec), dataset["template"], dataset.get("loss", "all"))
    return token_rows(dataset, sources, template, spec.own_hp.max_length).rows


def longest(length: int) -> Example:
    """A third of it prompt."""
    prompt = max(1, length // 3)
    return Example("made-up", "", "", "", array("i", [1] * prompt), array("i", [1] * (length - prompt)))
