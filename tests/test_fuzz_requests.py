"""Requests that nobody would write by hand: mutated presets, dataset specs and argument lists.

None may end in a traceback or take long. Each is refused, or planned as it says: every value of an accepted
request stands in its specs, which a reading of the request by other code than the plan's decides.
`TUNEOFF_FUZZ=10000` tries as many of each kind; the seed is fixed.
"""

import copy
import datetime
import io
import json
import os
import signal
import tomllib
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import harness.plan
from harness import cli
from harness.data import FORMATS, load_spec
from harness.errors import BadRequest
from harness.plan import Request, plan
from harness.spec import Hyperparams

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = int(os.environ.get("TUNEOFF_FUZZ", 300))
SECONDS = 60  # for one request; each takes a twentieth of one
fuzzed = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
ROWS = [{"q": f"What is {n} times {n}?", "a": f"It is {n * n}, I think."} for n in range(40)]
SPEC = {
    "title": "squares", "train": 12, "validation": 2, "test": 4, "language": "en", "loss": "last",
    "template": "instruction", "seed": 3, "reward": "exact",
    "parts": [
        {"name": "squares", "path": "rows.jsonl", "format": "instruction", "licence": "CC0", "split": "train",
         "fields": {"instruction": "q", "output": "a"}, "mapping": "q asks, a answers", "config": ""},
    ],
}  # fmt: skip
PRESET = {
    "title": "small", "model": "demo/model", "dataset": "squares.toml", "methods": ["lora", "galore"],
    "seeds": [0, 1], "hp": {"learning_rate": 2e-3, "batch_size": 4, "precision": "fp32", "packing": False},
    "data": {"train": 10, "loss": "all"},
    "options": {"lora": {"rank": 4, "alpha": 8.0, "targets": "q_proj"}, "dora": {"rank": 2}},
}  # fmt: skip
ARGUMENTS = [
    ["plan", "--json", "--methods", "lora", "galore", "--seeds", "0", "1", "--set", "hp.epochs=2",
     "lora.rank=4"],
    ["plan", "--json", "--preset", "small.toml", "--set", "data.train=8", "--results", "here",
     "--reports", "there"],
    ["plan", "--json", "--model", "demo/model", "--dataset", "own.jsonl", "--methods", "full", "--set",
     "data.train=5", "data.test=2", "data.validation=0", "--source", "own=own.jsonl"],
    ["plan", "--json", "--model", "random:demo/model", "--dataset", "squares.toml", "--methods", "bitfit",
     "--plugins", "bitfit.py", "--seeds", "7", "--source", "squares=rows.jsonl"],
    ["list", "methods", "--plugins", "bitfit.py"],
    ["list", "--json"],
    ["list", "results", "--results", "here"],
    ["report", "--results", "here", "--reports", "there", "--format", "md"],
]  # fmt: skip
OPTIONS = (
    "--methods", "--preset", "--model", "--dataset", "--source", "--seeds", "--set", "--plugins", "--force",
    "--results", "--reports", "--json",
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from([
        True, False, 0, 1, -1, 2, 2**31, 2**63, 10**400, 0.5, -0.0, 1e300, float("nan"), float("inf"), "",
        " ", "x", "a" * 5000, "../x", "/dev/null", "\0", "lora", "demo", "auto", "3", "true", [], [1],
        ["lora"], [[]], ["lora", "lora"], [0, 0], [True], [2**70], [0.0], {}, {"a": 1}, {"lora": 1},
        {"lora": {"rank": "2"}}, datetime.date(2020, 1, 1), "squares.toml", "own.jsonl", "~", "ü",
        "mixture",
    ]),
    st.integers(-3, 20), st.floats(), st.text(st.characters(exclude_categories=["Cs"]), max_size=6),
)  # fmt: skip
KEYS = st.sampled_from([
    "rank", "alpha", "lora", "galore", "hp", "data", "options", "seeds", "method", "methods", "models",
    "trian", "part", "parts", "mixture", "name", "hub", "fields", "instruction", "input", "format",
    "epochs", "max_steps", "micro_batch_size", "warmup_ratio", "test_split", "revision", "notice",
    "reward", "x", "", "a b", "peft.ia3",
])  # fmt: skip
JUNK = st.sampled_from([
    "", " ", "-", "--", "=", ".", "..", "../x", "./does-not-exist", "~/x", "/dev/null", "a/b", "a/b/c",
    "a" * 5000, "\udcff", "\0", "\x1b[31m", "\n", "ü", "-1", "0", "1", "1e3", str(2**32), str(2**70),
    "9" * 5000, "nan", "demo", "lora", "LoRA", "qlora", "peft", "peft.", "base", "own.jsonl", "small.toml",
    "squares.toml", "bitfit.py", "hp.epochs=nan", "hp.epochs=1e300", "hp.max_length=8", "hp.batch_size=2",
    "hp=1", "hp.=1", "lora.rank=[1", "lora.alpha=nan", "lora.alpha=3", "data.reward=[1]", "data.train=6",
    "lora.targets='q_proj'", "x.y=1", "data.train=1\nb=2", "own=own.jsonl", "own=x",
    "lora.rank=" + "[" * 3000, "hp.seed=1", "--force", "--json", "--seeds", "--set", "--methods",
    "--model", "--meth", "--plugins", "--source", "--results", "--rows",
])  # fmt: skip


