"""What a fine-tuning method is: hooks that a subclass overrides, and how a name becomes one.

A method is one file with one subclass of `Method`; its name is the file's stem. The file's docstring
is its card: `Title: one line`, an indented formula, the paper, and three lines that begin with
`Performance:`, `Efficiency:` and `Generalisation:`. The report prints it.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import chdir, redirect_stdout
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, get_type_hints

from harness import ROOT
from harness.errors import BadRequest, Problems, brief, unknown  # noqa: F401
from harness.record import NAME as RECORDED
from harness.record import Card
from harness.shape import (  # noqa: F401, the kinds of options among them
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Range,
    fitting,
    misfits,
)
from harness.spec import ENSEMBLE, Hyperparams

if TYPE_CHECKING:
    from harness.training import Run

FOLDER = ROOT / "methods"
NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
TAKEN = ("hp", "data", ENSEMBLE)  # the other groups of --set, and what is no one method
AXES = ("none", "parameterisation", "optimizer", "objective", "perturbation")


@dataclass(frozen=True)
class Limit:
    """What a method may be unable to do."""

    # By the hyperparameters and the dataset's spec; some are said alone: nothing asks for them.
    asked: Callable[[Hyperparams, dict], bool] = lambda hp, dataset: False
    remedy: str = ""  # may name {hp.x}


LIMITS = {
    "gradient checkpointing": Limit(
        lambda hp, _: hp.gradient_checkpointing, "--set hp.gradient_checkpointing=false"
    ),
    "accumulation": Limit(
        lambda hp, _: hp.micro_batch_size < hp.batch_size, "--set hp.micro_batch_size={hp.batch_size}"
    ),
    "gradient clipping": Limit(lambda hp, _: hp.max_grad_norm > 0, "--set hp.max_grad_norm=0"),
    "packing": Limit(lambda hp, _: hp.packing, "--set hp.packing=false"),
    "plain text": Limit(
        lambda _, dataset: "text" in {p["format"] for p in dataset["parts"] if not p.get("unseen")},
        "train on rows with prompts",
    ),
    "4-bit base": Limit(),
    "compiling": Limit(),
    "graphs": Limit(),
    "merging": Limit(),
    "several cards": Limit(lambda hp, _: hp.devices > 1, "--set hp.devices=1"),
    "sharding": Limit(lambda hp, _: hp.sharding == "full", "--set hp.sharding=none"),
}


class Unsupported(Exception):
    """This method cannot run here; the text says why and what would help."""


class Method:
    """Full fine-tuning of every parameter; a subclass overrides what it does otherwise.

    A subclass is a dataclass: its fields are the options that `--set name.option=value` sets, each of a
    kind that says which values it may have: Natural (1, 2, ...), Count (0, 1, ...), Positive, NotNegative,
    Fraction (from 0 to below 1), Annotated[float, Range(...)], Literal["a", "b"].
    """

    name: str  # its file's stem, given where it is found
    axis = "none"  # what is varied: one of AXES
    objective = "sft"  # methods with different objectives are never ranked by their loss
    aim = "bleu4"  # the metric that the objective aims at
    mean_over = "tokens"  # what the loss is a mean over: tokens or rows
    title = ""  # in the report; the docstring's unless given
    baseline = "base"  # the row of the same model, untouched, that this method starts from
    starts_at_base = True  # attached, it computes what its baseline does, up to rounding; else it is scored
    trains = True
    needs: tuple[str, ...] = ()  # packages beyond the harness's own
    overrides: dict[str, tuple] = {}  # hyperparameter -> (value, reason): each permitted difference, declared
    cannot: dict[str, str] = {}  # one of LIMITS -> why: refused with it before anything starts, or said
    hybrid: tuple[str, ...] = ()  # names of the methods that this one joins
    # That a search begins with: full fine-tuning's, 2e-5 for 7B models.
    learning_rates: tuple[float, float] = (1e-5, 1e-4)
    tunes: tuple[str, tuple] = ("", ())  # the further option that matters most, and values worth a trial

    def __post_init__(self):
        """Raises ValueError for what the options' kinds cannot say: values that cannot be together."""

    @classmethod
    def own(cls, hp: Hyperparams) -> Hyperparams:
        """The shared hyperparameters with this method's declared differences."""
        return replace(hp, **{name: value for name, (value, _) in cls.overrides.items()})

    def load(self, load_base):
        """-> model. `load_base(**kwargs)` passes its arguments on to `from_pretrained`."""
        return load_base()

    def attach(self, model, run: "Run"):
        """-> the model to train, in which what has requires_grad is trained."""
        return model.requires_grad_(True)

    def prepare(self, model, examples: list, run: "Run") -> list[dict]:
        """-> the micro-batches of a step that was planned with these examples: they themselves, pairs, or
        answers that are drawn here."""
        return [run.collate(part) for part in run.micro_batches(examples)]

    def optimizer(self, model, run: "Run"):
        """-> torch.optim.Optimizer over the trainable parameters (all of them in fp32)."""
        from torch.optim import AdamW

        return AdamW(self.parameter_groups(model, run), fused=True, **adam(run.hp))

    def renewed_every(self) -> int:
        """Steps after which what the first of them does beside the others is done anew, as a subspace that is
        found; 0: never. A forecast, which sees two steps, counts it; of who uses gradients within backward
        these steps are made in Python, where others may be replayed."""
        return 0

    def decays(self, name: str, parameter) -> bool:
        """Whether weight decay reaches a trained parameter: the matrices, not their scales, norms, biases."""
        return parameter.ndim >= 2

    def parameter_groups(self, model, run: "Run") -> list[dict]:
        """The trainable parameters as an optimizer takes them: those that decay, then those that do not."""
        groups = {True: [], False: []}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[self.decays(name, parameter)].append(parameter)
        return [
            {"params": parameters, "weight_decay": run.hp.weight_decay * decays}
            for decays, parameters in groups.items()
            if parameters
        ]

    def loss(self, model, batch: dict, run: "Run"):
        """-> scalar: the mean over the batch's target tokens (or rows, see `mean_over`), by which the
        loop weighs it."""
        return -run.token_logps(model, batch).sum() / (batch["labels"][:, 1:] != -100).sum()

    def state(self) -> dict:
        """What this method itself holds from one step to the next, beside the model, the optimizer and
        run.rng: nested dicts and lists of tensors and JSON values."""
        return {}

    def restore_state(self, state: dict, model, run: "Run") -> None:
        """Takes back what `state` gave, its tensors on the run's device. The model is attached, what trains
        and the optimizer's state are those of that step; what is frozen is as attach has left it."""

    def keep(self, model, run: "Run"):
        """-> the trained model as `save` keeps it, which is the one that is scored. Its weights are back in
        the types that they were loaded in."""
        return model

    def save(self, model, folder: Path) -> None:
        """Writes what was trained into a folder, as safetensors: an adapter as PEFT does, else all
        weights."""
        model.save_pretrained(folder)

    def restore(self, load_base, folder: Path):
        """-> the model that `save` wrote, in evaluation mode: the same outputs again."""
        if (folder / "adapter_config.json").is_file():
            from peft import PeftModel

            return PeftModel.from_pretrained(self.load(load_base), folder).eval()
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()

    def merge(self, model):
        """-> a plain transformers model of the same outputs. Raises Unsupported where that is not
        exact."""
        return model.merge_and_unload() if hasattr(model, "peft_config") else model


