"""A spec's identity: what must make another run, and what must not. And values against their types."""

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import spec as specs
from harness.record import Form, Output, Point
from harness.shape import WHOLE, Amount, all_fit, misfits
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


NUMBERS = st.sampled_from([0, 1, -1, 0.5, -0.5, 1e18, 1e19, 1e300, WHOLE, WHOLE + 1, -WHOLE - 1, 10**400,
                           True, float("nan"), float("inf"), float("-inf")])  # fmt: skip
VALUES = st.recursive(
    st.none() | NUMBERS | st.sampled_from(["", "a", "b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(st.sampled_from(["a", "step", "loss", 3]), inner, max_size=3)
    ),
    max_leaves=5,
)
KINDS = [
    str, bool, int, float, Any, Amount, Point, int | None, None | Amount, int | str, list, dict, list[int],
    list[list[float]], dict[str, Amount], tuple[int, str], Literal["a", "b"], list[Point],
]  # fmt: skip
GOOD = {
    "id": "a", "part": "p", "prompt": "q", "reference": "r", "output": "o", "stopped": True, "tokens": 3,
    "nll": None, "correct": 0, "margin": None, "sums": {"bleu4": [1, 2.5], "rouge_l": []}, "new_tokens": 7,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_column_fits_where_none_of_its_values_has_a_misfit(kind):
    @given(st.lists(NUMBERS, max_size=2) | st.lists(VALUES, max_size=3))
    def of_any(values):
        assert all_fit(values, kind) == (not any(list(misfits(value, kind)) for value in values)), values

    of_any()


@given(
    st.lists(st.tuples(st.sampled_from([*GOOD, "forms"]), VALUES), max_size=2), st.sampled_from([*GOOD, ""])
)
def test_one_wrong_line_among_many_is_seen(changes, left_out):
    rows = [GOOD, {**GOOD, "nll": 2.0, "margin": 1}, {**GOOD, **dict(changes)}, GOOD]
    rows[2].pop(left_out, None)
    assert all_fit(rows, Output) == (not any(list(misfits(row, Output)) for row in rows)), rows[2]


def test_what_holds_lists_of_tuples_fits_as_its_parts_do():
    form = {"tokens": 1, "learned": 1, "mean_tokens": 1.5, "mean_learned": 1, "special": {"x": 1},
            "pieces": [["a", True, False], ("b", False, True)]}  # fmt: skip
    assert all_fit([form], Form) and not all_fit([{**form, "pieces": [["a", 1, False]]}], Form)
