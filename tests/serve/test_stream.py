"""Texts that are shown before they are finished."""

import asyncio

import pytest

from jaxdistill.models.requests import Completion, Request
from jaxdistill.serve import answering, stream


@pytest.mark.parametrize(
    ("text", "stops", "shown"),
    [
        ("one, STO", ("STOP",), "one, "),
        ("one, STOP", ("STOP!",), "one, "),
        ("aaab", ("ab!", "aaabc"), ""),
        ("S S", ("S T", "SS"), "S "),
        ("all of it", ("STOP",), "all of it"),
        ("all of it", (), "all of it"),
        ("caf\ufffd", (), "caf"),
        ("", ("x",), ""),
    ],
)
def test_what_is_shown_stays(text, stops, shown):
    assert stream.settled(text, stops) == shown
    for size in range(len(text) + 1):  # what was shown of a shorter text is never taken back
        assert text.startswith(stream.settled(text[:size], stops))


def test_pieces_are_numbered_by_prompt_and_sample_and_add_up():
    found = []
    asked = [Request([1], max_new_tokens=3, samples=2, stream=number) for number in range(2)]
    made = stream.Stream(asked, live=True, put=found.append)
    assert all(request.tag is made for request in made.requests) and made.samples == 4
    made.hear(made.requests[1], 0, "Yes")
    made.hear(made.requests[1], 0, "Yes\ufffd")
    done = [
        Completion(request, sample, [1], [0.0], [0.0], "stop", True)
        for request in made.requests
        for sample in range(2)
    ]
    for one in done:
        assert not made.finished
        made.end(one, "Yes.")
    assert made.finished
    assert [piece[:2] for piece in found] == [
        (2, "Yes"),
        (0, "Yes."),
        (1, "Yes."),
        (2, "."),
        (3, "Yes."),
    ]
    assert [piece.done for piece in found[1:]] == done


class _AllThere(answering.PendingAnswer):
    """An answer of which every piece is there already."""

    def __init__(self):
        pass

    async def events(self):
        for _ in range(20):
            yield b"data"

    def close(self):
        pass


def test_who_hangs_up_is_written_to_no_more_even_if_all_pieces_are_there():
    sent = []

    async def main():
        gone = asyncio.Event()

        async def receive():
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)
            asyncio.get_running_loop().call_soon(gone.set)  # as asyncio tells of a broken pipe

        await answering.EventStream(_AllThere())({}, receive, send)

    asyncio.run(main())
    assert len(sent) < 8  # asyncio warns of the fifth write into a pipe that is broken
