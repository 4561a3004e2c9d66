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
        causal.reft.places = []  # of the forward, for each group: (B, k, 1) places, and which are edited
        decoder = causal.get_decoder()
        decoder.reads = ("prompt_lengths",)  # of a batch, where a prompt and its answer are read together
        decoder.register_forward_pre_hook(partial(locate, self, causal), with_kwargs=True)
        for index, block in self.chosen(blocks(causal)).items():
            # Made on the CPU: the same start for a seed on every device.
            edits = nn.ModuleList([intervention()(width, self.rank, self.dropout) for _ in range(groups)])
            causal.reft[str(index)] = edits.to(next(block.parameters()).device)
            edits.places = causal.reft.places
            vars(block)["edits"] = edits  # not the block's own part; by it one hook, so one program, does all
            block.register_forward_hook(edit)
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
        own = "parametrizations.weight.original", "coordinates"  # the name that they were saved by up to 0.1
        weights = load_file(folder / WEIGHTS).items()
        model.reft.load_state_dict({name.replace(*own): value for name, value in weights})
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

    class Rotation(nn.Module):
        """R by the coordinates that torch's own orthogonal(householder) gives it: vectors of reflections
        below a diagonal of signs. All reflect at once: I - V T V^T with T^-1 + T^-T = V^T V (Joffrain et al.
        2006, UT transform), of which r rows are wanted; one by one they are a launch or more each."""

        def __init__(self, weight):
            super().__init__()
            held, scale = torch.geqrf(weight.detach().T)
            signs = held.diagonal().sign()
            held.diagonal().copy_(torch.where(scale == 0, -signs, signs))  # LAPACK left that reflection out
            self.coordinates = nn.Parameter(held.T.contiguous())

        @property
        def weight(self):
            """(r, d), its rows orthonormal."""
            rank = len(self.coordinates)
            one = torch.eye(rank, device=self.coordinates.device, dtype=self.coordinates.dtype)
            vectors = self.coordinates.triu(1)
            vectors = torch.cat([vectors[:, :rank] + one, vectors[:, rank:]], 1)  # V^T
            gram = vectors @ vectors.T
            inverse = gram.triu(1) + one * gram / 2  # of T
            turned = torch.linalg.solve_triangular(inverse, vectors[:, :rank], upper=True).T  # (T V_1^T)^T
            rows = torch.cat([one - turned @ vectors[:, :rank], -turned @ vectors[:, rank:]], 1)
            return rows * self.coordinates.diagonal().detach()[:, None]

    class Intervention(nn.Module):
        def __init__(self, width, rank, dropout):
            super().__init__()
            rotation = nn.Linear(width, rank, bias=False)
            nn.init.orthogonal_(rotation.weight)
            self.rotation = Rotation(rotation.weight)
            self.source = nn.Linear(width, rank)
            self.dropout = nn.Dropout(dropout)

        def forward(self, h):
            """(..., d) -> the same, in fp32: in bf16 the rows of R would not be orthonormal."""
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
    starts = torch.zeros(shape[0], dtype=torch.long, device=inputs.device)
    if lengths is not None:  # a prompt and its answer, padded on the right
        pass
    elif past is not None and past.get_seq_length() > 0:  # decoding: the prompt was edited when it was read
        if shape[1] > 1:
            raise ValueError(
                "LoReFT reads a prompt whole: pieces of it do not tell which tokens are its last"
            )
        causal.reft.places.clear()
        return args, kwargs
    elif kwargs.get("use_cache") is False:
        raise ValueError(
            "LoReFT cannot tell a prompt from its answer without a cache: use use_cache=True, or give "
            "the decoder prompt_lengths"
        )
    elif mask is None:
        lengths = torch.full_like(starts, shape[1])
    elif isinstance(mask, torch.Tensor) and mask.shape == shape:
        starts, lengths = mask.int().argmax(1), mask.sum(1)
    else:
        raise ValueError("LoReFT needs an attention mask of the tokens' own shape to find a prompt's ends")
    ends = first_and_last(starts, lengths, method.first, method.last)
    if len(next(iter(causal.reft.values()))) == 1:
        ends = [[torch.cat(both, 1) for both in zip(*ends, strict=True)]]
    causal.reft.places[:] = [
        (place.clamp(0, shape[1] - 1)[..., None], real[..., None]) for place, real in ends
    ]
    return args, kwargs


def first_and_last(starts, lengths, first, last):
    """Where prompts begin and how long they are, each (B,) -> for either end: places (B, first or last), and
    which of them are edited. Each end takes half of a short prompt at most, so that they never meet."""
    import torch

    starts, lengths = starts[:, None], lengths[:, None]
    half, from_start, from_end = (
        lengths // 2,
        torch.arange(first, device=starts.device),
        torch.arange(1, last + 1, device=starts.device),
    )
    return [(starts + from_start, from_start < half), (starts + lengths - from_end, from_end <= half)]


def edit(block, args, output):
    """After a layer: its output with the chosen tokens edited, and all others as they were. As many places a
    row for any prompt, so that a step is of fixed shapes: to those that a short one lacks, 0 is added."""
    h = output[0] if isinstance(output, tuple) else output  # (B, T, d)
    for group, (places, real) in zip(block.edits, block.edits.places, strict=False):
        places = places.expand(-1, -1, h.shape[-1])
        chosen = h.gather(1, places)  # (B, first or last or both, d)
        h = h.scatter_add(1, places, (group(chosen) - chosen).where(real, 0))
    return (h, *output[1:]) if isinstance(output, tuple) else h