class Hung(BaseException):
    """Of no kind that the code under test catches."""


@contextmanager
def limited():
    def stop(*_):
        raise Hung

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """Where the requests are made: rows, a spec, a preset and a plugin that are right."""
    place = tmp_path_factory.mktemp("requests")
    before = Path.cwd()
    os.chdir(place)
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    own = [{"instruction": row["q"], "output": row["a"]} for row in ROWS]
    Path("own.jsonl").write_text("\n".join(map(json.dumps, own)))
    Path("squares.toml").write_text(toml(SPEC))
    Path("small.toml").write_text(toml(PRESET))
    readme = (ROOT / "README.md").read_text()
    bitfit = next(code.split("```")[0] for code in readme.split("```python\n") if "class BitFit" in code)
    Path("bitfit.py").write_text(bitfit)
    Path("a").write_text("a file where a folder would stand")
    yield place
    os.chdir(before)


def toml(value, top: bool = True) -> str:
    if isinstance(value, dict):
        pairs = [f"{toml(key, False)} = {toml(item, False)}" for key, item in value.items()]
        return "\n".join(pairs) + "\n" if top else "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(toml(item, False) for item in value) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


def places(value, found=None) -> list[tuple]:
    """Every (container, key) of a tree."""
    found = [] if found is None else found
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found.append((value, key))
        places(item, found)
    return found


@st.composite
def mutated(draw, original: dict) -> str:
    """A TOML file with one to three faults, in its tree or in its letters."""
    tree = copy.deepcopy(original)
    for _ in range(draw(st.integers(1, 3))):
        container, key = draw(st.sampled_from(places(tree) or [(tree, "x")]))
        what = draw(st.sampled_from(["value", "value", "delete", "rename", "add", "copy"]))
        if what == "value":
            container[key] = copy.deepcopy(draw(VALUES))
        elif what == "copy":
            other, place = draw(st.sampled_from(places(tree) or [({"x": 1}, "x")]))
            container[key] = copy.deepcopy(other[place])
        elif what == "delete" or isinstance(container, list):
            del container[key]
        else:
            container[draw(KEYS)] = container.pop(key) if what == "rename" else copy.deepcopy(draw(VALUES))
    text = toml(tree)
    if draw(st.integers(0, 4)) == 0:
        start = draw(st.integers(0, len(text)))
        end = start + draw(st.integers(0, 5))
        text = text[:start] + draw(st.text(max_size=3).filter(str.isprintable)) + text[end:]
    return text


