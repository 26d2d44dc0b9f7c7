"""Multiple choice on local files: the answer that the model finds most likely."""

import os
import random
from collections.abc import Sequence
from typing import Any, NamedTuple

from jaxdistill.errors import DataError
from jaxdistill.evaluate import scoring
from jaxdistill.models import Model
from jaxdistill.safe import json_file

LETTERS = "ABCDEFGHIJ"


class ChoiceQuestion(NamedTuple):
    """A prompt, answers that may follow it, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read(path: str | os.PathLike, limit: int | None = None) -> list[ChoiceQuestion]:
    """Questions of a JSONL file.

    A line holds `prompt` (or `question`), `choices` and `answer` (an index), or, as AQuA has them,
    `question`, `options` that begin with "A)" and `correct`, a letter.

    Raises:
      DataError: with file and line of what cannot be used.
    """
    questions: list[ChoiceQuestion] = []
    try:
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (limit is None or len(questions) < limit):
                    questions.append(_question(line, f"{path}:{number}"))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    if not questions:
        raise DataError(f"{path}: holds no questions")
    return questions


def _question(line: str, where: str) -> ChoiceQuestion:
    try:
        raw = json_file.parse(line)
        prompt = raw["prompt"] if "prompt" in raw else f"Question: {raw['question']}\nAnswer: "
        choices, answer = raw.get("choices"), raw.get("answer")
        if "options" in raw:
            prompt = f"Question: {raw['question']}\nAnswer: "
            choices = [option.partition(")")[2].strip() for option in raw["options"]]
            answer = LETTERS.index(raw["correct"])
        good = len(choices) > 1 and all(isinstance(one, str) and one for one in choices)
        if good and prompt != "" and choices[answer] != "" and answer >= 0:
            return ChoiceQuestion(prompt, tuple(choices), answer)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        pass
    raise DataError(
        f"{where}: must hold prompt, choices (two or more texts) and answer, an index from 0"
    )


def from_texts(texts: Sequence[str], count: int, seed: int = 0) -> list[ChoiceQuestion]:
    """Which of four continuations is the text's own: a set built from any texts.

    The three others are pieces of other texts, as long and cut at a space too.

    Raises:
      DataError: if fewer than four texts are long enough.
    """
    draw = random.Random(seed)
    pieces = []
    for text in texts:
        words = text.split()
        if len(words) >= 60:
            pieces.append((" ".join(words[:40]), " " + " ".join(words[40:56])))
    if len(pieces) < 4:
        raise DataError(f"choices: {len(pieces)} texts of 60 words, 4 are needed: give more text")
    draw.shuffle(pieces)
    questions = []
    for i in range(min(count, len(pieces))):
        prompt, right = pieces[i]
        others = draw.sample([p[1] for j, p in enumerate(pieces) if j != i], 3)
        answer = draw.randrange(4)
        choices = others[:answer] + [right] + others[answer:]
        questions.append(ChoiceQuestion(prompt, tuple(choices), answer))
    return questions


def accuracy(
    model: Model, questions: Sequence[ChoiceQuestion], *, vocab: int, batch_size: int = 8
) -> dict[str, float]:
    """How often the right answer is the most likely, in all or per byte.

    Returns:
      accuracy: by log-probability; accuracy_per_byte: by log-probability over bytes, which does
      not favour short answers; questions: how many.
    """
    pairs = []
    for question in questions:
        context = tokens_of(model.tokenizer, question.prompt)
        for choice in question.choices:
            whole = tokens_of(model.tokenizer, question.prompt + choice)
            # Where the join changes tokens, the changed ones belong to the answer.
            same = next(
                (i for i, (a, b) in enumerate(zip(context, whole, strict=False)) if a != b),
                min(len(context), len(whole) - 1),
            )
            pairs.append((whole[: max(same, 1)], whole[max(same, 1) :]))
    scores = scoring.continuations(model, pairs, vocab=vocab, batch_size=batch_size)
    hits = {"accuracy": 0, "accuracy_per_byte": 0}
    place = 0
    for question in questions:
        own = [score for score, _ in scores[place : place + len(question.choices)]]
        place += len(question.choices)
        each = [s / len(c.encode()) for s, c in zip(own, question.choices, strict=True)]
        hits["accuracy"] += own.index(max(own)) == question.answer
        hits["accuracy_per_byte"] += each.index(max(each)) == question.answer
    return {name: count / len(questions) for name, count in hits.items()} | {
        "questions": len(questions)
    }


def tokens_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text, with what the tokenizer puts before one."""
    return list(tokenizer(text)["input_ids"])
