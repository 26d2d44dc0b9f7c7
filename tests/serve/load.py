"""Many clients at the same time, good and bad ones, and what became of them.

python -m tests.serve.load PORT CLIENTS SECONDS SEED     prints the outcomes as JSON
"""

import asyncio
import collections
import contextlib
import json
import random
import sys
import time

from tests.serve.clients import JSON, raw

# What is asked: few enough that each is asked often, and has one answer.
ASKED = [
    {"prompt": "Hello"[: 1 + number], "max_tokens": 3 + 2 * number, "n": 1 + number % 3, "seed": 7}
    for number in range(5)
]
HEALTH = raw(b"", "Connection: close\r\n", "GET /health").replace(b"Content-Length: 0\r\n", b"")
CLOSE = "Connection: close\r\n"
KINDS = {"whole": 6, "stream": 4, "hang up": 4, "drip": 2, "foreign": 1, "burst": 1}


class Load:
    """The clients of one server.

    Attributes:
      found: how often each outcome was seen; all but those of `GOOD` are the server's fault.
      slowest: seconds of the slowest answer of /health.
    """

    GOOD = ("answered", "streamed", "busy", "hung up", "dripped", "refused")

    def __init__(self, port, seed):
        self._port, self._random = port, random.Random(seed)
        self.found, self.slowest = collections.Counter(), 0.0
        self._answers = {}

    async def run(self, clients, seconds):
        """Lets so many clients ask for so long, and whoever asks about the server's health."""
        end = time.monotonic() + seconds
        await asyncio.gather(self._probe(end), *(self._client(end) for _ in range(clients)))

    async def _client(self, end):
        while time.monotonic() < end:
            (kind,) = self._random.choices(list(KINDS), list(KINDS.values()))
            await getattr(self, f"_{kind.replace(' ', '_')}")()

    async def _probe(self, end):
        while time.monotonic() < end:
            began = time.monotonic()
            said = await self._say(HEALTH)
            self.slowest = max(self.slowest, time.monotonic() - began)
            if not said.startswith(b"HTTP/1.1 200"):
                self.found["no health"] += 1
            await asyncio.sleep(0.1)

    async def _say(self, data):
        """Everything that the server says to these bytes."""
        try:
            async with asyncio.timeout(120):
                reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
                with contextlib.closing(writer):
                    writer.write(data)
                    await writer.drain()
                    return await reader.read()
        except TimeoutError:
            self.found["no answer"] += 1
        except OSError as error:
            self.found[f"cut off: {type(error).__name__}"] += 1
        return b""

    async def _ask(self, number, stream):
        """The texts of one answer, or None; what it should be is known after the first one."""
        said = await self._say(raw(ASKED[number] | {"stream": stream}, JSON + CLOSE))
        head, _, body = said.partition(b"\r\n\r\n")
        if head.startswith(b"HTTP/1.1 503") and b"retry-after" in head.lower():
            self.found["busy"] += 1
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.found["lost"] += 1
            return
        texts = [""] * ASKED[number]["n"]
        if stream:
            events = [line for line in body.splitlines() if line.startswith(b"data: ")]
            if events[-1] != b"data: [DONE]":
                self.found["cut short"] += 1
                return
            told = [json.loads(event.removeprefix(b"data: ")) for event in events[:-1]]
        else:
            told = [json.loads(body)]
        for choice in (choice for one in told for choice in one["choices"]):
            texts[choice["index"]] += choice["text"]
        right = self._answers.setdefault(number, texts) == texts
        self.found["mixed" if not right else "streamed" if stream else "answered"] += 1

    def _number(self):
        return self._random.randrange(len(ASKED))

    async def _whole(self):
        await self._ask(self._number(), False)

    async def _stream(self):
        await self._ask(self._number(), True)

    async def _burst(self):
        await asyncio.gather(*(self._ask(self._number(), False) for _ in range(20)))

    async def _foreign(self):
        said = await self._say(raw(ASKED[0], JSON + CLOSE + "Origin: https://evil.example\r\n"))
        words = {b"403": "refused", b"503": "busy"}
        self.found[words.get(said[9:12], "let in")] += 1

    async def _hang_up(self):
        body = {
            "prompt": "Hello",
            "max_tokens": 100,
            "n": 16,
            "stream": self._random.random() < 0.5,
        }
        await self._leave(raw(body), self._random.random())
        self.found["hung up"] += 1

    async def _drip(self):
        await self._leave(b"POST /v1/completions HTTP/1.1\r\nX: ", 2.0, b"a")
        self.found["dripped"] += 1

    async def _leave(self, data, seconds, more=b""):
        """Sends something, perhaps a little more, and goes."""
        with contextlib.suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", self._port)
            with contextlib.closing(writer):
                writer.write(data)
                for _ in range(10):
                    await asyncio.sleep(seconds / 10)
                    writer.write(more)


def main(port, clients, seconds, seed):
    """Prints what became of the clients."""
    load = Load(port, seed)
    asyncio.run(load.run(clients, seconds))
    bad = {name: count for name, count in load.found.items() if name not in Load.GOOD}
    print(json.dumps({"found": dict(load.found), "bad": bad, "slowest_health": load.slowest}))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