def adam(hp: Hyperparams) -> dict:
    """The keyword arguments that all Adam-like optimizers of torch share."""
    return {"lr": hp.learning_rate, "betas": (hp.beta1, hp.beta2), "eps": hp.epsilon}


# From names to methods


def known_methods(plugins: Iterable[str | Path] = ()) -> dict[str, Path | EntryPoint]:
    """Name -> where it is defined, importing nothing. Raises BadRequest for a name defined twice."""
    found: list[tuple[str, Path | EntryPoint]]
    found = [(path.stem, path) for path in sorted(FOLDER.glob("*.py"))]
    found += [(point.name, point) for point in entry_points(group="tuneoff.methods")]
    found += [(Path(path).stem, Path(path)) for path in plugins]
    sources: dict[str, Path | EntryPoint] = {}
    for name, source in found:
        if name == "__init__":
            continue
        if not NAME.fullmatch(name) or name in TAKEN:
            raise BadRequest(
                f"a method's name is up to 64 lower-case letters, digits and _, but not "
                f"{' or '.join(TAKEN)}; {source} has {brief(name)}"
            )
        if name in sources:
            raise BadRequest(f"method {name} is defined twice: in {sources[name]} and in {source}")
        sources[name] = source
    return sources


def find(name: str, sources: dict) -> Path | EntryPoint | None:
    """Where a method is defined; of `family.variant`, where its family is."""
    return sources.get(name) or sources.get(name.partition(".")[0])


def resolve(name: str, source: Path | EntryPoint | None) -> type[Method]:
    """Imports one method. Raises ValueError unless its file is there and defines one subclass of Method.

    `family.variant` is what the family's class makes of it: `variant(name)`, whose `spelling` is its name
    where several would do. What an import prints goes to standard error: a plan may be JSON. Where it goes,
    it goes alone: paths that were typed are of the folder that they were typed in.
    """
    if source is None:
        raise ValueError(f"no method {name}: its file is gone")
    with redirect_stdout(sys.stderr), chdir("."):
        return imported(name, source)


