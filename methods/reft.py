"""LoReFT: trained edits of the residual stream at a prompt's first and last tokens, in a low-rank subspace.

    h <- h + R^T (W h + b - R h)        at a prompt's first and last tokens, after each decoder layer
    R: rank x d, orthonormal rows; W: rank x d; b: rank; the model is frozen

Wu et al. 2024, ReFT: Representation Finetuning for Language Models, arXiv:2404.03592.

Performance: in the authors' tables ahead of LoRA on commonsense and instructions, behind it on arithmetic, at
a learning rate of 9e-4 and over several epochs. It does not start at the base model: its edits start random.
Efficiency: (2 d + 1) rank trained values a layer and no work in a decoding step; backward still crosses every
layer above the lowest edited one, and as nothing can be merged, reading a prompt stays a little slower.
Generalisation: all that was learned passes through a few tokens, of which a chat template's own take some;
the base stays as it was, and the edits can be taken off again.
"""

import json
from dataclasses import asdict, dataclass
from functools import cache, partial

from harness.method import Count, Fraction, Method, Natural, Unsupported

WEIGHTS, OPTIONS = "interventions.safetensors", "interventions.json"


@dataclass
class LoReFT(Method):
    """As the authors' code, but for three things: R is held by its r x d coordinates alone, without a d x d
    matrix beside them (276 MB for Gemma 3 1B, untied); these never decay; and W computes in fp32, as R does.
    """

    rank: Natural = 8  # of the edited subspace; the authors' for reasoning, 4 for instructions
    layers: str = "all"  # or indices from 0 with commas between: 3,9,18
    first: Count = 7  # tokens edited at the prompt's start, half of it at most; the authors' f7+l7
    last: Count = 7  # and at its end
    tied: bool = True  # one edit a layer for both ends, as the authors' for reasoning; false: one each
    dropout: Fraction = 0.0  # share of an edited state's values left out while training

    axis = "parameterisation"
    learning_rates = (3e-4, 3e-3)  # around the authors' 9e-4
    tunes = ("rank", (8, 16, 32, 64))  # the authors' own choices
    starts_at_base = False
    cannot = {
        "packing": "a packed sequence has no one prompt with a first and a last token",
        "plain text": "it edits the ends of a prompt, and a text has none: nothing would be trained",
        "merging": "it edits some tokens only: no weights do that for a token by its place in the prompt",
    }

    def __post_init__(self):
        if self.first == self.last == 0:
            raise ValueError("first and last are both 0: nothing would be edited")
        indices = self.layers.split(",")
        if self.layers != "all" and not all(i.strip().isdecimal() for i in indices):
            raise ValueError(f'layers must be "all" or indices like 3,9,18, not {self.layers!r}')

    def attach(self, model, run):
        return self.intervene(model)

    def intervene(self, causal):
        """-> the model with its edits as `causal.reft`, which find their places in each forward."""
        from torch import nn

        causal.requires_grad_(False)
        width = causal.config.get_text_config().hidden_size
        if self.rank > width:
            raise ValueError(f"rank is {self.rank}, but this model's states have {width} values")
        groups = 1 if self.tied or not (self.first and self.last) else 2
        causal.reft = nn.ModuleDict()
        causal.reft.places = []  # of the forward's edited tokens, for each group; kept for a recomputation
        decoder = causal.get_decoder()
        decoder.reads = ("prompt_lengths",)  # of a batch, where a prompt and its answer are read together
        decoder.register_forward_pre_hook(partial(locate, self, causal), with_kwargs=True)
        for index, block in self.chosen(blocks(causal)).items():
            # Made on the CPU: the same start for a seed on every device.
            edits = nn.ModuleList([intervention()(width, self.rank, self.dropout) for _ in range(groups)])
            causal.reft[str(index)] = edits.to(next(block.parameters()).device)
            block.register_forward_hook(partial(edit, causal.reft, str(index)))
        return causal

    def chosen(self, blocks) -> dict:
        """Index -> block, of the layers that are edited."""
        if self.layers == "all":
            return dict(enumerate(blocks))
        indices = sorted({int(i) for i in self.layers.split(",")})
        if indices[-1] >= len(blocks):
            raise ValueError(f"layers: {indices[-1]} is none of this model's, 0 to {len(blocks) - 1}")
        return {i: blocks[i] for i in indices}

    def decays(self, name, parameter):
        """W alone: R's coordinates hold ones on a diagonal, and any less of them makes R zero."""
        return name.endswith("source.weight")

    def save(self, model, folder):
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in model.reft.state_dict().items()}
        save_file(weights, folder / WEIGHTS)
        (folder / OPTIONS).write_text(json.dumps(asdict(self), indent=2) + "\n", "utf-8")

    def restore(self, load_base, folder):
        from safetensors.torch import load_file

        saved = type(self)(**json.loads((folder / OPTIONS).read_text("utf-8")))
        model = saved.intervene(saved.load(load_base))
        model.reft.load_state_dict(load_file(folder / WEIGHTS))
        return model.eval()

    def merge(self, model):
        raise Unsupported(f"{self.cannot['merging']}. Keep the base and load the interventions beside it")


