"""What methods for teachers of another tokenizer have in common: an option, and facts of a run."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxdistill.methods.base import Facts, Options

Length = Annotated[
    Annotated[Literal["auto"], Tag("<auto>")]
    | Annotated[int, Field(ge=2, le=2**20), Tag("<tokens>")],
    Discriminator(lambda value: "<auto>" if isinstance(value, str) else "<tokens>"),
]


class TwoTokenizers(Options):
    """The options of every method whose teacher reads the text in its own tokens."""

    teacher_seq_len: Length = Field(
        "auto",
        description="Tokens in a row of the teacher's view of the data; auto: data.seq_len. A row "
        "holds the same documents in both views: what one of them cannot hold is left out of both.",
    )


def length(options: Any, seq_len: int) -> int:
    """Tokens in a row of the teacher's view.

    Args:
      options: of a method with a second view.
      seq_len: tokens in a row of the student's.
    """
    given = options.teacher_seq_len
    return seq_len if given == "auto" else given


def vocabularies(options: TwoTokenizers, facts: Facts) -> dict[str, Any]:
    """The options of the head loss, with `teacher_vocab`: how many rows of its head are tokens."""
    from jaxdistill.models.vocabulary import vocabulary_size

    return {"teacher_vocab": vocabulary_size(facts.teacher_tokenizer), **options.head(facts)}


def matched(facts: Facts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that spell the same bytes in both vocabularies, and the ends of texts.

    Returns:
      (ids of the student's tokens, the teacher's of the same order).
    """
    from jaxdistill.data import vocabularies

    both = (facts.student_tokenizer, facts.teacher_tokenizer)
    ours, theirs = map(vocabularies.vocabulary, both)
    ids = enumerate(vocabularies.compare(ours, theirs).ids)
    pairs = {i: j for i, j in ids if i in ours.table and j in theirs.table}
    ends = tuple(one.eos_token_id for one in both)
    if None not in ends and ends[0] not in pairs and ends[1] not in pairs.values():
        pairs[ends[0]] = ends[1]
    return tuple(pairs), tuple(pairs.values())
