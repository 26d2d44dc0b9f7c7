"""The texts of a run: rows to learn from, held-out rows, and prompts that the student answers."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxdistill import methods
from jaxdistill.config.data import Data
from jaxdistill.config.rollout import PromptSource
from jaxdistill.data import held_out, pipeline, prompts
from jaxdistill.data.dataset import Dataset
from jaxdistill.data.privileged import PrivilegedView
from jaxdistill.data.records import PAIRS
from jaxdistill.data.rendering import read_template
from jaxdistill.data.routes import TeacherRoutes
from jaxdistill.data.second_view import SecondView
from jaxdistill.data.sources import open_source
from jaxdistill.errors import DataError

RunData = Dataset | prompts.Prompts  # either has a fingerprint, and lists what was left out of it


def data_of(
    data: Data,
    tokenizer: Any,
    second: SecondView | None = None,
    *,
    routing: TeacherRoutes | None = None,
    context: PrivilegedView | None = None,
    network: bool = False,
) -> dict[str, Dataset]:
    """The training rows, where there are any, and the held-out ones, built or from the cache.

    Args:
      data: the options of the data.
      tokenizer: of the run.
      second: another model's tokens, in which the rows give the same documents too.
      routing: several teachers, of which every record is for one.
      context: the teacher's prompts, which the training rows have beside the student's.
      network: whether sources may be downloaded.

    Raises:
      DataError: as `pipeline.build`, or if held-out records are trained on.
    """
    train, held = (
        [
            open_source(
                one.path,
                format=one.format,
                origin=one.origin,
                weight=one.weight,
                teacher=one.teacher,
                allow_network=network,
            )
            for one in sources
        ]
        for sources in (data.train, data.eval_files)
    )
    share = data.held_out_share
    if share is not None:
        train, held = held_out.split(train, share)
    options = reading_of(data) | data.model_dump(
        include={"cache_dir", "max_bad_fraction", "workers"}
    )
    built = {
        name: pipeline.build(sources, tokenizer, name=name, second=view, routing=routing, **options)
        for name, sources, view in (("train", train, context or second), ("eval", held, second))
        if sources
    }
    if "train" in built:
        held_out.check(built["train"], built["eval"])
        # Records that were chosen one by one may repeat others' texts; files were given as apart.
        held_out.check_stretches(built["train"], built["eval"], tokenizer, refuses=share is None)
    return built


def reading_of(data: Data) -> dict[str, Any]:
    """How a run makes rows of its texts: options of `pipeline.build`.

    Raises:
      DataError: if its chat template cannot be read.
    """
    options = data.model_dump(
        include={"seq_len", "packing", "loss_on", "on_bad_record", "turns", "long_documents",
                 "special_tokens", "template_kwargs"}
    )  # fmt: skip
    if data.chat_template is not None:
        options["chat_template"] = read_template(data.chat_template)
    return options


def check_kinds(method: methods.Options, data: Mapping[str, Dataset]) -> None:
    """Refuses pairs for a method that prefers nothing, and other records for one that does.

    Held-out records of a method of pairs may be others too.

    Raises:
      DataError: naming the method and what would do.
    """
    wanted = methods.of(method).pairs
    for name, kind in ((name, dataset.kind) for name, dataset in data.items()):
        if kind in PAIRS and not wanted:
            raise DataError(
                f"data.{name}: holds pairs of answers, which method {method.name} does not "
                "compare: use method dpo, or write the chosen answers as `completion`"
            )
        if wanted and kind not in PAIRS and name == "train":
            raise DataError(
                f"data.{name}: method {method.name} compares pairs, and the records are {kind!r}: "
                "give `prompt`, `chosen` and `rejected`"
            )


def prompts_of(
    data: Data,
    longest: int,
    tokenizer: Any,
    second: SecondView | None = None,
    *,
    routing: TeacherRoutes | None = None,
    context: PrivilegedView | None = None,
    network: bool = False,
    questions: Sequence[PromptSource] = (),
) -> prompts.Prompts:
    """What the student answers: data.prompts, or the held-out questions that are given.

    Args:
      data: the options of the data.
      longest: the most tokens of a prompt.
      tokenizer: of the run.
      second: another model's tokens, in which answers are given too.
      routing: several teachers, of which every prompt is for one.
      context: the teacher's prompts, which leave as much room for an answer.
      network: whether sources may be downloaded.
      questions: of reward.held_out; none: data.prompts.

    Raises:
      DataError, ModelError: as `prompts.read`, or if held-out questions are trained on.
    """
    options = data.model_dump(
        include={"on_bad_record", "max_bad_fraction", "special_tokens", "template_kwargs"}
    )
    if data.chat_template is not None:
        options["chat_template"] = read_template(data.chat_template)
    asked = [
        open_source(one.path, "prompts", teacher=one.teacher, allow_network=network)
        for one in data.prompts
    ]
    if questions:
        theirs = [open_source(one.path, "prompts", allow_network=network) for one in questions]
        held_out.check_prompts(asked, theirs, "reward.held_out")
        return prompts.read(
            theirs, tokenizer, longest=longest, key="reward.held_out.prompts", **options
        )
    held_out.check_prompts(
        asked, [open_source(one.path, one.format, allow_network=network) for one in data.eval_files]
    )
    return prompts.read(
        asked,
        tokenizer,
        longest=longest,
        context=context,
        routing=routing,
        context_longest=0 if context is None else longest + context.seq_len - data.seq_len,
        second=second,
        seq_len=data.seq_len,
        learns_from=[one.learns_from for one in data.prompts],
        **options,
    )
