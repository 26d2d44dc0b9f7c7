"""What the server answers: the engine's completions, in OpenAI's words, to its own client."""

import collections
import threading

import numpy as np
import pytest
from transformers.convert_slow_tokenizer import bytes_to_unicode

from jaxdistill.models.generator import Generator
from jaxdistill.models.requests import Request
from jaxdistill.models.text import text_of
from jaxdistill.reasoning.asking import Job, SamplingParams
from tests.serve.clients import KEY, LENGTH, SLOTS, post

ASKED = {"prompt": "Hello", "max_tokens": 10, "temperature": 0.8, "n": 3, "seed": 5}


def test_completions_are_the_engines(locked, talker):
    code, reply = post(locked, "/v1/completions", ASKED | {"logprobs": 0, "model": talker.source})
    engine = Generator(talker.config, talker.params, slots=SLOTS, length=LENGTH)
    tokens = talker.tokenizer("Hello")["input_ids"]
    engine.submit(Request(tokens, max_new_tokens=10, samples=3, temperature=0.8, seed=5))
    expected = sorted(engine.run(), key=lambda done: done.sample)
    texts = [text_of(talker.tokenizer, done) for done in expected]
    assert code == 200 and [c["text"] for c in reply["choices"]] == texts
    for choice, done in zip(reply["choices"], expected, strict=True):
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(done.logprobs, abs=1e-5)
        assert choice["logprobs"]["top_logprobs"] is None
        assert choice["finish_reason"] == done.reason
    assert reply["usage"]["prompt_tokens"] == 5
    again = post(locked, "/v1/completions", ASKED | {"logprobs": None})[1]
    assert [c["text"] for c in again["choices"]] == texts
    assert again["choices"][0]["logprobs"] is None


def test_lists_of_prompts_and_token_ids_are_answered_in_order(locked):
    asked = {"max_tokens": 6, "seed": 1, "n": 2}
    texts = post(locked, "/v1/completions", asked | {"prompt": ["ab", "c"]})[1]
    ids = post(locked, "/v1/completions", asked | {"prompt": [[64, 65], [66]]})[1]
    one = post(locked, "/v1/completions", asked | {"prompt": [64, 65]})[1]
    words = lambda reply: [choice["text"] for choice in reply["choices"]]
    assert words(texts) == words(ids) and words(one) == words(ids)[:2]
    assert [choice["index"] for choice in ids["choices"]] == [0, 1, 2, 3]
    assert (texts["usage"]["prompt_tokens"], one["usage"]["prompt_tokens"]) == (3, 2)