@st.composite
def arguments(draw) -> list[str]:
    """An argument list with one to three faults; its command is left, as some of them start runs."""
    command, *rest = draw(st.sampled_from(ARGUMENTS))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(rest) - 1)))
        what = draw(
            st.sampled_from([*["option"] * 6, "replace", "insert", "delete", "double", "letter", "swap"])
        )
        if what == "option":
            value = draw(JUNK)
            option = draw(st.sampled_from(OPTIONS))
            rest += [f"{option}={value}"] if draw(st.booleans()) else [option, value]
        elif what == "insert" or not rest:
            rest.insert(at, draw(JUNK))
        elif what == "replace":
            rest[at] = draw(JUNK)
        elif what == "delete":
            del rest[at]
        elif what == "double":
            rest.insert(draw(st.integers(0, len(rest))), rest[at])
        elif what == "swap":
            other = draw(st.integers(0, len(rest) - 1))
            rest[at], rest[other] = rest[other], rest[at]
        else:
            cut = draw(st.integers(0, len(rest[at])))
            letter = draw(st.sampled_from(["", "x", "=", ".", "1", "-", "/"]))
            rest[at] = rest[at][:cut] + letter + rest[at][cut + draw(st.integers(0, 1)) :]
    return [command, *rest]


# The oracle: what a request says, read without the plan's own code


def same(asked, planned, number: bool = False) -> bool:
    """Equal and of one type; a whole number may stand for a decimal one."""
    if number and type(planned) is float and type(asked) is int:
        return asked == planned
    return type(asked) is type(planned) and asked == planned


def holds(specs, hp: dict, values: dict, options: dict, methods=None, seeds=None) -> None:
    """Every value stands in the specs."""
    trained = [spec for spec in specs if spec.hp.epochs > 0]
    kinds = {f.name: f.default for f in fields(Hyperparams)}
    for spec in trained:
        for name, value in hp.items():
            assert name in kinds
            if name == "micro_batch_size" and value > spec.hp.batch_size:
                value = spec.hp.batch_size
            assert same(value, getattr(spec.hp, name), isinstance(kinds[name], float)), name
    for spec in specs:
        for name, value in values.items():
            assert same(value, spec.dataset[name]), name
        for name, value in options.get(spec.method, {}).items():
            assert same(value, spec.options[name], True), name
    if methods is not None:
        assert set(methods) <= {spec.method for spec in specs} <= {*methods, "base", "base_nf4"}
        assert len(set(methods)) == len(methods)
        known = {path.stem for path in (ROOT / "methods").glob("*.py")} | {"bitfit"}
        assert {name.partition(".")[0] for name in options} <= known
    if seeds is not None:
        assert all(type(seed) is int and 0 <= seed < 2**32 for seed in seeds)
        assert len(seeds) == len(set(seeds))
        assert {spec.seed for spec in trained} == (set(seeds) if trained else set())


def test_the_oracle_finds_a_value_that_was_lost():
    specs = plan(Request(preset="small.toml"))
    holds(specs, PRESET["hp"], PRESET["data"], PRESET["options"], PRESET["methods"], PRESET["seeds"])
    for lost in ({"hp": {"epochs": 2}}, {"values": {"train": 11}}, {"options": {"lora": {"rank": 8}}},
                 {"methods": ["lora"]}, {"seeds": [0]}, {"hp": {"packing": 0}}):  # fmt: skip
        with pytest.raises(AssertionError):
            holds(specs, **{"hp": {}, "values": {}, "options": {}, **lost})