def imported(name: str, source: Path | EntryPoint) -> type[Method]:
    family, dot, variant = name.partition(".")
    if dot:
        cls = imported(family, source)
        if not callable(getattr(cls, "variant", None)):  # it may be an option's name
            raise ValueError(f"{family} has no variants: write {family} alone")
        made = cls.variant(variant)
        return named(made, f"{family}.{getattr(made, 'spelling', variant)}")
    if isinstance(source, EntryPoint):
        loaded = source.load()
        if inspect.isclass(loaded) and issubclass(loaded, Method):
            return named(loaded, name)
        module = loaded
    elif source.parent == FOLDER:
        module = importlib.import_module(f"methods.{name}")
    else:
        spec = importlib.util.spec_from_file_location(f"tuneoff_plugin_{name}", source)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # dataclasses look their module up there
        if (folder := str(source.parent.resolve())) not in sys.path:
            sys.path.append(folder)  # its neighbours are found, and stand for no library's module
        spec.loader.exec_module(module)
    classes = [
        value
        for value in vars(module).values()
        if inspect.isclass(value) and issubclass(value, Method) and value.__module__ == module.__name__
    ]
    if len(classes) != 1:
        raise ValueError(f"{source} defines {len(classes)} subclasses of Method; it must define one")
    return named(classes[0], name)


def named(cls: type[Method], name: str) -> type[Method]:
    if not RECORDED.fullmatch(name):  # it names a folder
        raise ValueError(f"{brief(name)} is no method's name: letters, digits and _ may follow the dot")
    if not is_dataclass(cls) or "__dataclass_fields__" not in vars(cls):
        cls = dataclass(cls)
    cls.name = name
    return cls


def build(cls: type[Method], options: dict) -> Method:
    """The method with its options. Raises BadRequest with each that cannot be."""
    problems, own = Problems(), getattr(cls, "name", cls.__name__)
    hints = get_type_hints(cls, include_extras=True)
    kinds = {option.name: hints[option.name] for option in fields(cls)}
    values = fitting(options, kinds, f"option of {own}", f"{own}.", problems)
    problems.refuse()
    try:
        made = cls(**values)
    except ValueError as error:
        raise BadRequest(f"{own}: {error}") from error
    problems += misfits(asdict(made), dict, f"{own}'s options")
    problems.refuse()
    return made


def options(method: Method) -> dict:
    """As they were chosen; None leaves the choice to the library, and is not asked for."""
    return {name: value for name, value in asdict(method).items() if value is not None}


def card(cls: type[Method]) -> Card:
    """What the method says of itself, as JSON values: its class attributes and its docstring."""
    told = ("name", "axis", "objective", "aim", "baseline", "cannot", "learning_rates", "tunes")
    said = {name: getattr(cls, name) for name in told}
    read = read_card(inspect.getmodule(cls).__doc__ or "")
    return {**said, "hybrid": list(cls.hybrid), **read, "title": cls.title or read["title"]}


def read_card(docstring: str) -> dict:
    """Title, summary, formula, paper and the three-line justification, as the docstring has them."""
    lines = inspect.cleandoc(docstring).splitlines() or [""]
    title, _, summary = lines[0].partition(": ")
    why, formula, paper, label = {}, [], "", None
    for line in lines[1:]:
        start = re.match(r"(Performance|Efficiency|Generalisation): +(.*)", line)
        if start:
            label = start[1].lower()
            why[label] = start[2]
        elif not line.strip():
            label = None
        elif label:
            why[label] += " " + line.strip()
        elif line.startswith("    "):
            formula.append(line[4:])
        elif not paper and re.search(r"\b(19|20)\d\d\b|arXiv", line):
            paper = line.strip().rstrip(".")
    return {
        "title": title, "summary": summary, "formula": "\n".join(formula), "paper": paper, "why": why
    }  # fmt: skip


def summary(source: Path | EntryPoint) -> str:
    """The first line of a method's docstring, importing nothing."""
    if isinstance(source, EntryPoint):
        return f"plugin: {source.value}"
    try:
        tree = ast.parse(source.read_bytes(), filename=source)
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        return f"cannot be read: {error}"
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def variants(name: str, source: Path | EntryPoint) -> list[str]:
    """What can follow the dot of a family's name, where its file says so; no other file is imported."""
    if isinstance(source, EntryPoint) or b"def variants(" not in source.read_bytes():
        return []
    return [f"{name}.{variant}" for variant in resolve(name, source).variants()]


def code_hash(cls: type[Method]) -> str:
    """Of the source files of a method, its parents, and what it takes from other methods: a change
    marks earlier records as stale."""
    taken = [v for v in vars(inspect.getmodule(cls)).values()
             if str(getattr(v, "__module__", "")).startswith("methods.")]  # fmt: skip
    parts = {c for c in cls.__mro__ if c not in (Method, object)}
    parts |= {inspect.unwrap(value) for value in taken if callable(value)}
    texts = sorted({Path(inspect.getsourcefile(part)).read_bytes() for part in parts})
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]
