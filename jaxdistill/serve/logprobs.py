"""Log-probabilities as OpenAI's and vLLM's protocols tell them: texts, bytes, alternatives."""

import codecs
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill.models.requests import Completion, PromptScores, Request
from jaxdistill.serve.protocol import BadRequest, Body, ChatBody, CompletionBody

MAX_TOLD = 500_000  # log-probabilities in one answer


class Told:
    """Tells the tokens of one tokenizer.

    Args:
      tokenizer: a fast tokenizer of transformers'.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        decoder = json.loads(tokenizer.backend_tokenizer.to_str()).get("decoder")
        self._kinds = _kinds(decoder)
        self._added = tokenizer.added_tokens_decoder
        self._known: dict[int, bytes] = {}
        self._byte = {letter: byte for byte, letter in enumerate(_byte_letters())}

    def check(self, body: Body, requests: Sequence[Request]) -> None:
        """Refuses what would fill an answer with more numbers than anybody can use.

        Raises:
          BadRequest: naming the field.
        """
        told = body.alternatives
        written = sum(request.max_new_tokens * request.samples for request in requests)
        if told is not None and written * (1 + told) > MAX_TOLD:
            raise BadRequest(
                f"logprobs: {written} tokens with {1 + told} log-probabilities each are more than "
                f"{MAX_TOLD}: lower max_tokens, n or the number of alternatives"
            )
        read = sum(len(request.tokens) * request.samples for request in requests)
        told = body.prompt_logprobs if isinstance(body, CompletionBody) else None
        if told is not None and read * (1 + told) > MAX_TOLD:
            raise BadRequest(
                f"prompt_logprobs: {read} tokens with {1 + told} log-probabilities each are more "
                f"than {MAX_TOLD}: send fewer prompts at a time, or lower n or the number"
            )

    def of_chat(self, body: ChatBody, done: Completion) -> dict[str, Any] | None:
        """What stands in a choice of a chat."""
        if body.alternatives is None:
            return None
        likely = done.alternatives or [()] * len(done.tokens)
        content = [
            self._entry(token, score)
            | {"top_logprobs": [self._entry(*one) for one in others[: body.alternatives]]}
            for token, score, others in zip(done.tokens, done.logprobs, likely, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _entry(self, token: int, score: float) -> dict[str, Any]:
        data = self.bytes_of(token)
        return {"token": shown(data, ""), "logprob": score, "bytes": list(data)}

    def of_text(self, body: CompletionBody, done: Completion) -> dict[str, Any] | None:
        """What stands in a choice of a plain completion."""
        if body.alternatives is None:
            return None
        name = lambda token: shown(self.bytes_of(token), "bytes:")
        read, offsets, size = codecs.getincrementaldecoder("utf-8")("replace"), [], 0
        for token in done.tokens:
            offsets.append(size)
            size += len(read.decode(self.bytes_of(token)))
        rows = zip(done.tokens, done.logprobs, done.alternatives, strict=False)
        top = [
            {name(other): value for other, value in [*others, (token, score)]}
            for token, score, others in rows
        ]
        return {
            "tokens": [name(token) for token in done.tokens],
            "token_logprobs": done.logprobs,
            "top_logprobs": top if body.alternatives else None,
            "text_offset": offsets,
        }

    def of_prompt(self, tokens: Sequence[int], scores: PromptScores) -> list[dict | None]:
        """vLLM's `prompt_logprobs`: by token id; the first token has nothing before it."""
        told: list[dict[str, Any] | None] = [None]
        rows = zip(
            tokens[1:],
            scores.logprob.tolist(),
            scores.rank.tolist(),
            scores.likely.tolist(),
            scores.likely_logprob.tolist(),
            strict=True,
        )
        for token, score, rank, likely, values in rows:
            ranked = zip(likely, values, range(1, len(likely) + 1), strict=True)
            others = [one for one in ranked if one[0] != token]
            told.append(
                {
                    str(one): {
                        "logprob": value,
                        "rank": place,
                        "decoded_token": shown(self.bytes_of(one), ""),
                    }
                    for one, value, place in [(token, score, rank), *others]
                }
            )
        return told

    def bytes_of(self, token: int) -> bytes:
        """What a token is in UTF-8, which may be a part of a character."""
        if token not in self._known:
            self._known[token] = self._bytes_of(token)
        return self._known[token]

    def _bytes_of(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].content.encode()
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the model's head beyond the vocabulary
            return b""
        if "ByteLevel" in self._kinds and all(letter in self._byte for letter in piece):
            return bytes(self._byte[letter] for letter in piece)
        if "ByteFallback" in self._kinds and len(piece) == 6 and piece[:3] == "<0x":
            return bytes.fromhex(piece[3:5])
        if self._kinds & {"Metaspace", "Replace"}:
            piece = piece.replace("\u2581", " ")
        return piece.encode("utf-8", "replace")


def shown(data: bytes, mark: str) -> str:
    r"""A token's text; where it is no whole text its bytes, behind a mark.

    >>> shown("é".encode(), ""), shown(b"\xc3", "bytes:")
    ('é', 'bytes:\\xc3')
    """
    try:
        return data.decode()
    except UnicodeDecodeError:
        return mark + "".join(f"\\x{byte:02x}" for byte in data)


def _kinds(decoder: Any) -> set[str]:
    """The types of a decoder and of those inside it."""
    if not isinstance(decoder, Mapping):
        return set()
    inside = [_kinds(one) for one in decoder.get("decoders", [])]
    return {str(decoder.get("type"))}.union(*inside)


def _byte_letters() -> str:
    """GPT-2's letter for every byte: itself where it can be printed, else the next beyond 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return "".join(chr(byte if byte in plain else next(others)) for byte in range(256))
