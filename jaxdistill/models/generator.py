"""The generation engine: rows in slots, many samples from one prefill, free slots refilled.

    generator = Generator(model, slots=32, length=512)
    generator.submit(Request(tokens, max_new_tokens=64, samples=30, temperature=0.7))
    for finished in generator.run():
        finished.request, finished.sample, finished.tokens, finished.logprobs

The device holds nothing but the weights and the ring of keys and values; what a row is, how far it
is and whether it lives, the host knows. A call of the compiled step makes several tokens. Weights
are held a second time, in the form that decoding reads, unless the model is given up for it:
`Generator(unrolled.take(model), ...)`.
"""

import collections
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.models import decoding, unrolled
from jaxdistill.models.model import Model, on_mesh
from jaxdistill.models.requests import Completion, Request, check

SHORTEST = 16
SLOTS = 32
STEPS = 16  # tokens per call of the compiled step
PREFILL_TOKENS = 4096  # of prompts that are read together, padding included
# Settings that leave every token in.
_OFF: Mapping[str, tuple[float, Any]] = {
    "top_k": (2**31 - 1, np.int32),
    "top_p": (1.0, np.float32),
    "min_p": (0.0, np.float32),
}


@dataclasses.dataclass
class _Row:
    """A slot that is in use."""

    request: Request
    sample: int
    tokens: list[int]
    logprobs: list[float]


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few programs, at most half as much again."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > SHORTEST else power


