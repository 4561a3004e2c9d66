"""Which run's model is meant."""

import difflib

from harness.errors import BadRequest, Problem, brief
from harness.plain import listed
from harness.record import RunRecord
from harness.store import MODEL, Store

MERGED = "merged"  # beside the model, as a run saved it, where the merged one is kept


def kept_run(store: Store, text: str) -> RunRecord:
    """The finished run with a saved model that `text` names: its id in `list results`, its folder, or the
    beginning of that up to a dash (lora-s0, lora), where it is one run. Raises BadRequest."""
    records, _ = store.load()
    trained = [record for record in records if record.spec.trains and not record.spec.trial]
    kept = {record.folder: record for record in trained if record.ok}
    meant = [name for name in kept if called(name, text)]
    if len(meant) == 1:
        return with_model(store, kept[meant[0]])
    if meant:
        what = f"{brief(text)} is {len(meant)} runs"
        raise BadRequest(Problem(what, available=tuple(meant), remedy="name one of them"))
    for record in records:
        if called(record.folder, text):
            raise BadRequest(Problem(f"{record.folder} {why_not(record)}", available=tuple(kept)))
    names = [*kept, *dict.fromkeys(record.spec.method for record in kept.values())]
    near = difflib.get_close_matches(text, names, n=1)
    what = f"no finished run {brief(text)} in {store.folder}"
    raise BadRequest(Problem(what, nearest="".join(near), available=tuple(kept)))


def kept_runs(store: Store) -> list[RunRecord]:
    """All finished runs whose saved model is there and whole."""
    trained = [r for r in store.load()[0] if r.ok and r.spec.trains and not r.spec.trial]
    return [r for r in trained if r.sizes.saved_bytes and (store.folder / r.folder / MODEL).is_dir()
            and store.find(r.spec)]  # fmt: skip


def called(name: str, text: str) -> bool:
    return name == text or name.startswith(f"{text}-") or name.endswith(f"-{text}")


def why_not(record: RunRecord) -> str:
    if record.spec.trial:
        return "is a trial of a search, which keeps no model"
    return "was not trained: it is the base model" if record.ok else f"did not end ok ({record.status})"


def with_model(store: Store, record: RunRecord) -> RunRecord:
    folder = store.folder / record.folder / MODEL
    if record.sizes.saved_bytes and folder.is_dir() and store.find(record.spec):
        return record
    said = [warning for warning in record.warnings if "was not saved" in warning]
    what = listed(said) or f"the model of {record.folder} is not in {store.folder}, or not whole"
    raise BadRequest(Problem(what, remedy="the command of the run makes it again, with --force"))
