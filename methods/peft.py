"""PEFT: any adapter of the PEFT library as peft.NAME, with its options: peft.vera, peft.ia3, peft.oft.

    y = f(x; W, theta)        f: the adapter's type (peft.vera, peft.ia3, ...); theta is trained, W is frozen

Mangrulkar et al. 2022, PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods (software).

Performance: from LoRA's down to far below it; most types need a learning rate of their own.
Efficiency: gradients and moments only for the adapter, from some hundred values to some percent of the
weights; rotations and transforms of whole weights cost time that a low-rank product does not.
Generalisation: the base stays frozen, and comes back when the adapter is taken off.
"""

import re
import sys
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from importlib.util import find_spec
from math import gcd
from pathlib import Path
from typing import Any, get_type_hints

from harness.method import Method, Unsupported, unknown

BYPASSED = "acts in PeftModel.forward, which the harness's loss passes by (harness/training/head.py)"
LEFT_OUT = "needs a call that PEFT leaves to the training script"
REFUSED = [  # option, the values that cannot be (None: any), and why
    ("alora_invocation_tokens", None, BYPASSED),
    ("arrow_config", None, "routes between adapters that must have been trained before"),
    ("kasa_config", None, LEFT_OUT),
    ("monteclora_config", None, LEFT_OUT),
    ("init_lora_weights", ("eva", "corda", "lora_ga"), LEFT_OUT),
    ("init_lora_weights", ("loftq",), "fits the adapter without its scale alpha / r (peft#1982)"),
]
REGISTERED = r'register_peft_method\(\s*name="(\w+)"'
DIVISORS = ("block_size", "vector_length", "group_size")  # options that must divide a layer's sizes
SEEDS = ("projection_prng_key", "projection_seed", "proj_seed", "random_loc_seed", "random_seed")
IMPORTANCE = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # AdaLoRA's running means over its parameters
VECTORS = (  # what a weight's change is made of, though held as a vector: it decays
    "fourierft_spectrum", "frod_lambda_s", "S_low", "shira_weight", "supertuning_values", "tinylora_v",
    "unilora_theta_d", "vera_lambda", "waveft_spectrum",
)  # fmt: skip
SPARED = (  # scales, biases, rotations and choices, though held as matrices: they do not
    "beft_bias", "boft_", "hra_u", "ia3_l", "oft_R", "psoft_R", "vblora_logits",
)  # fmt: skip
MIXED = {"4-bit base": "its product with dequantised weights mixes types (PEFT 0.21)"}
WAITS = {"graphs": "its forward reads a number from the device (PEFT 0.21)"}
SCALARS = {bool: bool | None, int: float | None, float: float | None, str: str | None}  # an int may be 0.5
FACTS = {  # class attributes of some variants, found by running each (tests/test_peft.py)
    "adalora": {
        "learning_rates": (5e-4, 5e-3),
        "cannot": {"sharding": "it prunes by whole factors, of which each device would hold a part"},
    },  # above the 1e-4 of PEFT's comparison, where it fell far behind LoRA
    "beft": {"cannot": {"merging": "it adds a bias, and these layers have none to hold it"}},
    "c3a": {"starts_at_base": False},
    "delora": {"cannot": MIXED},
    "fourierft": {
        "starts_at_base": False,
        "learning_rates": (1e-2, 1e-1),
    },  # a value moves little
    "ia3": {"cannot": MIXED, "learning_rates": (1e-3, 1e-2)},  # PEFT's comparison: 5e-3
    "lily": {"cannot": {"merging": "what it adds to a weight depends on the input"}},
    "loha": {"cannot": MIXED | WAITS},
    "lokr": {"cannot": WAITS},
    "randlora": {"cannot": MIXED},
    "unilora": {"starts_at_base": False},
    "vblora": {"starts_at_base": False, "cannot": WAITS},
    "vera": {"learning_rates": (1e-3, 1e-2)},  # ten to a hundred times LoRA's
}


