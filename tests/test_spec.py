"""A spec's identity: what must make another run, and what must not."""

from harness import spec as specs
from harness.spec import Hyperparams, RunSpec, fingerprint


def made(**changes) -> RunSpec:
    asked = {"method": "lora", "seed": 0, "model": "m", "dataset": {"name": "d"}, "hp": Hyperparams()}
    return RunSpec(**{**asked, **changes})


def test_any_change_of_what_is_asked_is_another_run():
    others = [
        made(method="dora"), made(seed=1), made(model="n"), made(dataset={"name": "e"}),
        made(hp=Hyperparams(learning_rate=1e-4)), made(options={"rank": 4}),
        made(fingerprints={"model": "0"}),
    ]  # fmt: skip
    assert len({made().digest, *(other.digest for other in others)}) == len(others) + 1


def test_where_things_lie_is_not_part_of_it():
    assert made(locations={"model": "/a"}).digest == made(locations={"model": "/b"}).digest
    assert "locations" not in made(locations={"model": "/a"}).asked()


def test_a_spec_survives_json():
    import json

    asked = made(options={"rank": 4}).asked()
    assert RunSpec.from_json(json.loads(json.dumps(asked))).digest == made(options={"rank": 4}).digest


def test_training_leaves_the_evaluation_as_it_is_and_a_base_row_belongs_to_it():
    hot = Hyperparams(learning_rate=1.0, max_new_tokens=7)
    base = made(method="base", hp=hot.untrained())
    assert base.evaluation == made(hp=hot).evaluation and not base.trains
    assert made(hp=hot).comparison != made(hp=Hyperparams(max_new_tokens=7)).comparison


def test_a_fingerprint_sees_a_change_at_the_end_of_a_file(tmp_path, monkeypatch):
    file = tmp_path / "weights"
    for whole in (specs.WHOLE_BYTES, 1024):  # hashed whole, then in blocks
        monkeypatch.setattr(specs, "WHOLE_BYTES", whole)
        file.write_bytes(bytes(3 * 2**20))
        before = fingerprint(file)
        file.write_bytes(bytes(3 * 2**20 - 1) + b"1")
        assert fingerprint(file) != before
