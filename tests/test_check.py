"""`run_bench.py check`: two sound methods pass, and each fault planted in one is named by its own check."""

import json
from pathlib import Path

import pytest
import tiny

from harness.cli import main
from harness.contract import CHECKS

ROWS = tiny.rows(16, seed=1)
HP = tiny.hyperparams(max_steps=4)
CARD = '''"""Steer: a trained vector is added to what each layer gives.

    h <- h + scale * v        v: d values a layer, from 0

A stranger 2026, On steering.

Performance: shifts what is said.
Efficiency: d values a layer.
Generalisation: little can overfit.
"""
'''
STEER = (  # forward hooks with parameters of their own
    CARD
    + """
from dataclasses import dataclass
from functools import partial

from harness.method import Method, Unsupported


@dataclass
class Steer(Method):
    scale: float = 0.3

    axis = "parameterisation"
    cannot = {"merging": "no weight of these layers holds a constant"}

    def attach(self, model, run):
        return self.steered(model, restored=0)

    def steered(self, model, restored):
        import torch

        layers, width = model.get_decoder().layers, model.config.hidden_size
        model.requires_grad_(False).steer = torch.nn.ParameterList(torch.zeros(width) for _ in layers)
        model.model.register_forward_pre_hook(lambda *_: setattr(self, "live", True))
        model.model.register_forward_hook(lambda *_: setattr(self, "live", False))
        for i, layer in enumerate(layers):
            layer.register_forward_hook(partial(self.add, model.steer, i))
        return model

    def add(self, steer, i, layer, args, h):
        return h + (self.scale * steer[i]).to(h.dtype)

    def save(self, model, folder):
        from safetensors.torch import save_file

        save_file(model.steer.state_dict(), folder / "steer.safetensors")

    def restore(self, load_base, folder):
        from safetensors.torch import load_file

        model = self.steered(self.load(load_base), restored=1)
        model.steer.load_state_dict(load_file(folder / "steer.safetensors"))
        return model.eval()

    def merge(self, model):
        raise Unsupported(self.cannot["merging"])
"""
)
NORMS = (  # no hook of a model, and saved whole
    CARD
    + """
from dataclasses import dataclass

from harness.method import Method


@dataclass
class Norms(Method):
    axis = "parameterisation"

    def attach(self, model, run):
        for parameter in model.requires_grad_(False).parameters():
            parameter.requires_grad_(parameter.ndim == 1)
        return model
"""
)
COUNTS = """
    def attach(self, model, run):
        self.done = 0
        return super().attach(model, run)

    def optimizer(self, model, run):
        def count(*_):
            self.done += 1

        optimizer = super().optimizer(model, run)
        optimizer.register_step_post_hook(count)
        return optimizer

    def loss(self, model, batch, run):
        return super().loss(model, batch, run) * (1 + 0.1 * self.done)
"""
FAULTS = {  # name -> the method, what is replaced by what (or added), the check that names it, and its words
    "no efficiency": (STEER, ("Efficiency", "Cost"), "card", "lacks `Efficiency:`"),
    "torch on top": (NORMS, ("from harness", "import torch\nfrom harness"), "without_torch", "line 14: "),
    "another start": (STEER, ("torch.zeros", "torch.ones"), "start", "starts_at_base = False"),
    "a start disowned": (STEER, ("    axis", "    starts_at_base = False\n    axis"), "start", "delete"),
    "an embedding that moves": (
        NORMS,
        """
    def optimizer(self, model, run):
        import torch

        optimizer = super().optimizer(model, run)
        optimizer.register_step_post_hook(lambda *_: model.get_input_embeddings().weight.data.mul_(1.01))
        return optimizer
""",
        "frozen",
        "model.embed_tokens.weight",
    ),
    "one vector too many": (STEER, ("for _ in layers)", "for _ in [*layers, 0])"), "moves", "steer.2"),
    "a tensor of its own": (
        STEER,
        ("        for i, layer", "        own = torch.zeros(width, requires_grad=True)\n"
         "        model.model.norm.register_forward_hook(lambda m, a, h: h + own.to(h.dtype))\n"
         "        for i, layer"),
        "inside",
        "(64,)",
    ),
    "kept on the class": (
        NORMS,
        """
    calls = []

    def loss(self, model, batch, run):
        self.calls.append(0)
        return super().loss(model, batch, run) * (1 + 0.001 * len(self.calls))
""",
        "repeats",
        "the loss of step 1 was",
    ),
    "reads twice": (
        NORMS,
        """
    def loss(self, model, batch, run):
        return (super().loss(model, batch, run) + super().loss(model, batch, run)) / 2
""",
        "reads",
        "in step 1 the model was given",
    ),
    "reads unseen": (
        NORMS,
        """
    def loss(self, model, batch, run):
        from harness.training.head import token_logps

        return -token_logps(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()
""",
        "reads",
        "run.token_logps",
    ),
    "a mean over rows": (
        NORMS,
        """
    def loss(self, model, batch, run):
        logps = run.token_logps(model, batch)
        return -(logps.sum(1) / (batch["labels"][:, 1:] != -100).sum(1)).mean()
""",
        "accumulates",
        "mean_over",
    ),
    "a hook that is off while a layer is run again": (
        STEER.replace("layer.register", "layer.mlp.register"),
        (
            "h + (self.scale * steer[i]).to(h.dtype)",
            "h * (1 + self.scale * steer[i]).to(h.dtype) if self.live else h",
        ),
        "recomputes",
        "CheckpointError",
    ),
    "a counter without a state": (NORMS, COUNTS, "continues", "its next loss is"),
    "a state that no file holds": (
        NORMS,
        COUNTS + "\n    def state(self):\n        return {'seen': [{self.done}]}\n",
        "continues",
        "state()['seen'][0] is {3}",
    ),
    "restored without hooks": (
        STEER,
        ("in enumerate(layers)", "in enumerate(layers[:0] if restored else layers)"),
        "saved",
        "hooks included",
    ),
    "pickled": (
        STEER,
        ("        save_file(", "        (folder / 'more.pt').write_text('')\n        save_file("),
        "saved",
        "more.pt",
    ),
    "a merge with hooks": (
        STEER,
        ('        raise Unsupported(self.cannot["merging"])', "        return model"),
        "merged",
        "merge works",
    ),
    "a merge that is not plain": (
        STEER.replace('    cannot = {"merging": "no weight of these layers holds a constant"}\n', ""),
        ('        raise Unsupported(self.cannot["merging"])', "        return model"),
        "merged",
        "still has steer.0, steer.1",
    ),
    "a merge that is refused undeclared": (
        STEER.replace("    cannot = {", "    reasons = {"),
        ("self.cannot", "self.reasons"),
        "merged",
        "declare",
    ),
    "a stream in fp32": (STEER, (").to(h.dtype)", ")"), "computed_in_bf16", ".to(h.dtype)"),
    "restored in other types": (
        STEER,
        ("return model.eval()", "return model.eval().float()"),
        "kept_in_bf16",
        "in bf16 the restored model",
    ),
    "a hook that fails": (
        STEER,
        ("        layers, width", "        model.nothing\n        layers, width"),
        "start",
        "attach fails in ",
    ),
    "an attach without return": (
        NORMS,
        ("        return model", "        return None"),
        "start",
        "attach gave None",
    ),
    "nothing to train": (NORMS, ("parameter.ndim == 1", "False"), "start", "attach left nothing to train"),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    return path


def findings(source: str, folder: Path, base) -> dict:
    """Name of a check -> what it found."""
    file = folder / "own.py"
    file.write_text(source)
    found = tiny.examine("own", base, {}, ROWS, HP, [file])
    names = [check.__name__ for checks in CHECKS.values() for check in checks]
    return dict(zip(names, found, strict=True))


@pytest.mark.parametrize("source", [STEER, NORMS], ids=["steer", "norms"])
def test_a_sound_method_passes_every_check(source, tmp_path, base):
    assert {name: f.says for name, f in findings(source, tmp_path, base).items() if not f.ok} == {}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_by_its_own_check_and_by_no_other(fault, tmp_path, base):
    source, change, check, words = FAULTS[fault]
    if isinstance(change, tuple):
        assert change[0] in source
    faulty = source + change if isinstance(change, str) else source.replace(*change)
    found = findings(faulty, tmp_path, base)
    also = {"continues"} if check == "frozen" else set()  # what is frozen is in no checkpoint
    assert {name: f.says for name, f in found.items() if f.ok is False}.keys() - also == {check}
    assert words in found[check].says


# The command


def check(capsys, *arguments) -> tuple[int, str, str]:
    code = main(["check", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_says_what_holds_and_what_to_change(tmp_path, capsys):
    """On the demo's model and rows; of a stranger's file with a fault."""
    file = tmp_path / "steer.py"
    file.write_text(STEER.replace("Efficiency", "Cost"))
    code, out, _ = check(capsys, file, "--set", "steer.scale=0.5", "hp.batch_size=2")
    lines = out.splitlines()
    assert code == 1
    assert lines[0].startswith("FIX  its card")
    assert "`Efficiency:`" in lines[1]
    assert all(line.startswith("ok   ") for line in lines[2:])
    assert len(lines) == 1 + sum(map(len, CHECKS.values()))
    file.write_text(STEER)
    code, out, _ = check(capsys, file, "--json", "--set", "hp.batch_size=2")
    assert code == 0
    assert [finding["ok"] for finding in json.loads(out)] == [True] * (len(lines) - 1)


def test_what_cannot_be_checked_is_told_as_a_plan_tells_it(tmp_path, capsys):
    file = tmp_path / "steer.py"
    file.write_text(STEER.replace("axis =", "aim = 'speed'\n    axis ="))
    for arguments, words in {
        (tmp_path / "ster.py",): f"did you mean {file}?",
        ("loar",): "unknown method 'loar': did you mean lora?",
        ("base",): "base trains nothing",
        (file,): "aim: must be one of exact_match, bleu4, ",
        ("lora", "--set", "lora.rnk=4"): "unknown option of lora 'rnk': did you mean rank?",
    }.items():
        code, out, err = check(capsys, *arguments)
        assert (code, out) == (2, ""), err
        assert words in err
