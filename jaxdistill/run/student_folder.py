"""The student's small files in a run, sealed: what a checkpoint's arrays mean."""

import json

from jaxdistill.formats import new_folder
from jaxdistill.formats.config_json import write_config
from jaxdistill.models import lora
from jaxdistill.references import STUDENT
from jaxdistill.run import participants
from jaxdistill.run.folder import RunDir


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
    with new_folder.renewed(run.path / STUDENT) as inside:
        for name, content in described.items():
            (inside / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        models.tokenizer.save_pretrained(str(inside))
