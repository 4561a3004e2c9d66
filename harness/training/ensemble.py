"""Ensemble: the finished runs of several methods, with one seed, answer as one.

    outputs:  p(y | x) = softmax( mean_i log p_i(y | x) )        weights:  W = W_0 + mean_i (W_i - W_0)

Wortsman et al. 2022, Model soups: averaging weights of multiple fine-tuned models, arXiv:2203.05482.

Performance: what only one member gets wrong is outvoted, token by token; the loss of averaged outputs is at
most the mean of the members' losses.
Efficiency: nothing is trained once more, but all members were; averaged outputs hold and run all of them for
each token, averaged weights are one model again.
Generalisation: an average follows no single training's accidents; averaged weights help where the members lie
in one basin, as those that start at the same weights often do.
"""

import copy
from pathlib import Path

import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from harness.method import Method, Unsupported, build, find, known_methods, resolve
from harness.record import RunRecord
from harness.spec import ENSEMBLE, WEIGHTS, RunSpec
from harness.store import MODEL, RECORD
from harness.training.head import capped, causal_lm, softcap_of
from harness.training.kernels import decoder_layers


class Ensemble(Method):
    """It trains nothing: loaded, it is whole. `members`: the runs that it is made of, and where each lies."""

    name, trains = ENSEMBLE, False

    def __init__(self, average: str, members: list[tuple[RunSpec, Path]]):
        self.average, self.members = average, members

    def load(self, load_base):
        """Every member at once, each as it was saved."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        models = []
        for spec, folder in self.members:
            cls = resolve(spec.method, find(spec.method, known_methods(spec.locations.get("plugins", []))))
            made = build(cls, spec.options)
            model = made.restore(load_base, folder / MODEL)
            model = made.merge(model) if self.average == WEIGHTS else model
            models.append(model if model.device.type == device else model.to(device))
        return averaged(models) if self.average == WEIGHTS else Together(models)


def outputs_of(members: list[tuple[RunSpec, Path]]) -> list[str | None]:
    """The hash of each member's outputs: with other ones this is another ensemble. Raises Unsupported for a
    member that has no result, or no saved model."""
    found = []
    for spec, folder in members:
        who = f"its member {spec.method}"
        try:
            record = RunRecord.from_json((folder / RECORD).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise Unsupported(f"{who} has no record") from error
        if not record.ok:
            raise Unsupported(f"{who} has no result: {record.status}")
        if not (folder / MODEL).is_dir():
            raise Unsupported(f"{who} has no saved model")
        found.append(record.hashes.get("outputs"))
    return found


def averaged(models: list):
    """-> the first, with the mean of all their weights: the untouched weights and the mean of all changes."""
    first, *others = ({name: p.data for name, p in model.named_parameters()} for model in models)
    shapes = {name: weight.shape for name, weight in first.items()}
    if any({name: weight.shape for name, weight in other.items()} != shapes for other in others):
        raise Unsupported("its members' weights are not of the same names and shapes: nothing to average")
    for name, weight in first.items():
        mean = torch.stack([weight.float(), *(other[name].float() for other in others)]).mean(0)
        weight.copy_(mean)
    return models[0]


class Together(PreTrainedModel, GenerationMixin):
    """A causal model whose logits are the mean of its members' log-probabilities. To the one head, the one
    decoder and generate it is one model: its hidden states are those of all members side by side, its layers
    theirs one behind another, and so is its cache."""

    # Attention is its members' own.
    _supports_sdpa = _supports_flash_attn = _supports_attention_backend = True

    def __init__(self, members: list):
        causals = [causal_lm(member) for member in members]
        super().__init__(joined([causal.config.get_text_config() for causal in causals]))
        self.members = torch.nn.ModuleList(members)
        self.decoder, self.mean = SideBySide(causals, self.config), Mean(causals)
        self.generation_config = causals[0].generation_config
        self.eval()

    def get_decoder(self):
        return self.decoder

    def get_output_embeddings(self):
        return self.mean

    def forward(self, input_ids, past_key_values=None, logits_to_keep=0, **given):
        """(B, T) -> logits (B, T, V); the last `logits_to_keep` places alone, where that is not 0."""
        states = self.decoder(input_ids=input_ids, past_key_values=past_key_values, **given).last_hidden_state
        return CausalLMOutputWithPast(
            logits=self.mean(states[:, -logits_to_keep:]), past_key_values=past_key_values
        )


def joined(configs: list):
    """What a cache is made by: a model of all layers. What bounds logits is each head's own."""
    whole = copy.deepcopy(configs[0])
    whole.num_hidden_layers = sum(config.num_hidden_layers for config in configs)
    if kinds := getattr(whole, "layer_types", None):
        whole.layer_types = list(kinds) * len(configs)
    whole.final_logit_softcapping = None
    return whole


class SideBySide(torch.nn.Module):
    """(B, T) -> (B, T, H of all): what each member's decoder makes of the same tokens."""

    def __init__(self, causals: list, config):
        super().__init__()
        self.config, self.each = config, torch.nn.ModuleList(causal.get_decoder() for causal in causals)
        self.layers = torch.nn.ModuleList(layer for causal in causals for layer in decoder_layers(causal))
        self.reads = tuple({name for decoder in self.each for name in getattr(decoder, "reads", ())})

    def forward(self, past_key_values=None, **given):
        states, start = [], 0
        for decoder in self.each:
            end = start + decoder.config.num_hidden_layers
            own = None if past_key_values is None else Cache(layers=past_key_values.layers[start:end])
            start = end
            others = set(self.reads) - set(getattr(decoder, "reads", ()))
            asked = {name: value for name, value in given.items() if name not in others}
            states.append(decoder(past_key_values=own, **asked).last_hidden_state)
        return BaseModelOutputWithPast(torch.cat(states, -1), past_key_values)


class Mean(torch.nn.Module):
    """(..., H of all) -> (..., V): the mean of the members' log-probabilities, in fp32."""

    def __init__(self, causals: list):
        super().__init__()
        self.heads = torch.nn.ModuleList(causal.get_output_embeddings() for causal in causals)
        self.softcaps = [softcap_of(causal) for causal in causals]

    @property
    def weight(self) -> torch.Tensor:
        """Whose rows are the vocabulary, and whose device is theirs."""
        return self.heads[0].weight

    def forward(self, states):
        own = states.split([head.weight.shape[1] for head in self.heads], -1)
        parts = zip(self.heads, own, self.softcaps, strict=True)
        return sum(capped(head(h), cap).log_softmax(-1) for head, h, cap in parts) / len(self.heads)