@fuzzed
@given(mutated(PRESET))
def test_a_mutated_preset_is_refused_or_planned_as_it_says(text):
    Path("preset.toml").write_text(text, encoding="utf-8")
    try:
        with limited():
            specs = plan(Request(preset="preset.toml"))
    except BadRequest as error:
        assert error.problems and all(str(problem).strip() for problem in error.problems)
        return
    asked = tomllib.loads(text)
    assert set(asked) <= set(PRESET)
    assert specs[0].model == asked["model"] and specs[0].dataset["name"] in asked["dataset"]
    holds(specs, asked.get("hp", {}), asked.get("data", {}), asked.get("options", {}), asked["methods"],
          asked.get("seeds", [0, 1, 2]))  # fmt: skip


@fuzzed
@given(mutated(SPEC))
def test_a_mutated_dataset_spec_is_refused_or_read_as_it_says(text):
    Path("spec.toml").write_text(text, encoding="utf-8")
    asking = Request(dataset="spec.toml", model="demo/model", methods=["full"], seeds=[0])
    try:
        with limited():
            found = plan(asking)[0].dataset
    except BadRequest as error:
        assert error.problems and all(str(problem).strip() for problem in error.problems)
        return
    asked = tomllib.loads(text)
    parts = asked.pop("parts", []) + ([asked.pop("part")] if "part" in asked else [])
    mixed = asked.pop("mixture", [])
    for key, value in asked.items():
        assert same(value, found[key]), key
    for part, read in zip(parts, found["parts"], strict=False):
        for key, value in part.items():
            assert same(value, read[key]), key
        assert all(same(column, read["fields"][field]) for field, column in part.get("fields", {}).items())
        assert set(part.get("fields", {})) <= set(FORMATS[read["format"]])
    more = [load_spec(name, {})["parts"] for name in mixed]
    assert len(found["parts"]) == len(parts) + sum(map(len, more))


@fuzzed
@given(arguments())
def test_a_mutated_argument_list_is_refused_or_planned_as_it_says(typed):
    out, errors, planned = io.StringIO(), io.StringIO(), []

    def watched(request, keep):
        found = plan(request, keep)
        planned.extend(found)
        return found

    harness.plan.plan = watched
    try:
        with limited(), redirect_stdout(out), redirect_stderr(errors):
            status = cli.main(typed)
    except SystemExit as ended:  # argparse's own
        status = ended.code
    finally:
        harness.plan.plan = plan
    assert status in (cli.OK, cli.BAD_REQUEST), errors.getvalue()
    assert "Traceback" not in errors.getvalue()
    assert status == cli.OK or errors.getvalue().strip()
    if status == cli.OK and typed[0] == "plan" and planned and "--json" in typed:
        assert [row["run"] for row in json.loads(out.getvalue())] == [spec.folder for spec in planned]
    if status == cli.OK and planned:
        said = read_arguments(typed[1:])
        groups: dict[str, dict] = {}
        for setting in said.get("--set", []):
            key, _, value = setting.partition("=")
            group, _, name = key.strip().rpartition(".")
            try:
                read = tomllib.loads(f"value = {value}")
                value = read["value"] if len(read) == 1 else value
            except (ValueError, RecursionError):
                pass
            assert same(groups.setdefault(group, {}).setdefault(name, value), value), setting
        seeds = [int(seed) for seed in said["--seeds"]] if "--seeds" in said else None
        holds(planned, groups.pop("hp", {}), groups.pop("data", {}), groups, said.get("--methods"), seeds)
        for option in ("--preset", "--model", "--dataset", "--results", "--reports"):
            assert len(said.get(option, ["one"])) == 1, option
        assert all(planned[0].model == name for name in said.get("--model", []))


def read_arguments(typed: list[str]) -> dict[str, list[str]]:
    """Option -> everything that was given with it, however often."""
    found: dict[str, list[str]] = {}
    current = None
    for text in typed:
        if text.startswith("--"):
            name, equals, value = text.partition("=")
            current = next(option for option in OPTIONS if option.startswith(name))  # may be abbreviated
            found.setdefault(current, []).extend([value] * bool(equals))
        else:
            found[current].append(text)
    return found
