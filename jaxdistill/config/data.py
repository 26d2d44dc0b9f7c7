"""The options of the data: what the student reads, and what is held out."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from jaxdistill import methods
from jaxdistill.commands.kinds import RecordFormat
from jaxdistill.config.rollout import PromptSources, TeacherName
from jaxdistill.section import Path, Problem, Section

_COMPARING = ", ".join(name for name, method in methods.METHODS.items() if method.sides)
_ORIGIN = f"Who wrote it; {_COMPARING} treats the student's own text differently."


class DataSource(Section):
    """One file or collection of records."""

    path: Path = Field(
        description="A file, folder or pattern: .jsonl, .ndjson, .json, .csv, .tsv, .parquet, .txt "
        "or .md, compressed or not; the same behind gs:// or s3://, as streams, but for .parquet; "
        "hf:NAME?split=train (extra hf); or python:docs?split=train and "
        "?split=held_out (the documentation inside the installed Python; &part=manual or "
        "&part=library for a part)."
    )
    format: RecordFormat = Field(
        "auto",
        description="What a record holds: `text`, a chat under `messages`, `prompt` and "
        "`completion`, `prompt`, `chosen` and `rejected` (pairs), sharegpt's `conversations`, "
        "alpaca's `instruction` and `output` as a chat or (alpaca_prompt) as text; auto: as the "
        "first record shows. Of a text file plain makes one document (auto too), paragraphs one "
        "of every block between blank lines.",
    )

    origin: Literal["data", "teacher", "student"] = Field("data", description=_ORIGIN)
    weight: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="How often each record is read in an epoch: 2 twice, 0.5 every other one.",
    )

    teacher: TeacherName | None = Field(
        None, description="Which of `teachers` its records are for, where they do not say."
    )

    @property
    def is_text(self) -> bool:
        """Whether it surely holds plain text, which has no completions to tell apart."""
        plain = self.path.endswith((".txt", ".text", ".md")) or self.path.startswith("python:")
        return plain or self.format in ("text", "plain", "paragraphs")


DataSources = Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=1000, strict=False)]


class HoldOut(Section):
    """A share of the training data that is held out, chosen by what the records say."""

    fraction: float = Field(
        gt=0, le=0.5, description="About this share of the records; the same ones in other files."
    )


HeldOutData = Annotated[
    Annotated[DataSources, Tag("<files>")] | Annotated[HoldOut, Tag("<fraction>")],
    Discriminator(lambda value: "<fraction>" if isinstance(value, dict | HoldOut) else "<files>"),
]


def _overlap(left: str, right: str) -> bool:
    """Whether two paths surely share text: the same one, or a part of Python's and all of it."""
    python = left.startswith("python:docs") and right.startswith("python:docs")
    splits = [path.partition("split=")[2].partition("&")[0] or "all" for path in (left, right)]
    return left == right or (python and "all" in splits)


class Data(Section):
    """What the student reads."""

    train: Annotated[tuple[DataSource, ...], Field(max_length=1000, strict=False)] = Field(
        (), description="What it is trained on; where it writes all its text itself, nothing."
    )
    prompts: PromptSources = Field((), description="What it answers, where rollout is given.")
    eval: HeldOutData = Field(
        description="Held-out data that the result table is measured on: files, or "
        "{fraction: 0.01} of the training data, which then is not trained on."
    )
    seq_len: int = Field(1024, ge=2, le=2**20, description="Tokens in a row.")
    packing: Literal["best_fit", "none"] = Field(
        "best_fit",
        description="best_fit: several documents share a row and do not see each other; none: one "
        "document per row.",
    )
    loss_on: Literal["all", "completion", "assistant"] = Field(
        "all",
        description="Which tokens are learned: all, what follows a prompt, or what the assistant "
        "says. Marks in the records, such as `weight: 0`, take turns out.",
    )
    turns: Literal["whole", "each"] = Field(
        "whole",
        description="whole: a conversation is one document; each: every turn of the assistant ends "
        "a document of its own, rendered as when the model is asked for it.",
    )
    long_documents: Literal["auto", "split", "truncate", "reject"] = Field(
        "auto",
        description="What becomes of documents longer than seq_len: windows (split), the beginning "
        "(truncate), nothing (reject); auto: texts are split, others truncated.",
    )
    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description="Special tokens written in texts and completions: text, or read as special "
        "tokens (parse), for text that is rendered already.",
    )
    chat_template: Path | None = Field(
        None, description="File of a chat template in place of the tokenizer's own."
    )
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        max_length=100,
        description="What the chat template is given besides, such as {enable_thinking: false}.",
    )
    on_bad_record: Literal["fail", "quarantine"] = Field(
        "quarantine",
        description="What happens to a record that cannot be used: stop, or leave it out and note "
        "file, line and reason in quarantine/.",
    )
    max_bad_fraction: float = Field(
        0.001, ge=0, le=1, description="Stop when more than this fraction of records is left out."
    )
    cache_dir: Path = Field(
        "runs/.cache",
        description="Folder for tokens and rows, shared by runs; relative to the present folder.",
    )
    workers: Annotated[int, Field(ge=1, le=256)] | None = Field(
        None,
        description="Processes that tokenise where it takes more than two seconds; the rows are "
        "the same for any number. None: one for each processor, 16 at most.",
    )

    @property
    def eval_files(self) -> tuple[DataSource, ...]:
        """The files of the held-out data; none where it is a share of the training data."""
        return () if isinstance(self.eval, HoldOut) else self.eval

    @property
    def held_out_share(self) -> float | None:
        """The share of the training data that is held out; None where files are given."""
        return self.eval.fraction if isinstance(self.eval, HoldOut) else None

    def problems(self) -> Iterator[Problem]:
        """Rules: something must be left to learn, and held-out data stays held out."""
        if self.loss_on == "all" and self.turns == "each":
            yield ("turns",), "each learns single turns: use data.loss_on: assistant"
        for name, value in self.template_kwargs.items():
            if not isinstance(value, str | int | float | bool | None):
                yield ("template_kwargs", name), "must be text, a number, true, false or null"
        files = self.train + self.eval_files
        if self.loss_on != "all" and any(source.is_text for source in files):
            yield ("loss_on",), "plain text has no completions to learn: use all"
        if self.on_bad_record == "fail" and self.max_bad_fraction not in (0.0, 0.001):
            yield ("max_bad_fraction",), "has no effect with on_bad_record: fail"
        asked = [source.path for source in self.prompts]
        for i, source in enumerate(self.eval_files):
            if source.path in asked:
                rule = "is in data.prompts too: held-out data must not be trained on"
                yield ("eval", i, "path"), rule
            if source.weight != 1:
                yield ("eval", i, "weight"), "held-out records are measured once: remove it"
            if any(_overlap(source.path, trained.path) for trained in self.train):
                rule = "is in data.train too: held-out data must not be trained on"
                yield ("eval", i, "path"), rule