@dataclass
class Peft(Method):
    """A variant's options are the fields of PEFT's configuration; None is PEFT's own default, but for
    `defaults` and `schedule` below: every linear layer is adapted (IA3's paper: keys, values and
    down-projections), as PEFT's defaults know some architectures only. What a type draws by a seed
    of its own (VeRA's projections, FourierFT's places) it draws by the run's."""

    axis = "parameterisation"
    learning_rates = (1e-4, 1e-3)  # LoRA's, where FACTS has no other
    kind = ""  # PEFT's own name of the type

    @classmethod
    def variants(cls) -> list[str]:
        """What has no `refusal`, as the installed PEFT's files tell it: to import it takes seconds."""
        package = find_spec("peft")
        folders = Path(package.origin).parent.glob("tuners/*/") if package and package.origin else ()
        files = ([folder / f"{name}.py" for name in ("__init__", "config", "model")] for folder in folders)
        texts = ([file.read_text("utf-8") if file.is_file() else "" for file in each] for each in files)
        named = ((re.search(REGISTERED, registered), *rest) for registered, *rest in texts)
        return sorted(found[1].replace("_", "") for found, *rest in named if found and measurable(*rest))

    @classmethod
    @cache
    def variant(cls, name: str) -> type[Method]:
        """The method of one type of adapter. Raises ValueError for one that cannot be measured."""
        name = name.replace("_", "").lower()  # prompt_tuning and PROMPT_TUNING are PEFT's own spellings
        if name not in kinds():
            raise ValueError(unknown("PEFT type", name, cls.variants()))
        kind = kinds()[name]
        if reason := refusal(kind):
            raise ValueError(f"peft.{name} {reason}")
        config = config_class(kind)
        title = config.__name__.removesuffix("Config")
        title = re.sub("(?i)(lo|ve|hi)ra$", lambda match: match[1].title() + "RA", title)
        facts = {"kind": kind, "spelling": name, "title": f"{title} (PEFT)", "__module__": __name__}
        facts |= FACTS.get(name, {})
        hints = get_type_hints(config)
        options = [(o, SCALARS.get(hints[o], Any), field(default=None)) for o in options_of(config)]
        return make_dataclass(title, options, bases=(cls,), namespace=facts)

    def __post_init__(self):
        if not self.kind:
            available = ", ".join(self.variants() or kinds())
            raise ValueError(f"name a type, as in peft.vera. Available: {available}")
        if any(value is False and name.startswith("init_") for name, value in self.chosen().items()):
            self.starts_at_base = False
        for option, values, reason in REFUSED:
            value = self.chosen().get(option)
            if value is not None and (values is None or str(value).startswith(values)):
                raise ValueError(f"{option}={value} {reason}")
        if not getattr(self, "token_indices", True):
            raise ValueError("token_indices: a list of the ids of the tokens to train")
        try:
            config = self.config(target_modules="all-linear", total_step=sys.maxsize)
        except Exception as error:  # PEFT raises what it likes
            raise ValueError(str(error)) from error
        if getattr(config, "init_r", sys.maxsize) <= getattr(config, "target_r", 0):
            raise ValueError("init_r must be above target_r: ranks are pruned from the one to the other")

    def chosen(self) -> dict:
        chosen = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        if chosen.get("r") and hasattr(self, "oft_block_size"):  # OFT takes the one or the other
            chosen.setdefault("oft_block_size", 0)
        return chosen

    def config(self, **defaults):
        """PEFT's configuration, from defaults and the user's options."""
        cls = config_class(self.kind)
        known = {f.name for f in fields(cls)}
        defaults = {name: value for name, value in defaults.items() if name in known}
        return cls(task_type="CAUSAL_LM", **{**defaults, **self.chosen()})

    def attach(self, model, run):
        from peft import get_peft_model

        try:
            config = self.config(
                **self.defaults(model, run), **schedule(run.steps), **dict.fromkeys(SEEDS, run.seed)
            )
            adapted = get_peft_model(model, config)
            for name, parameter in adapted.named_parameters():
                if ".ranknum." in name:  # AdaLoRA's, which PEFT 0.21 trains once it was moved or cast
                    parameter.requires_grad_(False)
        except ValueError as error:
            raise Unsupported(f"PEFT's {self.kind} does not fit this model or training: {error}") from error
        if not self.starts_at_base:
            run.note("start", "drawn at random by PEFT, not the base model")
        if weight := getattr(config, "orth_reg_weight", 0):
            run.note("weight of the orthogonality term in the training loss", weight)
        return adapted

    def defaults(self, model, run) -> dict:
        """What PEFT leaves open, or fixes so that it does not fit every model."""
        from torch import nn

        head = model.get_output_embeddings()
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
        sizes = [size for m in linear.values() for size in (m.in_features, m.out_features)]
        options = {f.name: f.default for f in fields(config_class(self.kind))}
        found = {"target_modules": "all-linear"}
        if self.kind == "LN_TUNING":
            norms = [n for n, m in model.named_modules() if type(m).__name__.endswith("Norm")]
            found["target_modules"] = last_names(norms)
        elif self.kind == "TRAINABLE_TOKENS":  # PEFT finds the embeddings
            del found["target_modules"]
        elif "feedforward_modules" in options:  # IA3: these by their inputs, the others by their outputs
            targets = self.target_modules or last_names(linear)
            inner = getattr(model.config.get_text_config(), "intermediate_size", None)
            down = last_names(n for n, m in linear.items() if m.in_features == inner)
            listed = isinstance(targets, list)
            found["target_modules"] = targets
            found["feedforward_modules"] = [n for n in down if n in targets] if listed else down
        for option in DIVISORS:
            if option in options and getattr(self, option) is None:
                found[option] = gcd(options[option], *sizes)
                run.note(option, found[option])
        return found

    def decays(self, name, parameter):
        if any(part in name for part in VECTORS + SPARED):
            return any(part in name for part in VECTORS)
        return super().decays(name, parameter)

    def optimizer(self, model, run):
        made = super().optimizer(model, run)
        self.adalora = model.base_model if hasattr(model.base_model, "update_and_allocate") else None
        if self.adalora:  # it prunes ranks by their gradients
            self.done = 0
            made.register_step_post_hook(self.prune)
        return made

    def prune(self, *_) -> None:
        self.done += 1  # from 1: the last pruning is due when total_step steps are done
        self.adalora.update_and_allocate(self.done)

    def state(self):
        if not self.adalora:
            return {}
        allocator, config = self.adalora.rankallocator, self.adalora.peft_config["default"]
        running = {name: getattr(allocator, name) for name in IMPORTANCE}
        return {"done": self.done, "rank_pattern": config.rank_pattern, **running}

    def restore_state(self, state, model, run):
        if self.adalora:
            self.done, self.adalora.peft_config["default"].rank_pattern = state["done"], state["rank_pattern"]
            vars(self.adalora.rankallocator).update({name: state[name] for name in IMPORTANCE})

    def loss(self, model, batch, run):
        loss = super().loss(model, batch, run)
        weight = getattr(model.peft_config["default"], "orth_reg_weight", 0)
        return loss + weight * non_orthogonality(model) if weight else loss

    def merge(self, model):
        if "merging" in self.cannot:
            raise Unsupported(self.cannot["merging"])
        return super().merge(model)


