"""The engine of the decoder: prompts are read into slots, then every slot writes one token a step."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from itertools import product
from types import FunctionType

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from harness.record import EAGER
from harness.training import slot_attention
from harness.training.compiling import compiling
from harness.training.graphs import recorded
from harness.training.head import causal_lm, softcap_of, tolerance
from harness.training.kernels import decoder_layers
from harness.training.slots import Slots

ROUND = 128  # a slot's places come in so many: one compiled shape serves texts of nearly the same length
PROGRAMS = 64  # of one kind of layer: its modes, the shapes
FEW = 8  # prompts: so few are read plainly at once, while a compiler makes 1 and other small numbers special
COMPILED_FROM = 50_000  # steps times layers: compiling takes 5 to 20 s and saves .1 to .2 ms of each


class Engine:
    """Answers in the making: one a slot, each of at most `new_tokens`, up to one of `stops`.

    A step computes every slot, has one shape and never waits for the device; a slot whose answer has ended
    computes its last token once more. Which token follows depends on the slot alone: on its text, and above
    temperature 0 on its own row of numbers, one a token.
    """

    def __init__(self, model, count: int, longest: int, new_tokens: int, stops: list[int], temperature=0.0):
        causal = causal_lm(model)
        self.decoder, self.head = causal.get_decoder(), causal.get_output_embeddings()
        self.config, self.softcap = self.decoder.config, softcap_of(causal)
        # Those that attention looks at: an ensemble has several.
        self.configs = [m.config for m in self.decoder.modules() if isinstance(m, PreTrainedModel)]
        self.tolerance = tolerance(model)
        self.layers = decoder_layers(causal)
        self.device, self.temperature, self.new_tokens = self.head.weight.device, temperature, new_tokens
        length = -(-(longest + new_tokens) // ROUND) * ROUND
        self.cache = Slots(self.config, count, length, self.device)
        self.state = self.cache.state
        self.stops = torch.tensor(stops, dtype=torch.long, device=self.device)
        self.token = torch.zeros(
            count, dtype=torch.long, device=self.device
        )  # the last of each text: not read yet
        self.written = torch.zeros_like(self.token)  # tokens of each answer
        self.done = torch.ones_like(self.token, dtype=torch.bool)
        self.answer = self.token.new_zeros(
            count, new_tokens + 1
        )  # where one is done, the next column is scrap
        self.numbers = torch.zeros(count, new_tokens + 1, device=self.device)
        self.ends: dict[int, int] = {}  # of the texts in the making: places up to here may be written
        self.graph: torch.cuda.CUDAGraph | None = None
        self.reading, self.compared = EAGER, False  # how prompts are read, and whether that was tried
        self.refused: list[str] = []  # faster kernels than it has, and why

    def read(self, prompts, slots: list[int], which: list[int], numbers=None) -> torch.Tensor:
        """Begins an answer to prompts[which[i]] in slots[i]; `numbers`: (slots, new_tokens), each in [0, 1).
        -> (slots, V) logits of the first tokens"""
        row = {i: row for row, i in enumerate(dict.fromkeys(which))}  # copies of a prompt are read once
        ids, mask = right_padded([prompts[i] for i in row], self.device)
        to, of = (torch.tensor(x, device=self.device) for x in (slots, [row[i] for i in which]))
        lengths = mask.sum(1)[of]
        with self.cache.filling(to, of):
            logits = self.fastest_read(ids, mask, of, lengths)
        if numbers is not None:
            self.numbers[to, :-1] = numbers.to(self.device)
        chosen = self.choose(logits, self.numbers[to, :1])
        self.state.place[to], self.token[to], self.answer[to, 0], self.written[to] = (
            lengths,
            chosen,
            chosen,
            1,
        )
        self.done[to] = self.stopping(chosen) | (self.new_tokens == 1)
        self.ends |= {slot: len(prompts[i]) for slot, i in zip(slots, which, strict=True)}
        return logits

    def fastest_read(self, ids, mask, rows, lengths) -> torch.Tensor:
        """(B, T) -> (S, V): what follows the prompts in these rows."""

        def logits() -> torch.Tensor:
            hidden = self.decoder(
                input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True
            ).last_hidden_state  # (B, T, H)
            return self.scored(hidden[rows, lengths - 1])

        if self.reading != "compiled" or len(ids) < FEW:
            return logits()
        try:
            with compiled(self.layers, self.cache, "read"):
                found = logits()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever cannot be compiled
            self.refused.append(f"compiled prompts: {type(error).__name__}: {error}")
        else:
            if self.compared:
                return found
            expected = logits()
            far, self.compared = distance(found, expected), True
            if far <= self.tolerance:
                return expected
            self.refused.append(f"compiled prompts: logits differ by {far:.1%}")
        self.reading = EAGER
        return logits()

    def run(self, steps: int) -> None:
        for _ in range(steps):
            if self.graph:
                self.graph.replay()
            else:
                self.state.seen = min(self.state.length, max(self.ends.values()) + 1)
                self.step()
            self.ends = {slot: end + 1 for slot, end in self.ends.items()}

    def step(self) -> None:
        """One more token in every slot that is not done."""
        chosen = self.choose(self.logits(), self.numbers.gather(1, self.written[:, None]))
        self.answer.scatter_(1, self.written[:, None], chosen[:, None])
        self.written += ~self.done
        self.done |= self.stopping(chosen) | (self.written == self.new_tokens)
        self.state.place += ~self.done
        self.token.copy_(torch.where(self.done, self.token, chosen))

    def logits(self) -> torch.Tensor:
        """(count, V): what follows each slot's last token."""
        with self.cache.decoding(self.configs):
            hidden = self.decoder(
                input_ids=self.token[:, None],
                position_ids=self.state.place[:, None],
                past_key_values=self.cache,
                use_cache=True,
            ).last_hidden_state  # (count, 1, H)
        self.found = self.scored(hidden[:, 0])
        return self.found

    def scored(self, hidden: torch.Tensor) -> torch.Tensor:
        """(S, H) -> (S, V)"""
        logits = self.head(hidden)
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    def choose(self, logits, number) -> torch.Tensor:
        """(S, V), (S, 1) -> (S,): the likeliest token, or the one at which the sum of all probabilities up to
        it passes the slot's number."""
        if not self.temperature:
            return logits.argmax(-1)
        return drawn((logits.float() / self.temperature).softmax(-1), number)

    def stopping(self, chosen) -> torch.Tensor:
        return (chosen[:, None] == self.stops).any(1)

    def ended(self) -> dict[int, list[int]]:
        """The answers that have ended since they were asked for last, by slot. Waits for the device."""
        done = self.done.tolist()
        slots = [slot for slot in self.ends if done[slot]]
        for slot in slots:
            del self.ends[slot]
        index = torch.tensor(slots, dtype=torch.long, device=self.device)
        answers, written = self.answer[index].tolist(), self.written[index].tolist()
        return {s: ids[:n] for s, ids, n in zip(slots, answers, written, strict=True)}

    def keep(self) -> list[int]:
        """Goes on with the texts in the making alone. -> their slots so far; they are 0, 1, ... now"""
        slots = list(self.ends)
        index = torch.tensor(slots, device=self.device)
        self.cache.keep(index)
        for name in ("token", "written", "done", "answer", "numbers"):
            setattr(self, name, getattr(self, name)[index])
        self.ends = dict(enumerate(self.ends.values()))
        return slots

    # The kernels of a step, once the first prompts are read

    def capture(self, steps: int) -> str:
        """Makes the fastest step that gives what a plain one does, for so many steps. -> its kernels"""
        if self.device.type != "cuda":
            return EAGER
        self.state.seen, done = self.state.length, self.done.clone()
        bounded = all(
            slot_attention.fits(self.config.num_attention_heads, layer.keys, layer.values)
            for layer in self.cache.held
        )
        worth = steps * len(self.layers) >= COMPILED_FROM
        rungs = ["compiled + graph"] * worth + ["eager + graph"]
        self.done.fill_(True)  # so that a step changes nothing
        try:
            expected = self.logits().clone()
            for self.cache.bounded, kernels in product([True] * bounded + [False], rungs):
                within = compiled(self.layers, self.cache, "step") if "compiled" in kernels else nullcontext()
                try:
                    with within:
                        graph = self.captured()
                    graph.replay()
                    far = distance(self.found, expected)
                except Exception as error:  # whatever cannot be compiled or captured
                    self.refused.append(f"{kernels}: {type(error).__name__}: {error}")
                    continue
                if far <= self.tolerance:
                    self.graph, self.reading = graph, kernels.removesuffix(" + graph")
                    return kernels
                self.refused.append(f"{kernels}: logits differ by {far:.1%}")
            return EAGER
        finally:
            self.done.copy_(done)

    def captured(self) -> torch.cuda.CUDAGraph:
        # A weight that autocast had cast outside of the graph would be gone when the graph is replayed.
        enabled, dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        with torch.autocast("cuda", dtype, enabled, cache_enabled=False):
            graph, _, _ = recorded(self.step, torch.cuda.graph_pool_handle())
        return graph


