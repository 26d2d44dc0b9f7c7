"""The words of the library, Span, Batch, Outputs, TeacherSignal, Mean, and the axes of arrays.

Array axes ("dim") are named by one letter wherever a name carries its shape:

    B batch      L length      N tokens (B * L)      V vocabulary      D embed         F mlp
    H query heads      G key/value heads      E head dim      K kept teacher entries      S samples

T is temperature, never an axis. "axis" always means an axis of the device mesh.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

# Who wrote a token: a corpus, the teacher or the student. Losses may differ by it.
DATA, TEACHER, STUDENT = 0, 1, 2
ORIGINS = ("data", "teacher", "student")


class Span(typing.NamedTuple):
    """The rows that one step learns from, counted from 0 over the whole run, epoch after epoch.

    Attributes:
      first_row: the first of them.
      end_row: the position behind the last one, where the next step begins.
    """

    first_row: int
    end_row: int


# `no_type_check` keeps run-time shape checkers out of `__init__`: scan, eval_shape and sharding
# trees rebuild these carriers with stacked arrays, shapes or specs in place of the arrays.
@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """One batch of token rows, several documents packed into a row.

    This is the legend of all that a batch can carry. Leaves that not every method needs are None
    unless a feed fills them. The first dim of every leaf is the rows of the batch, the second one,
    if there is one, is the length of the view of the text that the leaf belongs to. That is all
    that shapes, places, micro-batches and saved batches rely on, so a new leaf is a line here, the
    feed that fills it and the loss that reads it. A leaf may be a tree, such as a second view of
    the text with tokens, positions and segment_ids of its own.

        per row        [B]         such as an advantage
        per token      [B, L]      such as the log-probability that a sampler gave the token
        per entry      [B, L, K]   such as the ids and log-probabilities of a sparse teacher

    Attributes:
      tokens: int32 [B, L], what the model reads.
      targets: int32 [B, L], already shifted: `targets[b, i]` is the token that position i predicts.
      mask: bool [B, L], True where that prediction counts in the loss.
      positions: int32 [B, L], restarting at 0 in every document.
      segment_ids: int32 [B, L], 1, 2, ... per document within the row; 0 is padding.
      origin: int32 [B, L], who wrote the text: DATA, TEACHER or STUDENT; None: all is DATA.
      teacher: what a stored teacher said, [B, L, ...] by the fields of its format, [B, M, ...] of
        one that reads the tokens of `second`; of several by
        their names, zeros in the rows of others; None: nothing.
      groups: int32 [B, L], tokens of one number, from 1, spell what the tokens of that number in
        `second` spell; 0 is none. At most min(L, M) in a row, in rising order.
      second: the same documents in the tokens of a teacher with another tokenizer, in rows of its
        own length: {"tokens", "positions", "segment_ids", "groups"}, int32 [B, M]; None: nothing.
      sampler_logprobs: float32 [B, L], log mu of the targets under the distribution that they were
        drawn from; None: nobody drew them, or nobody asks.
      sampled: of text that earned rewards, by name and per token: `advantages`,
        float32; where several updates learn from it `old`, log q_old; where it matters
        `wrong`, bool; where some is for the reward alone, or for the teacher alone, `rewarded`
        and `taught`, bool. None: nothing.
      route: int32 [B], which of several teachers a row is for, from 1; 0 is none, as of padding.
        None: there are not several.
    """

    tokens: Array
    targets: Array
    mask: Array
    positions: Array
    segment_ids: Array
    origin: Array | None = None
    teacher: typing.Any = None
    groups: Array | None = None
    second: typing.Any = None
    sampler_logprobs: Array | None = None
    sampled: typing.Any = None
    route: Array | None = None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model returns: hidden states and its head, never logits.

    Attributes:
      hidden: [B, L, D], after the final norm.
      head: [V, D], the rows that turn hidden states into logits.
      head_bias: [V] or None.
      routing: float32 [layers, B, L, X], scores of each layer's router for its experts, or None.
      softcap: c, of logits c tanh(x / c), or None.
      taps: [K, B, L, D], outputs of chosen layers, or None.
      relations: of chosen layers (query [B, L, H * E], key and value [B, L, G * E]), or None.
    """

    hidden: Array
    head: Array
    head_bias: Array | None = None
    taps: typing.Any = None
    relations: typing.Any = None
    routing: Array | None = None
    softcap: float | None = dataclasses.field(default=None, metadata={"static": True})


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Known:
    """A teacher of whom some tokens' probabilities are known.

    Attributes:
      ids: int32 [B, L, K], different ones of each position; a negative one is none.
      logprobs: float32 [B, L, K], log p of these tokens at the temperature of the loss.
      rest: float32 [B, L], the mass of all other tokens, or None.
      entropy: float32 [B, L], of the teacher, where the ids are drawn from it; or None.
    """

    ids: Array
    logprobs: Array
    rest: Array | None = None
    entropy: Array | None = None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TeacherSignal:
    """What the teacher says about a batch; every array is a constant to the gradient.

    Attributes:
      outputs: hidden states and head, of a teacher that gives whole rows of logits, or None.
      known: the tokens of which it is known, or None.
      form: `online`, `served`, or the format that it was stored in: a loss reads each in its way.
    """

    outputs: Outputs | None = None
    known: Known | None = None
    form: str = dataclasses.field(default="online", metadata={"static": True})


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean kept as its sum and its count, so that parts of any size can be added.

    Attributes:
      total: sum over the counted entries.
      count: how many entries were counted.
    """

    total: Array
    count: Array

    @property
    def value(self) -> Array:
        """total / count, and 0 where nothing was counted; of NumPy's numbers by NumPy."""
        xp: typing.Any = jnp if isinstance(self.total, jax.Array) else np
        empty = self.count == 0
        count = xp.where(empty, 1, self.count).astype(self.total.dtype)
        return xp.where(empty, 0.0, self.total / count)

    def __add__(self, other: "Mean") -> "Mean":
        return Mean(self.total + other.total, self.count + other.count)
