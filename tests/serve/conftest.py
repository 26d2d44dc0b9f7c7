"""One tiny model and one engine behind every server of these tests."""

import pytest

pytest.importorskip("uvicorn", reason="needs the extra serve")

from jaxdistill import models
from jaxdistill.data.prompting import Prompter
from jaxdistill.models.byte_tokenizer import byte_tokenizer
from jaxdistill.serve import app, listening, service
from tests.serve.clients import KEY, LENGTH, SLOTS


@pytest.fixture(scope="session")
def talker():
    """A random model of one layer with one token per byte: programs for it compile in seconds."""
    tokenizer = byte_tokenizer()
    config = models.DecoderConfig(
        "llama",
        vocab_size=len(tokenizer),
        embed=16,
        mlp=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_dim=8,
        max_positions=512,
        initializer_range=0.3,
    )
    return models.random(config, 0, tokenizer=tokenizer)


@pytest.fixture(scope="session")
def served(talker):
    """The service."""
    made = service.Service(talker, slots=SLOTS, length=LENGTH)
    yield made
    made.close()
    assert made.engine.pending == 0


def _at(made, key):
    with listening.running(app.make_app(made, key=key), listening.bind("127.0.0.1", 0)) as port:
        yield port


@pytest.fixture(scope="session")
def port(served):
    """Of a server that anybody on this machine may ask."""
    yield from _at(served, None)


@pytest.fixture(scope="session")
def locked(served):
    """The port of a server with a key, on the same engine."""
    yield from _at(served, KEY)


@pytest.fixture(scope="session")
def client(locked):
    """OpenAI's own client."""
    openai = pytest.importorskip("openai", reason="needs the extra api")
    url = f"http://127.0.0.1:{locked}/v1"
    with openai.OpenAI(base_url=url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture
def chatting(served, talker, monkeypatch):
    """The model with a chat template, for a while: it prints contents and nothing else."""
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    monkeypatch.setattr(talker.tokenizer, "chat_template", template)
    monkeypatch.setattr(served, "_prompter", Prompter(talker.tokenizer))
