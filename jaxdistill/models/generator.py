"""The generation engine on token ids: rows in slots, many samples from one prefill, slots refilled.

    generator = Generator(config, params, slots=32, length=512)
    generator.submit(Request(tokens, max_new_tokens=64, samples=30, temperature=0.7))
    for done in generator.run():
        done.request, done.sample, done.tokens, done.logprobs
    generator.use(new_params)              # the same compiled programs

The device holds the weights and the ring of keys and values; which rows there are and how far they
are, the host knows. A call of the compiled step makes several tokens. Stacked parameters are held
a second time, split (see `per_layer`); split ones of the right dtype are used as they are.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jaxdistill.errors import ModelError
from jaxdistill.models import decoding, per_layer, prompt_scores, slot_settings
from jaxdistill.models.architecture import DecoderConfig
from jaxdistill.models.requests import Completion, FieldNames, PromptScores, Request, check
from jaxdistill.sharding import on_mesh

SHORTEST = 16
SLOTS = 32
STEPS = 16  # tokens per call of the compiled step
PREFILL_TOKENS = 4096  # of prompts that are read together, padding included
ALTERNATIVES = 20  # most probable tokens that are found where any row wants some


@dataclasses.dataclass
class _Slot:
    """A slot that is in use."""

    request: Request
    sample: int
    prompt: PromptScores | None
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    drawn_logprobs: list[float] = dataclasses.field(default_factory=list)
    alternatives: list[list[tuple[int, float]]] = dataclasses.field(default_factory=list)


class _Read(NamedTuple):
    """A prompt that has been read: together with others, its row of them, its scores."""

    states: Any
    logits: Any
    row: int
    scores: PromptScores | None


def bucket(length: int) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ...: few programs, at most half as much again."""
    power = max(SHORTEST, 1 << (length - 1).bit_length())
    return power * 3 // 4 if length <= power * 3 // 4 and power > SHORTEST else power


