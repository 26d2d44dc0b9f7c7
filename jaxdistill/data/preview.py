"""A row of a data set as text a person can read, the part that counts in the loss marked."""

from typing import Any

from jaxdistill.data.dataset import Dataset
from jaxdistill.data.rules import printable

# Around what counts in the loss.
OPEN, CLOSE = "⟦", "⟧"


def render_row(dataset: Dataset, index: int, tokenizer: Any) -> str:
    """Decodes one row: a line per segment, what counts in the loss between ⟦ and ⟧.

    Control characters come out escaped: the text of a data set must not steer a terminal.

    Args:
      dataset: from `pipeline.build`.
      index: the row.
      tokenizer: the one the data set was built with.

    Returns:
      Text, one block for each segment.
    """
    row = dataset[index]
    blocks = []
    for number in range(1, int(row["segment_ids"].max()) + 1):
        place = (row["segment_ids"] == number).nonzero()[0]
        # The mask belongs to the position that predicts: the token that counts is the next one.
        counted = [False, *row["mask"][place[:-1]].tolist()]
        runs: list[tuple[bool, list[int]]] = []
        for token, counts in zip(row["tokens"][place].tolist(), counted, strict=True):
            if not runs or runs[-1][0] != counts:
                runs.append((counts, []))
            runs[-1][1].append(token)
        texts = [(counts, printable(tokenizer.decode(tokens))) for counts, tokens in runs]
        shown = "".join(f"{OPEN}{text}{CLOSE}" if counts else text for counts, text in texts)
        head = f"[row {index}, segment {number}: {len(place)} tokens, {sum(counted)} count]"
        blocks.append(f"{head}\n{shown}")
    return "\n".join(blocks)