def blocks(causal):
    """The decoder's layers, whatever the architecture calls their list."""
    from torch import nn

    decoder, count = causal.get_decoder(), causal.config.get_text_config().num_hidden_layers
    lists = [m for m in decoder.children() if isinstance(m, nn.ModuleList) and len(m) == count]
    if len(lists) != 1:
        raise Unsupported(f"{type(decoder).__name__} has no one list of its {count} layers to act on")
    return lists[0]


@cache
def intervention():
    """The class of one edit; made here, as plans are read where torch is not installed."""
    import torch
    from torch import nn
    from torch.nn.utils.parametrizations import orthogonal

    class Intervention(nn.Module):
        def __init__(self, width, rank, dropout):
            super().__init__()
            rotation = nn.Linear(width, rank, bias=False)
            nn.init.orthogonal_(rotation.weight)
            self.rotation = orthogonal(rotation, use_trivialization=False)
            self.source = nn.Linear(width, rank)
            self.dropout = nn.Dropout(dropout)

        def forward(self, h):
            """(N, d) -> (N, d), in fp32: in bf16 the rows of R would not be orthonormal."""
            with torch.autocast(h.device.type, enabled=False):
                x, rotation = h.float(), self.rotation.weight
                return self.dropout(x + (self.source(x) - x @ rotation.T) @ rotation).to(h.dtype)

    return Intervention


def locate(method, causal, decoder, args, kwargs):
    """Before a forward: finds the tokens to edit, so that they are the same ones however they are padded.
    Of a prompt and its answer together, prompt_lengths (B,) says where the one ends: the decoder has no such
    argument of its own."""
    import inspect

    import torch

    lengths = kwargs.pop("prompt_lengths", None)
    given = inspect.signature(decoder.forward).bind_partial(*args, **kwargs).arguments
    inputs = given.get("input_ids")
    if inputs is None:
        inputs = given["inputs_embeds"]
    shape, mask, past = inputs.shape[:2], given.get("attention_mask"), given.get("past_key_values")
    if lengths is not None:  # a prompt and its answer, padded on the right
        prompt = torch.arange(shape[1], device=inputs.device) < lengths[:, None]
    elif past is not None and past.get_seq_length() > 0:  # decoding: the prompt was edited when it was read
        if shape[1] > 1:
            raise ValueError(
                "LoReFT reads a prompt whole: pieces of it do not tell which tokens are its last"
            )
        causal.reft.places = []
        return args, kwargs
    elif kwargs.get("use_cache") is False:
        raise ValueError(
            "LoReFT cannot tell a prompt from its answer without a cache: use use_cache=True, or give "
            "the decoder prompt_lengths"
        )
    elif mask is None:
        prompt = torch.ones(shape, dtype=torch.bool, device=inputs.device)
    elif isinstance(mask, torch.Tensor) and mask.shape == shape:
        prompt = mask.bool()
    else:
        raise ValueError("LoReFT needs an attention mask of the tokens' own shape to find a prompt's ends")
    ends = first_and_last(prompt, method.first, method.last)
    if len(next(iter(causal.reft.values()))) == 1:
        ends = [ends[0] | ends[1]]
    causal.reft.places = [end.nonzero(as_tuple=True) for end in ends]
    return args, kwargs


def first_and_last(prompt, first, last):
    """(B, T) booleans of the prompts' tokens -> the same of their first ones, and of their last ones. Each
    end takes half of a short prompt at most, so that they never meet."""
    place, length = prompt.cumsum(1) - 1, prompt.sum(1, keepdim=True)
    half = length // 2
    return [
        prompt & (place < half.clamp(max=first)),
        prompt & (place >= length - half.clamp(max=last)),
    ]


def edit(reft, index, block, args, output):
    """After a layer: its output with the chosen tokens edited, and all others as they were."""
    h = output[0] if isinstance(output, tuple) else output  # (B, T, d)
    for group, places in zip(reft[index], reft.places, strict=False):
        h = h.index_put(places, group(h[places]))
    return (h, *output[1:]) if isinstance(output, tuple) else h