def cache_length(length: int) -> int:
    """The next multiple of 16, or for long rows of a quarter of the power of two below.

    Every step reads this many places of each row, used or not: `bucket` would be too coarse.
    """
    step = max(SHORTEST, (1 << (length.bit_length() - 1)) // 4)
    return -(-length // step) * step


class Generator:
    """Continues prompts of unequal length in a fixed number of slots.

    Args:
      config: the model's configuration.
      params: its parameters, stacked or split.
      slots: rows that are continued at the same time.
      length: tokens of the longest prompt and its continuation together.
      compute_dtype: None computes in the parameters' own.
      cache_dtype: "float32", "bfloat16" or "int8"; None: compute_dtype.
      logprobs: whether log-probabilities are wanted; without, they are 0 and a step is cheaper.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        *,
        slots: int = SLOTS,
        length: int,
        compute_dtype: DTypeLike | None = None,
        cache_dtype: str | None = None,
        logprobs: bool = True,
    ):
        held = params["embedding"].dtype
        dtype = self._dtype = np.dtype(held if compute_dtype is None else compute_dtype)
        # XLA multiplies a single bfloat16 row on a CPU number by number: two are ten times as fast.
        alone = slots == 1 and dtype == jnp.bfloat16 and jax.default_backend() == "cpu"
        self.config, self.length, self.slots = config, length, 2 if alone else slots
        self._logprobs = logprobs
        self._queue: collections.deque[tuple[Request, int]] = collections.deque()
        self._rows: dict[int, _Slot] = {}  # slots in use
        self._prefilled: dict[int, _Read] = {}  # by id(request)
        self._keys = np.zeros((self.slots, 2), np.uint32)
        self._given = _kinds(params)
        self._params: Any = self._split(params)
        with on_mesh(params):
            self._ring = decoding.empty(
                config, self.slots, cache_length(length), cache_dtype or dtype.name
            )

    def use(self, params: Any) -> None:
        """Takes other parameters of the same model in place of its own; compiles nothing.

        Rows and samples that are queued begin with the new ones.

        Args:
          params: in the form of those that the generator was made with, and lying as they do.

        Raises:
          ModelError: for parameters of another form, or while rows are under way: what they have
            read stands in the cache as the old parameters made it.
        """
        if self._rows or self._prefilled:
            raise ModelError(
                f"generate: the parameters cannot change while {len(self._rows)} rows are under "
                "way: run() to the end, or cancel() them, first"
            )
        if _kinds(params) != self._given:
            raise ModelError(
                "generate: other parameters must have the names, shapes and dtypes of those that "
                "the generator was made with: make a new generator"
            )
        self._params = None  # goes before its successor comes
        self._params = self._split(params)

    def _split(self, params: Any) -> dict:
        with on_mesh(params):
            return per_layer.split(self.config, params, self._dtype)

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises:
          ModelError: if its prompt or its settings cannot be used; nothing is queued then.
        """
        check(self.config, request, self.length)
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
        """Of every row under way the request, the number of the sample, its tokens so far."""
        for row in self._rows.values():
            yield row.request, row.sample, row.tokens

    def cancel(self, tag: Any) -> None:
        """Forgets every request with this tag, queued or under way."""
        self._queue = collections.deque(item for item in self._queue if item[0].tag != tag)
        queued = {id(request) for request, _ in self._queue}
        self._prefilled = {key: row for key, row in self._prefilled.items() if key in queued}
        self._rows = {slot: row for slot, row in self._rows.items() if row.request.tag != tag}

    def run(self) -> Iterator[Completion]:
        """Completions in the order in which they finish, until nothing is left."""
        while self.busy:
            yield from self.step()

    def step(self) -> list[Completion]:
        """Fills free slots, makes up to `STEPS` tokens per row, and returns what has finished."""
        with on_mesh(self._params):
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
            prefill = self._prefilled[id(self._queue[0][0])]
            source, count = np.full(self.slots, -1, np.int32), np.zeros(self.slots, np.int32)
            taken: list[int] = []
            while free and self._queue:
                request, sample = self._queue[0]
                read = self._prefilled.get(id(request))
                if read is None or read.logits is not prefill.logits:
                    break
                self._queue.popleft()
                slot = free.pop(0)
                source[slot], count[slot] = read.row, len(request.tokens)
                self._rows[slot] = _Slot(request, sample, read.scores)
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
        states, logits, x_PWD = decoding.prefill(self.config, self._params, tokens, counts)
        for number, request in enumerate(batch):
            scores = prompt_scores.scores(self.config, self._params, request, x_PWD, number)
            self._prefilled[id(request)] = _Read(states, logits, number, scores)

    def _begin(self, prefill: _Read, source, count, taken: list[int]) -> list[Completion]:
        """Puts prompts into slots and chooses the first token of each."""
        self._ring = decoding.insert(self._ring, prefill.states, source, count)
        names = np.zeros((self.slots, 3), np.uint32)
        for slot in taken:
            row = self._rows[slot]
            names[slot] = row.request.seed, row.request.stream, row.sample
        fresh = np.asarray(decoding.row_keys(names))
        self._keys[taken] = fresh[taken]
        token = decoding.first(
            prefill.logits, source, self._keys, self._settings(), self._told, self._history()
        )
        return self._settle([np.asarray(one)[:, None] for one in token], taken)

    def _advance(self) -> list[Completion]:
        names = ("token", "length", "count", "limit")
        rows = {name: np.zeros(self.slots, np.int32) for name in names}
        rows["live"] = np.zeros(self.slots, bool)
        own = {slot: self._ends(row.request) for slot, row in self._rows.items()}
        width = max(map(len, own.values()))
        ends = np.full((self.slots, 1 << max(width - 1, 0).bit_length()), -1, np.int32)
        for slot, row in self._rows.items():
            ends[slot, : len(own[slot])] = own[slot]
            rows["token"][slot], rows["count"][slot] = row.tokens[-1], len(row.tokens)
            rows["length"][slot] = len(row.request.tokens) + len(row.tokens) - 1
            rows["limit"][slot], rows["live"][slot] = row.request.max_new_tokens, True
        # With rows waiting, a few free slots are worth leaving the loop for; else only all are.
        idle = self.slots - len(self._rows)
        enough = idle + max(1, self.slots // 8) if self._queue else self.slots
        self._ring, tokens = decoding.advance(
            self.config,
            STEPS,
            self._told,
            self._params,
            self._ring,
            rows,
            ends,
            self._keys,
            np.asarray(min(enough, self.slots), np.int32),
            self._settings(),
            self._history(),
        )
        return self._settle([np.asarray(one) for one in tokens], list(self._rows))

    @property
    def _told(self) -> int | None:
        """How many log-probabilities are found beside each token's own; None: not even that."""
        if not self._logprobs:
            return None
        most = max((row.request.alternatives for row in self._rows.values()), default=0)
        wanted = most if most in (0, self.config.vocab_size) else max(most, ALTERNATIVES)
        return min(wanted, self.config.vocab_size)

    def _settings(self) -> dict[str, np.ndarray]:
        return slot_settings.settings(
            {slot: row.request for slot, row in self._rows.items()}, self.slots
        )

    def _history(self) -> dict[str, np.ndarray]:
        rows = {slot: (row.request, row.tokens) for slot, row in self._rows.items()}
        return slot_settings.history(rows, self.slots, cache_length(self.length))

    def _settle(self, found: Sequence[np.ndarray], slots: list[int]) -> list[Completion]:
        """Appends new tokens to their rows; ends rows that are done and frees their slots."""
        finished = []
        tokens, logprobs, drawn_logprobs, likely, scores = found
        for slot in slots:
            row = self._rows[slot]
            new = tokens[slot][tokens[slot] >= 0]
            before = len(row.tokens)
            row.tokens += new.tolist()
            row.logprobs += logprobs[slot][: len(new)].tolist()
            row.drawn_logprobs += drawn_logprobs[slot][: len(new)].tolist()
            if wanted := row.request.alternatives:
                pairs = zip(likely[slot, : len(new), :wanted], scores[slot], strict=False)
                row.alternatives += [
                    list(zip(ids.tolist(), some.tolist(), strict=False)) for ids, some in pairs
                ]
            done = self._finish(row, before)
            if done is not None:
                finished.append(done)
                del self._rows[slot]
        return finished

    def _finish(self, row: _Slot, before: int) -> Completion | None:
        request, tokens = row.request, row.tokens
        told = row.logprobs, row.drawn_logprobs
        size = request.stop(tokens, before) if request.stop else None
        if size is not None:
            cut = tokens[:size], told[0][:size], told[1][:size]
            more = row.alternatives[:size], row.prompt
            ended = tokens[size - 1] in self._ends(request)
            return Completion(request, row.sample, *cut, "stop", ended, *more)
        ended = tokens[-1] in self._ends(request)
        if not ended and len(tokens) < request.max_new_tokens:
            return None
        reason = "stop" if ended else "length"
        more = row.alternatives, row.prompt
        return Completion(request, row.sample, tokens, *told, reason, ended, *more)

    def _ends(self, request: Request) -> tuple[int, ...]:
        return (*self.config.eos_ids, *request.stop_tokens)


def _kinds(params: Any) -> tuple:
    """Names, shapes and dtypes of parameters: what compiled programs depend on."""
    leaves, tree = jax.tree.flatten(params)
    return tree, [(leaf.shape, leaf.dtype) for leaf in leaves]


def complete(
    config: DecoderConfig,
    params: Any,
    requests: Sequence[Request],
    *,
    slots: int = SLOTS,
    cache_dtype: str | None = None,
    logprobs: bool = True,
) -> list[list[Completion]]:
    """All completions of some requests, in their order; their tags are numbers from 0.

    Args:
      config: the model's configuration.
      params: its parameters, stacked or split.
      requests: different objects.
      slots: rows that are continued at the same time, at most.
      cache_dtype: as `Generator` takes it.
      logprobs: as `Generator` takes it.

    Raises:
      ModelError: for a request that cannot be served, by its number; nothing is generated then.
    """
    if not requests:
        return []
    length = max(len(request.tokens) + request.max_new_tokens for request in requests)
    for number, request in enumerate(requests):
        check(config, request, length, FieldNames(f"prompt {number}"))
    rows = min(slots, 1 << (sum(request.samples for request in requests) - 1).bit_length())
    generator = Generator(
        config, params, slots=rows, length=length, cache_dtype=cache_dtype, logprobs=logprobs
    )
    for number, request in enumerate(requests):
        generator.submit(dataclasses.replace(request, tag=number))
    completions: list[dict[int, Completion]] = [{} for _ in requests]
    for done in generator.run():
        completions[done.request.tag][done.sample] = done
    return [[row[sample] for sample in sorted(row)] for row in completions]