def kinds() -> dict[str, str]:
    """Our name -> PEFT's, of every type of adapter that the installed PEFT has."""
    try:
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise ValueError(f"the names and options of peft.* come from the peft package: {error}") from error
    return {kind.value.replace("_", "").lower(): kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING}


def measurable(config: str, model: str) -> bool:
    """What `refusal` asks of classes, of the sources of a type's configuration and of its model."""
    tuner = re.search(r"^class \w+\((\w+Tuner|\w+Model)\):.*?(?=^\S|\Z)", model, re.M | re.S)
    forward = tuner and "\n    def forward(" in tuner[0] and "orth_reg_weight" not in config
    return bool(tuner) and not forward and not re.search(r"\(Prompt\w+Config\)", config)


def config_class(kind: str) -> type:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    return PEFT_TYPE_TO_CONFIG_MAPPING[kind]


def options_of(config: type) -> list[str]:
    """The fields of the type itself: not what every adapter's file says of it, nor what a run decides."""
    from peft import PeftConfig

    theirs = {f.name for f in fields(PeftConfig)} | {"total_step"}
    return [f.name for f in fields(config) if f.name not in theirs]


def refusal(kind: str) -> str | None:
    """Why a type would be measured wrongly here, or not at all."""
    from peft import PromptLearningConfig
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.tuners.tuners_utils import BaseTuner

    tuner, config = PEFT_TYPE_TO_TUNER_MAPPING[kind], config_class(kind)
    if issubclass(config, PromptLearningConfig):
        return f"prepends trained tokens: it {BYPASSED}"
    if not issubclass(tuner, BaseTuner):
        return "rebuilds the attention of a few architectures alone, and has no default for its length"
    if "forward" in vars(tuner) and "orth_reg_weight" not in config.__dataclass_fields__:
        return BYPASSED  # but for AdaLoRA, which only adds the term that `loss` adds here
    return None


def schedule(steps: int) -> dict:
    """AdaLoRA's phases: ranks are kept, pruned to the budget, then trained on. Its authors' scripts
    spend 8 to 15 % of the steps before the pruning and 31 to 58 % after; PEFT's default is none."""
    return {"total_step": steps, "tinit": steps // 10, "tfinal": 3 * steps // 10}


def non_orthogonality(model):
    """AdaLoRA's mean of ||A A^T - I|| and ||B^T B - I||, which PEFT adds in its own forward alone."""
    import torch

    norms = []
    with torch.autocast(model.device.type, enabled=False):  # a small difference, lost in 16 bits
        for name, p in model.named_parameters():
            if "lora_A" in name or "lora_B" in name:
                gram = p @ p.T if "lora_A" in name else p.T @ p
                norms.append(torch.linalg.norm(gram - torch.eye(len(gram), device=p.device)))
    return torch.stack(norms).mean()


def last_names(names) -> list[str]:
    return sorted({name.rpartition(".")[2] for name in names})
