"""What a server says: asked once, on the disk before it is used, torn, damaged or whole."""

import json

import numpy as np
import pytest

from jaxdistill.data.prompts import Prompt
from jaxdistill.data.routes import MicroBatchLayout, TeacherRoutes
from jaxdistill.errors import ModelError, StorageError
from jaxdistill.reasoning.asking import Job, SamplingParams
from jaxdistill.reasoning.scored import Scored
from jaxdistill.rollouts.answers import Answer
from jaxdistill.rollouts.rows import rows_of
from jaxdistill.rollouts.scores import BILL, FILE, RoutedScores, Scores


def answer(*tokens, prompt=(1, 2), **notes):
    ids = np.array(tokens, np.int32)
    none = np.zeros(len(ids), np.float32)
    return Answer(Prompt(np.array(prompt, np.int32), notes), 0, 0, 0, ids, False, none, none)


class Server:
    """Says -token / 10 - the number of questions before / 100; of token 9 nothing."""

    def __init__(self):
        self.asked = []

    def score(self, texts):
        for name, tokens in reversed(texts):  # they come in any order
            job = Job("", "", SamplingParams(1), tag=(name, tokens))
            self.asked.append(tokens)
            if 9 in tokens:
                yield Scored(job, 0, "", 0, None, "it hung up", failed=True)
                continue
            own = -np.array(tokens[1:], np.float32) / 10 - len(self.asked) / 100
            yield Scored(job, 0, "", 1, None, "stop", own=own)

    def spent(self):
        return {"requests": float(len(self.asked)), "cost": 0.5 * len(self.asked)}


def opened(folder, **options):
    server = Server()
    return server, Scores(lambda: server, folder, model="m", **options)


FIRST = [answer(3, 4), answer(5, prompt=(7,)), answer(3, 4, 6)]


def test_the_same_answers_are_asked_about_once_and_read_to_the_bit(tmp_path):
    server, scores = opened(tmp_path)
    found = scores(FIRST)
    assert server.asked == [[1, 2, 3, 4, 6], [7, 5], [1, 2, 3, 4]]
    for one, tokens, nth in zip(found, [(3, 4), (5,), (3, 4, 6)], [3, 2, 1], strict=True):
        expected = -np.array(tokens, np.float32) / 10 - nth / 100
        np.testing.assert_array_equal(one, expected.astype(np.float32))
        assert one.dtype == np.float32
    assert scores.tokens == 6 and scores.cost == 1.5 and scores.seconds > 0
    later, again = opened(tmp_path)
    for one, other in zip(again(FIRST), found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not later.asked and again.tokens == 0
    again(FIRST[:2])  # other answers together
    assert len(later.asked) == 2
    assert json.loads((tmp_path / BILL).read_text()) == {"requests": 5.0, "cost": 2.5}
    other = Server()
    Scores(lambda: other, tmp_path, model="n")(FIRST)  # another model
    assert len(other.asked) == 3


def test_the_beginning_of_an_answer_is_all_that_is_asked_about(tmp_path):
    server, scores = opened(tmp_path, most=1)
    assert [len(one) for one in scores(FIRST)] == [1, 1, 1]
    assert server.asked[0] == [1, 2, 3]
    assert [len(one) for one in opened(tmp_path)[1](FIRST)] == [2, 1, 3]


def test_what_came_is_kept_and_what_failed_is_asked_again(tmp_path):
    _, scores = opened(tmp_path)
    mixed = [answer(3), answer(9), answer(4)]
    with pytest.raises(ModelError, match=r"1 of 3 answers .* \(it hung up\): nothing was learned"):
        scores(mixed)
    server, again = opened(tmp_path)
    with pytest.raises(ModelError, match="1 of 3"):
        again(mixed)
    assert server.asked == [[1, 2, 9]]


def test_a_stop_keeps_what_came(tmp_path):
    asked = []
    stopping = lambda: asked.append(0) or len(asked) == 2
    server, scores = opened(tmp_path, stop=stopping)
    assert scores(FIRST) is None and len(server.asked) == 2
    later, again = opened(tmp_path)
    assert again(FIRST) is not None and later.asked == [[1, 2, 3, 4]]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"logprobs": "', '"logprobs": "AAAA'),
        lambda text: text.replace('"logprobs": "', '"logprobs": "?'),
        lambda text: text.replace('"logprobs"', '"logprob"'),
        lambda text: text.replace('"crc32": ', '"crc32": 1'),
        lambda text: text.replace('"sizes": [2, 1, 3]', '"sizes": [3, 1, 2]')[:-30],
        lambda text: text.replace("[2, 1, 3]", "[2, 1, 3, -0.5]"),
        lambda text: text.replace("[2, 1, 3]", "[7, 1, -2]"),
        lambda text: text.replace("[2, 1, 3]", "[true, 2, 3]"),
        lambda text: text.replace("[2, 1, 3]", "[1, 2, 3]"),
        lambda text: text.replace("[2, 1, 3]", "[]"),
        lambda text: "[" * 100_000 + text,
        lambda text: text.encode("utf-16"),
    ],
)
def test_what_is_no_log_probability_is_asked_again(damage, tmp_path):
    opened(tmp_path)[1](FIRST)
    path = tmp_path / FILE
    told = damage(path.read_text())
    path.write_bytes(told if isinstance(told, bytes) else told.encode())
    server, scores = opened(tmp_path)
    found = scores(FIRST)
    assert server.asked and [len(one) for one in found] == [2, 1, 3]
    later, again = opened(tmp_path)
    for one, other in zip(again(FIRST), found, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not later.asked  # the new line stands alone, whatever lies before it


OF_THREE = [
    answer(3, 4, teacher="code"), answer(5, teacher="math"), answer(6, prompt=(7,), teacher="law"),
    answer(8, teacher="code"),
]  # fmt: skip


def test_each_server_of_several_is_asked_about_its_own_answers(tmp_path):
    """Those of law are for a teacher that is no server."""
    servers = {name: Server() for name in ("math", "code")}
    scores = RoutedScores({
        name: Scores(lambda server=server: server, tmp_path, model="m", teacher=name)
        for name, server in servers.items()
    })  # fmt: skip
    first, second, third, fourth = scores(OF_THREE)
    assert servers["math"].asked == [[1, 2, 5]] and third is None
    assert servers["code"].asked == [[1, 2, 8], [1, 2, 3, 4]]
    np.testing.assert_allclose(first, [-0.32, -0.42])
    np.testing.assert_allclose(second, [-0.51])
    np.testing.assert_allclose(fourth, [-0.81])
    assert scores.tokens == 4 and scores.cost == 1.5 and scores.seconds > 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "scores-math.jsonl", "scores-code.jsonl", "spent-math.json", "spent-code.json",
    }  # fmt: skip
    assert scores(OF_THREE[2:3]) == [None] and scores.tokens == 0  # nobody is asked
    broken = RoutedScores({"math": Scores(Server, tmp_path, model="m", teacher="math")})
    with pytest.raises(ModelError, match=r"teachers.math.api: 1 of 1 answers"):
        broken([answer(9, teacher="math")])