def _scores(talker, tokens):
    """float64 log-probabilities of what follows each token, without the engine."""
    padded = np.zeros((1, 96), np.int64)  # of one length: one program
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(talker.logits(padded)[0, : len(tokens)], np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_log_probabilities_of_a_prompt_are_those_of_the_model(locked, talker):
    tokens = [(7 * place) % 200 for place in range(90)]  # more than are scored at a time
    body = {"prompt": tokens, "max_tokens": 1, "prompt_logprobs": 3}
    told = post(locked, "/v1/completions", body)[1]["choices"][0]["prompt_logprobs"]
    assert len(told) == 90 and told[0] is None
    scores = _scores(talker, tokens)
    for place, entry in enumerate(told[1:]):
        token, row = tokens[place + 1], scores[place]
        order = np.argsort(-row)
        assert set(map(int, entry)) == {token, *order[:3].tolist()}
        for name, one in entry.items():
            assert one["logprob"] == pytest.approx(row[int(name)], abs=1e-4)
            assert one["rank"] == 1 + (row > row[int(name)]).sum()
    alone = post(locked, "/v1/completions", {"prompt": [5], "max_tokens": 1, "prompt_logprobs": 0})
    assert alone[1]["choices"][0]["prompt_logprobs"] == [None]


def _byte_of(tokenizer):
    """The byte of each token, by transformers' table of letters."""
    return {
        tokenizer.convert_tokens_to_ids(letter): byte for byte, letter in bytes_to_unicode().items()
    }


def test_alternatives_are_the_most_probable_tokens_with_their_bytes(locked, talker, chatting):
    body = {"messages": [{"role": "user", "content": "ab"}], "max_tokens": 5, "seed": 3}
    told = {"logprobs": True, "top_logprobs": 2}
    code, reply = post(locked, "/v1/chat/completions", body | told)
    content = reply["choices"][0]["logprobs"]["content"]
    byte_of = _byte_of(talker.tokenizer)
    token_of = {byte: token for token, byte in byte_of.items()}
    tokens = talker.tokenizer("ab")["input_ids"]
    for entry in content:
        (byte,), row = entry["bytes"], _scores(talker, tokens)[-1]
        assert entry["logprob"] == pytest.approx(row[token_of[byte]], abs=1e-4)
        assert entry["token"] == (chr(byte) if byte < 128 else f"\\x{byte:02x}")
        best = np.argsort(-row)[:2]
        assert [one["bytes"] for one in entry["top_logprobs"]] == [[byte_of[t]] for t in best]
        assert [one["logprob"] for one in entry["top_logprobs"]] == pytest.approx(
            row[best], abs=1e-4
        )
        tokens.append(token_of[byte])
    assert len(content) == 5 and code == 200
    plain = post(locked, "/v1/completions", ASKED | {"logprobs": 2})[1]["choices"][0]["logprobs"]
    assert all(2 <= len(one) <= 3 for one in plain["top_logprobs"])
    assert plain["text_offset"][0] == 0 and len(plain["text_offset"]) == 10


def test_our_client_reads_our_server(locked, served):
    pytest.importorskip("openai", reason="needs the extra api")
    from jaxdistill.reasoning.served import ApiClient

    api = ApiClient(f"http://127.0.0.1:{locked}/v1", served.name, key=KEY, concurrency=5)
    settings = SamplingParams(max_new_tokens=6, temperature=1.0, stop=("zz",))
    jobs = collections.deque(Job(f"q{n}", "ab" * (n + 1), settings, count=2) for n in range(6))
    answers = list(api.ask(jobs))
    assert len(answers) == 12 and not any(answer.failed for answer in answers)
    assert all(answer.logprob < 0 and answer.tokens <= 6 for answer in answers)
    assert api.spent()["tokens_out"] == sum(answer.tokens for answer in answers)


def test_requests_at_the_same_time_share_the_engine(locked):
    found = {}

    def one(number):
        body = {"prompt": "a" * (number + 1), "max_tokens": 12, "seed": number, "n": 2}
        found[number] = post(locked, "/v1/completions", body)

    threads = [threading.Thread(target=one, args=(number,)) for number in range(9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    body = {"prompt": "aaa", "max_tokens": 12, "seed": 2, "n": 2}
    alone = post(locked, "/v1/completions", body)
    assert all(code == 200 for code, _ in found.values())
    texts = lambda reply: [choice["text"] for choice in reply["choices"]]
    assert texts(found[2][1]) == texts(alone[1])


ADJUSTED = {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": 0.3}


def test_biases_penalties_and_stop_tokens_change_what_is_written(locked, talker):
    biases = {65: 1.5, 70: -2.0, 80: 1.0}
    body = {"prompt": "Hello", "max_tokens": 12, "temperature": 0, **ADJUSTED, "logprobs": 0}
    body["logit_bias"] = {str(token): added for token, added in biases.items()}
    (choice,) = post(locked, "/v1/completions", body)[1]["choices"]
    read, written = talker.tokenizer("Hello")["input_ids"], []
    for _ in range(12):  # the definitions, in float64; a common constant does change a division
        padded = np.zeros((1, 96), np.int64)
        padded[0, : len(read + written)] = read + written
        row = np.asarray(talker.logits(padded)[0, len(read + written) - 1], np.float64)
        for token, added in biases.items():
            row[token] += added
        for token in {*read, *written}:
            row[token] = row[token] / 1.3 if row[token] > 0 else row[token] * 1.3
        for token in set(written):
            row[token] -= 0.4 * written.count(token) + 0.3
        written.append(int(row.argmax()))
    assert choice["text"] == talker.tokenizer.decode(written)
    stop = written[3]
    size = written.index(stop)
    (choice,) = post(locked, "/v1/completions", body | {"stop_token_ids": [stop]})[1]["choices"]
    assert choice["text"] == talker.tokenizer.decode(written[:size])
    assert choice["finish_reason"] == "stop" and len(choice["logprobs"]["tokens"]) == size + 1


def test_the_official_client_can_use_every_route(client, locked, chatting):
    (row,) = client.models.list().data
    assert client.models.retrieve(row.id).id == row.id
    with pytest.raises(openai().NotFoundError, match="does not exist") as caught:
        client.models.retrieve("another")
    assert caught.value.code == "model_not_found"
    turns = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    asked = {"model": row.id, "messages": turns, "max_completion_tokens": 9, "seed": 4}
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.role == "assistant" and whole.usage.completion_tokens == 9
    assert len(whole.choices[0].logprobs.content[0].top_logprobs) == 1
    events = list(client.chat.completions.create(**asked, stream=True))
    said = "".join(event.choices[0].delta.content for event in events)
    assert said == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"


def test_another_model_is_refused_as_openai_does(locked, client, chatting):
    for path, body in (
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
    ):
        for name in ("gpt-4o", client.models.list().data[0].id + " ", "x" * 900):
            code, reply = post(locked, path, body | {"model": name, "max_tokens": 1})
            assert code == 404 and reply["error"]["code"] == "model_not_found"
            assert reply["error"]["type"] == "invalid_request_error"
        for name in (None, ""):
            assert post(locked, path, body | {"model": name, "max_tokens": 1})[0] == 200


def openai():
    """The module of the official client."""
    return pytest.importorskip("openai", reason="needs the extra api")


def _texts(stream, count=1):
    """The pieces of every sample, the reasons, and the events."""
    pieces, reasons, events = [[] for _ in range(count)], [None] * count, list(stream)
    for event in events:
        for choice in event.choices:
            pieces[choice.index].append(choice.text)
            assert reasons[choice.index] is None  # nothing follows the last piece
            reasons[choice.index] = choice.finish_reason
    return pieces, reasons, events


def test_a_stream_adds_up_to_the_whole(client):
    asked = {
        "model": client.models.list().data[0].id,
        "prompt": ["Hello", "You"],
        "max_tokens": 60,
        "n": 2,
        "seed": 5,
    }
    whole = client.completions.create(**asked)
    stream = client.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    pieces, reasons, events = _texts(stream, 4)
    assert ["".join(texts) for texts in pieces] == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert min(map(len, pieces)) > 2  # it came piece by piece
    assert events[-1].usage == whole.usage and len({event.id for event in events}) == 1


def test_a_stream_holds_back_what_may_become_a_stop_string(client):
    asked = {
        "model": client.models.list().data[0].id,
        "prompt": "Hello",
        "max_tokens": 60,
        "seed": 5,
    }
    text = client.completions.create(**asked).choices[0].text
    stop = text[25:55]  # begins in one call of the engine and ends in a later one
    place = text.index(stop)
    (pieces,), (reason,), _ = _texts(client.completions.create(**asked, stop=[stop], stream=True))
    assert ("".join(pieces), reason) == (text[:place], "stop")
    assert len(pieces) > 1
    never = stop[:-1] + chr(1)  # nearly comes: what was held back is told in the end
    (pieces,), (reason,), _ = _texts(client.completions.create(**asked, stop=[never], stream=True))
    assert ("".join(pieces), reason) == (text, "length")