def room(length: int) -> int:
    """The next multiple of 16, or for long rows of a quarter of the power of two below.

    Every step reads this many places of each row, used or not: `bucket` would be too coarse.
    """
    step = max(SHORTEST, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step


class Generator:
    """Continues prompts of unequal length in a fixed number of slots.

    Args:
      model: the model; stop strings and texts need its tokenizer.
      slots: rows that are continued at the same time.
      length: tokens of the longest prompt and its continuation together.
      compute_dtype: None computes in the parameters' own.
      cache_dtype: "float32", "bfloat16" or "int8"; None: compute_dtype.
      logprobs: whether log-probabilities are wanted; without, they are 0 and a step is cheaper.
    """

    def __init__(
        self,
        model: Model,
        *,
        slots: int = SLOTS,
        length: int,
        compute_dtype: DTypeLike | None = None,
        cache_dtype: str | None = None,
        logprobs: bool = True,
    ):
        dtype = np.dtype(
            model.params["embedding"].dtype if compute_dtype is None else compute_dtype
        )
        # XLA multiplies a single bfloat16 row on a CPU number by number: two are ten times as fast.
        alone = slots == 1 and dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
        self.model, self.length, self.slots = model, length, 2 if alone else slots
        self._logprobs = logprobs
        self._queue: collections.deque[tuple[Request, int]] = collections.deque()
        self._rows: dict[int, _Row] = {}  # slots in use
        self._prefilled: dict[int, tuple[Any, int]] = {}  # id(request) -> (prefill, row of it)
        self._keys = np.zeros((self.slots, 2), np.uint32)
        with on_mesh(model.params):
            self._weights = unrolled.weights(model.config, model.params, dtype)
            self._ring = decoding.empty(
                model.config, self.slots, room(length), cache_dtype or dtype.name
            )

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ModelError: if its prompt or its settings cannot be used; nothing is queued then.
        """
        check(self.model, request, self.length)
        numbers = range(request.first, request.first + request.samples)
        self._queue.extend((request, sample) for sample in numbers)

    @property
    def waiting(self) -> int:
        """How many continuations are queued and have no slot yet."""
        return len(self._queue)

    @property
    def busy(self) -> bool:
        """Whether anything is queued or under way."""
        return bool(self._queue or self._rows)

    def written(self) -> Iterator[tuple[Request, int, list[int]]]:
        """What is under way: request, number of the sample, its tokens so far."""
        for row in self._rows.values():
            yield row.request, row.sample, row.tokens

    def cancel(self, tag: Any) -> None:
        """Forgets every request with this tag, queued or under way."""
        self._queue = collections.deque(item for item in self._queue if item[0].tag != tag)
        queued = {id(request) for request, _ in self._queue}
        self._prefilled = {key: kept for key, kept in self._prefilled.items() if key in queued}
        self._rows = {slot: row for slot, row in self._rows.items() if row.request.tag != tag}

    def run(self) -> Iterator[Completion]:
        """Completions in the order in which they finish, until nothing is left."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Completion]:
        """Fills free slots, makes up to `STEPS` tokens per row, and returns what has finished."""
        with on_mesh(self.model.params):
            finished = self._refill()
            if self._rows:
                finished += self._advance()
        return finished

    def _refill(self) -> list[Completion]:
        free = [slot for slot in range(self.slots) if slot not in self._rows]
        finished: list[Completion] = []
        while free and self._queue:
            if id(self._queue[0][0]) not in self._prefilled:
                self._prefill(len(free))
            prefill, _ = self._prefilled[id(self._queue[0][0])]
            source, count = np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32)
            taken: list[int] = []
            while free and self._queue:
                request, sample = self._queue[0]
                found = self._prefilled.get(id(request))
                if found is None or found[0] is not prefill:
                    break
                self._queue.popleft()
                slot = free.pop(0)
                source[slot], count[slot] = found[1], len(request.tokens)
                self._rows[slot] = _Row(request, sample, [], [])
                taken.append(slot)
                if sample == request.first + request.samples - 1:
                    del self._prefilled[id(request)]
            finished += self._begin(prefill, source, count, taken)
            free += [slot for slot in taken if slot not in self._rows]
        return finished

    def _prefill(self, free: int) -> None:
        """Reads the prompts that come next together, if they fall into one bucket of length."""
        width = bucket(len(self._queue[0][0].tokens))
        most = max(1, min(PREFILL_TOKENS // width, self.slots))
        batch: list[Request] = []
        for request, _ in self._queue:
            if free <= 0 or len(batch) == most or bucket(len(request.tokens)) != width:
                break
            if not batch or request is not batch[-1]:
                batch.append(request)
            free -= 1
        rows = 1 << (len(batch) - 1).bit_length()
        tokens, counts = np.zeros((rows, width), np.int32), np.ones(rows, np.int32)
        for number, request in enumerate(batch):
            tokens[number, : len(request.tokens)] = request.tokens
            counts[number] = len(request.tokens)
        made = decoding.prefill(self.model.config, self._weights, tokens, counts)
        for number, request in enumerate(batch):
            self._prefilled[id(request)] = (made, number)

    def _begin(self, prefill, source, count, taken: list[int]) -> list[Completion]:
        """Puts prompts into slots and chooses the first token of each."""
        states, logits = prefill
        self._ring = decoding.insert(self._ring, states, source, count)
        names = np.zeros((self.slots, 3), np.uint32)
        for slot in taken:
            row = self._rows[slot]
            names[slot] = row.request.seed, row.request.stream, row.sample
        fresh = np.asarray(decoding.row_keys(names))
        self._keys[taken] = fresh[taken]
        tokens, logprobs = decoding.first(
            logits, source, self._keys, self._settings(), self._logprobs
        )
        return self._settle(np.asarray(tokens)[:, None], np.asarray(logprobs)[:, None], taken)

    def _advance(self) -> list[Completion]:
        told = {name: np.zeros(self.slots, np.int32) for name in ("token", "length", "made")}
        told |= {"limit": np.zeros(self.slots, np.int32), "live": np.zeros(self.slots, bool)}
        own = {slot: _ends(self.model, row.request) for slot, row in self._rows.items()}
        width = max(map(len, own.values()))
        ends = np.full((self.slots, 1 << max(width - 1, 0).bit_length()), -1, np.int32)
        for slot, row in self._rows.items():
            ends[slot, : len(own[slot])] = own[slot]
            told["token"][slot], told["made"][slot] = row.tokens[-1], len(row.tokens)
            told["length"][slot] = len(row.request.tokens) + len(row.tokens) - 1
            told["limit"][slot], told["live"][slot] = row.request.max_new_tokens, True
        # With rows waiting, a few free slots are worth leaving the loop for; else only all are.
        idle = self.slots - len(self._rows)
        enough = idle + max(1, self.slots // 8) if self._queue else self.slots
        self._ring, tokens, logprobs = decoding.advance(
            self.model.config,
            STEPS,
            self._logprobs,
            self._weights,
            self._ring,
            told,
            ends,
            self._keys,
            np.asarray(min(enough, self.slots), np.int32),
            self._settings(),
        )
        return self._settle(np.asarray(tokens), np.asarray(logprobs), list(self._rows))

    def _settings(self) -> dict[str, np.ndarray]:
        """Sampling settings of all slots: only those that some row uses; {} is greedy."""
        requests = {slot: row.request for slot, row in self._rows.items()}
        if not any(request.temperature > 0 for request in requests.values()):
            return {}
        made = {"temperature": np.zeros(self.slots, np.float32)}
        for slot, request in requests.items():
            made["temperature"][slot] = request.temperature
        for name, (off, dtype) in _OFF.items():
            given = {slot: getattr(request, name) for slot, request in requests.items()}
            if any(value is not None for value in given.values()):
                made[name] = np.full(self.slots, off, dtype)
                for slot, value in given.items():
                    made[name][slot] = off if value is None else value
        return made

    def _settle(self, tokens, logprobs, slots: list[int]) -> list[Completion]:
        """Appends new tokens to their rows; ends rows that are done and frees their slots."""
        finished = []
        for slot in slots:
            row = self._rows[slot]
            new = tokens[slot][tokens[slot] >= 0]
            before = len(row.tokens)
            row.tokens += new.tolist()
            row.logprobs += logprobs[slot][: len(new)].tolist()
            done = self._finish(row, before)
            if done is not None:
                finished.append(done)
                del self._rows[slot]
        return finished

    def _finish(self, row: _Row, before: int) -> Completion | None:
        request, tokenizer = row.request, self.model.tokenizer
        decode = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True)
        if request.stop:
            cut = _find_stop(decode, row.tokens, before, request.stop)
            if cut is not None:
                size, text = cut
                return Completion(
                    request, row.sample, row.tokens[:size], row.logprobs[:size], "stop", text, False
                )
        ended = row.tokens[-1] in _ends(self.model, request)
        if not ended and len(row.tokens) < request.max_new_tokens:
            return None
        text = None
        if tokenizer is not None:
            text = decode(row.tokens[:-1] if ended else row.tokens)
        reason = "stop" if ended else "length"
        return Completion(request, row.sample, row.tokens, row.logprobs, reason, text, ended)


def _ends(model: Model, request: Request) -> tuple[int, ...]:
    return (*model.config.eos_ids, *request.stop_tokens)


def _find_stop(decode, tokens, before: int, stops) -> tuple[int, str] | None:
    """(tokens up to the one that completes a stop string, text before the string), or None."""
    text = decode(tokens)
    if not any(stop in text for stop in stops):
        return None
    for size in range(before + 1, len(tokens) + 1):
        text = decode(tokens[:size])
        places = [text.index(stop) for stop in stops if stop in text]
        if places:
            return size, text[: min(places)]
    return None