def test_rows_of_several_have_a_tree_for_each_server():
    taught = [np.float32([-0.1, -0.2]), np.float32([-0.3]), None, np.float32([-0.4])]
    rows, _ = rows_of(
        OF_THREE, seq_len=8, pad=0, packing_by="best_fit", sizes=[1, 2, 4], distilled=None,
        taught=taught, servers=["math", "code"], routing=TeacherRoutes(("law", "math", "code")),
        layout=MicroBatchLayout(3, 1),
    )  # fmt: skip
    found = {}
    for row in rows:
        route = ("", "law", "math", "code")[row["route"]]
        assert row["teacher"].keys() == {"math", "code"}
        for name, tree in row["teacher"].items():
            told = tree["logprobs"][row["mask"], 0].tolist()
            assert np.count_nonzero(tree["logprobs"]) == (len(told) if name == route else 0)
            found[route] = told if name == route else found.get(route)
    assert found["math"] == [np.float32(-0.3)] and found["law"] is None
    assert sorted(found["code"]) == sorted(np.float32([-0.1, -0.2, -0.4]).tolist())


def test_what_cannot_be_written_down_is_not_used(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(StorageError, match="cannot be read: it is no regular file"):
        opened(tmp_path)[1](FIRST)


def test_a_row_has_them_where_the_token_is_predicted():
    taught = [np.array([-0.1, -0.2], np.float32), np.array([-0.3], np.float32)]
    (row,), _ = rows_of(
        [answer(3, 4), answer(5, prompt=(7,))],
        seq_len=8,
        pad=0,
        packing_by="best_fit",
        sizes=[1],
        distilled=None,
        taught=taught,
    )
    told = row["teacher"]["logprobs"]
    assert told.shape == (8, 1) and told.dtype == np.float32
    said = dict(
        zip(row["targets"][row["mask"]].tolist(), told[row["mask"], 0].tolist(), strict=True)
    )
    assert said == {3: pytest.approx(-0.1), 4: pytest.approx(-0.2), 5: pytest.approx(-0.3)}
    assert not told[~row["mask"]].any()