@contextmanager
def compiled(layers, cache, what: str):
    """Within, the decoder's layers run as one compiled function a class of layer; after it, as they did: for
    a "step", which has one shape, or to "read" prompts, which have any. What is compiled is a copy of their
    forward: a training's own compiled code is another."""
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, own in zip(layers, cache.layers, strict=True):
            layer.forward = partial(alone, compiled_forward(layer.__class__, what), layer, own)
        with compiling(recompile_limit=PROGRAMS):
            yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            vars(layer).pop("forward", None)
            if forward is not None:
                layer.forward = forward


@lru_cache
def compiled_forward(kind, what: str) -> Callable:
    own = kind.forward
    code = own.__code__.replace(co_name=what)
    copy = FunctionType(code, own.__globals__, what, own.__defaults__, own.__closure__)
    copy.__kwdefaults__ = own.__kwdefaults__
    return torch.compile(copy, dynamic=what == "read")


def alone(function, layer, own, *args, **kwargs):
    """A layer's forward with its own part of the cache in place of the whole: which layer it is, is then no
    constant of the compiled code, and one serves all."""
    given = [own if isinstance(x, Cache) else x for x in args]
    return function(layer, *given, **{k: own if isinstance(x, Cache) else x for k, x in kwargs.items()})


def forced(prompts, tokens: torch.Tensor, model) -> torch.Tensor:
    """(N, T, V): the engine's logits where the answers to N prompts are tokens (N, T)."""
    engine = Engine(model, len(prompts), max(map(len, prompts)), tokens.shape[1], [])
    slots = list(range(len(prompts)))
    found = [engine.read(prompts, slots[::-1], slots)]
    for column in tokens.flip(0).T[:-1]:
        engine.token.copy_(column)
        found.append(engine.logits().flip(0))  # slots are in reverse order
        engine.state.place += 1
    return torch.stack(found, 1)


def drawn(probabilities: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
    """(S, V), (S, 1) in [0, 1) -> (S,): each token as often as it is likely, where numbers are uniform."""
    sums = probabilities.cumsum(-1)
    return torch.searchsorted(sums, number * sums[:, -1:], right=True)[:, 0].clamp(max=sums.shape[1] - 1)


def distance(logits: torch.Tensor, expected: torch.Tensor) -> float:
    """How far logits are from those expected, as a share of what those differ by among themselves."""
    expected = expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).norm()
    return ((logits.float() - expected).norm() / spread.clamp(min=1e-6)).item()


def right_padded(prompts, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt ids and their mask, each (B, T)."""
    ids = torch.zeros(len(prompts), max(map(len, prompts)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = torch.tensor(list(prompt)), 1
    return ids.to(device), mask.to(device)
