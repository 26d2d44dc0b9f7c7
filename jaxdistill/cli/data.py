"""The commands about data: data align."""

import argparse
import sys
from typing import Any

from jaxdistill import commands
from jaxdistill.cli.derive import read
from jaxdistill.cli.output import print_json
from jaxdistill.errors import MismatchError


def align(arguments: argparse.Namespace) -> None:
    """Shows which tokens of two models spell the same bytes of a text."""
    from jaxdistill.data import alignment, encode, vocabularies
    from jaxdistill.data.codec import prepare
    from jaxdistill.data.token_bytes import token_bytes

    options = read(commands.Align, arguments)
    text = sys.stdin.read() if options.text == "-" else options.text
    named = {"student": options.student, "teacher": options.teacher}
    tokenizers = {who: _tokenizer(name, options.allow_network) for who, name in named.items()}
    spelled = {}
    for who, tokenizer in tokenizers.items():
        try:
            [ids] = encode.encode_text(prepare(tokenizer), [text])  # as data are read
            if isinstance(ids, str):
                raise MismatchError(ids)
            spelled[who] = token_bytes(tokenizer).spell(ids, text)
        except MismatchError as error:
            raise MismatchError(f"{who} ({named[who]}): {error}") from None
    groups = alignment.align(spelled["student"], spelled["teacher"])
    ours, theirs = (vocabularies.vocabulary(one) for one in tokenizers.values())
    pair = vocabularies.compare(ours, theirs)
    counts = {who: len(tokens) for who, tokens in spelled.items()}
    if arguments.json:
        facts: dict[str, Any] = {"vocabularies": str(pair), "kind": pair.kind, "tokens": counts}
        return print_json(facts | {"groups": groups.tolist()})
    print(f"vocabularies, the student's beside the teacher's: {pair}")
    alone = sum(first == last and c == d for first, last, c, d in groups.tolist())
    print(
        f"{len(text.encode()):,} bytes: {counts['student']:,} tokens of the student, "
        f"{counts['teacher']:,} of the teacher; {len(groups):,} groups, {alone:,} of one token each"
    )
    for line in alignment.shown(spelled["student"], spelled["teacher"], groups):
        print(line)
    return None


def _tokenizer(name: str, network: bool) -> Any:
    """The tokenizer of a model, or that of bytes.

    Raises:
      MismatchError: if the model has none.
    """
    from jaxdistill.models.byte_tokenizer import byte_tokenizer
    from jaxdistill.references import spec_any

    if name == "bytes":
        return byte_tokenizer()
    spec = spec_any(name, allow_network=network, tokenizer_only=True)
    if spec is None:
        raise MismatchError(f"{name}: has no tokenizer: name a model folder that has one, or bytes")
    return spec
