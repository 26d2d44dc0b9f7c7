"""The student's small files in a run, sealed: what a checkpoint's arrays mean."""

import json
import pathlib
import sys

from jaxdistill.errors import DamagedError
from jaxdistill.formats import new_folder, sums
from jaxdistill.formats.config_json import write_config
from jaxdistill.models import lora
from jaxdistill.references import STUDENT
from jaxdistill.run import participants
from jaxdistill.run.folder import RunDir
from jaxdistill.safe import manifest


def keep(run: RunDir, models: participants.Models, adapters: lora.Lora | None) -> None:
    """Writes configuration, tokenizer and adapters, where they are not there as they should be.

    Raises:
      StorageError: if they cannot be written.
    """
    student = models.student
    described = {"config.json": write_config(student.config, "float32")}
    if student.generation:
        described["generation_config.json"] = dict(student.generation)
    if adapters is not None:
        described[lora.FILE] = lora.described(adapters, student.source)
    folder = run.path / STUDENT
    damaged = _damaged(folder)
    with new_folder.renewed(folder) as inside:
        for name, content in described.items():
            (inside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        models.tokenizer.save_pretrained(str(inside))
    if damaged is not None:
        run.event("student_renewed", reason=damaged)
        print(f"{damaged}: written again, as the run began with it", file=sys.stderr)


def _damaged(folder: pathlib.Path) -> str | None:
    """What is wrong with the folder of an earlier attempt; None: nothing, or there was none."""
    if not folder.is_dir():
        return None
    try:
        manifest.verify(folder, name=sums.FILE)
    except DamagedError as error:
        return str(error)
    return None
