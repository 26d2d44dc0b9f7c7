"""One of two processes that must agree; prints what it learned."""

import json
import time

import jax

from jaxdistill import agree, processes
from jaxdistill.errors import DataError, UserError


def tried(work):
    """What a function gave, or the kind and the words of its error."""
    try:
        return work()
    except (UserError, RuntimeError) as error:
        return [type(error).__name__, str(error)]


def main() -> None:
    processes.start(2)
    rank = jax.process_index()

    def fail_in_one():
        if rank == 1:
            raise DataError("a: no file\nb: no file")

    def crash():
        raise RuntimeError("division")

    # Slower than a question to the coordinator waits, and before anything connects the processes.
    agree._PATIENCE_MS = 200
    slow = tried(lambda: agree.by_leader(lambda: time.sleep(1) or "built"))
    vote = agree.Vote()
    # Process 1 alone wishes, from the third call on, until it is heard.
    heard = []
    for call in range(7):
        heard.append(vote(2 if rank == 1 and call >= 2 and 2 not in heard else 0))
    order = []
    agree.leader_first(lambda: order.append(agree.leads()))
    print(
        json.dumps(
            {
                "slow": slow,
                "heard": heard,
                "order": order,
                "together": tried(lambda: agree.together(lambda: rank)),
                "failure": tried(lambda: agree.together(fail_in_one)),
                "leader": tried(lambda: agree.by_leader(lambda: {"by": rank})),
                "crash": tried(lambda: agree.by_leader(crash)),
                "same": tried(lambda: agree.same({"train.steps": 3})),
                "other": tried(lambda: agree.same({"seed": 1, "train.steps": rank, f"r{rank}": 0})),
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main()
