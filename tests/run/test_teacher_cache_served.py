"""A teacher behind a server is asked once: what was paid for is kept, and learned from."""

import json

import numpy as np
import pytest

pytest.importorskip("openai", reason="needs the extra api")

from jaxdistill import commands
from jaxdistill.data.teacher_cache import catalog, formats
from jaxdistill.data.teacher_cache.store import Store
from jaxdistill.errors import ConfigError, DamagedError, MismatchError, ModelError
from jaxdistill.run import participants, setup, teacher_cache, teacher_cache_served, texts
from tests.reasoning import scoring_server

STUDENT = "student={random: {layers: 1, embed: 8, mlp: 8, heads: 1}}"


@pytest.fixture
def server():
    with scoring_server.running() as made:
        yield made


@pytest.fixture
def asking(server, load_config, tmp_path):
    """(overrides, options) -> what capturing from the server gives."""
    (tmp_path / "train.txt").write_text("one text\n\nanother text\n\na third\n\none text")
    (tmp_path / "eval.txt").write_text("held out")
    where = f"base_url: '{server.url}', model: m, retries: 0, max_failures: 1, concurrency: 1"
    data = [
        f"data.{n}=[{{path: {tmp_path}/{n}.txt, format: paragraphs}}]" for n in ("train", "eval")
    ]

    def config(*overrides):
        teacher = f"teacher={{api: {{{where}, price_in: 1.0}}, cache: {tmp_path}/c}}"
        method = "method={name: kd, alpha: 0.5}"
        return load_config(tmp_path, teacher, STUDENT, method, *data, *overrides)

    def ask(*overrides, **options):
        options = {"format": "topk", "k": 5} | options
        return teacher_cache.capture(config(*overrides), commands.TeacherCache(**options))

    ask.config = config
    return ask


def test_a_servers_answers_are_stored_once_and_learned_from(asking, server, tmp_path):
    found = asking()
    assert found["whole"] and found["segments"] == 4 == len(server.asked)
    assert found["spent"]["requests"] == 4 and found["spent"]["cost"] > 0
    store = Store(str(tmp_path / "c"))
    for entry in range(len(store)):
        tokens, stored = store.tokens(entry), store.reading(entry)()
        logp = scoring_server.logprobs_of(tokens)[:-1]
        best = np.argsort(-logp, axis=-1)[:, :5]
        np.testing.assert_array_equal(formats.unpack_ids(stored["ids"]), best)
        expected = np.take_along_axis(logp, best, -1)
        np.testing.assert_allclose(stored["logprobs"], expected, atol=2**-9)
        np.testing.assert_allclose(stored["rest"][:, 0], 1 - np.exp(expected).sum(-1), atol=1e-6)
    config = asking.config()
    mesh = setup.mesh_of(config)
    models = participants.shapes_of(config, mesh)
    data = texts.data_of(config.data, models.tokenizer)
    row = models.teaching.beside(data, models.tokenizer)["train"][0]
    assert row["teacher"]["ids"].shape == (32, 5, 2) and row["teacher"]["rest"].any()
    assert asking()["segments"] == 0 and len(server.asked) == 4


def test_what_was_paid_for_is_kept_when_the_server_stops(asking, server, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher_cache_served, "MOST", 1)  # a part for every text
    answered = []

    def then_nothing(told):
        answered.append(told)
        return told if len(answered) <= 2 else None

    server.spoil = then_nothing
    with pytest.raises(ModelError, match="prompt_logprobs"):
        asking()
    with pytest.raises(ConfigError, match="has not ended"):
        Store(str(tmp_path / "c"))
    server.spoil, before = (lambda told: told), len(server.asked)
    found = asking()
    assert found["whole"] and len(server.asked) == before + 2
    spent = json.loads((tmp_path / "c" / catalog.PENDING / "spent.json").read_text())
    assert spent["requests"] == len(server.asked)
    Store(str(tmp_path / "c"), thorough=True)


def test_answers_within_a_part_are_kept_too(asking, server, tmp_path):
    answered = []

    def then_nothing(told):
        answered.append(told)
        return told if len(answered) <= 3 else None

    server.spoil = then_nothing
    with pytest.raises(ModelError):
        asking()
    server.spoil, before = (lambda told: told), len(server.asked)
    bill = tmp_path / "c" / catalog.PENDING / "spent.json"
    paid = bill.read_text()
    for text in ('{"requests": NaN}', '{"cost": -1}', "{", '{"cost": 1, "cost": 0}'):
        bill.write_text(text)
        with pytest.raises(DamagedError, match="spent.json: .*mend or remove it"):
            asking()
    bill.write_text(paid)
    assert asking()["whole"] and len(server.asked) == before + 1


@pytest.mark.parametrize(
    ("overrides", "options", "words"),
    [
        ((), {"format": "hidden", "k": None}, "a server says the likeliest tokens only: use topk"),
        ((), {"temperatures": (2.0,)}, "does not say log Z"),
        ((), {"k": 258}, "k = 258: the vocabulary has 257"),
    ],
)
def test_what_a_server_cannot_say_is_refused(overrides, options, words, asking, server):
    with pytest.raises(ConfigError, match=words):
        asking(*overrides, **options)
    assert not server.asked


def test_more_tokens_than_the_server_allows(asking):
    with pytest.raises(ModelError, match="prompt logprobs of 30, more than 20"):
        asking(k=30)


def test_another_server_model_is_another_teacher(asking, server, tmp_path):
    asking()
    with pytest.raises(MismatchError, match="teacher.server: 'm' there, 'n' here"):
        asking("teacher.api.model=n")


def test_a_server_takes_no_part_in_a_step(load_config, tmp_path):
    teacher = "teacher={api: {base_url: http://x/v1, model: m}}"
    with pytest.raises(ConfigError, match="a server takes no part in a step"):
        load_config(tmp_path, teacher, STUDENT)
