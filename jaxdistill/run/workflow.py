"""Runs a workflow: each step once, again only when what it depends on has changed."""

import glob
import hashlib
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jaxdistill
from jaxdistill import report
from jaxdistill.compress import command
from jaxdistill.compress import importance as scores
from jaxdistill.config import inherit
from jaxdistill.config import workflow as files
from jaxdistill.config.workflow import (
    ASIDE,
    STATE,
    CompareStep,
    ExportStep,
    GenerateStep,
    ImportanceStep,
    PruneStep,
    QuantizeStep,
    SparsifyStep,
    TrainStep,
    Workflow,
)
from jaxdistill.errors import ConfigError, StorageError
from jaxdistill.evaluate import comparison
from jaxdistill.report import json_lines
from jaxdistill.run import session, teacher_generate
from jaxdistill.run.export import export, quantization_of, quantize
from jaxdistill.safe import json_file, lock, whole_file
from jaxdistill.safe.redact import redacted

HASHED_BYTES = 1 << 28
_OF_MODELS = ("config.json", "RUN.json")  # a folder with one of these is a model or a run


@dataclass(frozen=True)
class Planned:
    """What is to be done about a step.

    Attributes:
      step: the step.
      action: "run", "resume" or "skip".
      why: in a few words.
      fingerprint: of everything its output depends on.
    """

    step: Any
    action: str
    why: str
    fingerprint: str


class Runner:
    """One workflow and the state of its folder."""

    def __init__(self, path: str | os.PathLike):
        self.workflow: Workflow = files.load(path)
        self.folder = pathlib.Path(self.workflow.dir)
        self.state = self._read()

    def _read(self) -> dict[str, Any]:
        """What is noted of the steps.

        Raises:
          ConfigError: if it cannot be read.
        """
        file = self.folder / STATE
        nothing = {"name": self.workflow.name, "steps": {}}
        try:
            state = json_file.read(file, {"steps": dict}, missing=nothing)
            for entry in state["steps"].values():
                json_file.check(entry, {"fingerprint": str, "status": str, "seconds": (int, float)})
        except ValueError as error:
            raise ConfigError(
                f"{file}: is damaged ({error}): remove it, and all steps run again"
            ) from error
        return state

    def plan(self, start: str | None = None) -> list[Planned]:
        """What each step needs, in order.

        A step's fingerprint covers its options, the fingerprints of the steps it refers to, the
        files it names and the version of this library.

        Args:
          start: run this step and all after it, whatever has changed.

        Raises:
          ConfigError: if there is no step of that name.
        """
        names = [step.name for step in self.workflow.steps]
        if start is not None and start not in names:
            raise ConfigError(f"--from {start}: no such step; there are {', '.join(names)}")
        prints: dict[str, str] = {}
        planned, forced = [], False
        for step in self.workflow.steps:
            forced = forced or step.name == start
            prints[step.name] = mark = self._fingerprint(step, prints)
            kept = self.state["steps"].get(step.name, {})
            same = kept.get("fingerprint") == mark
            if forced:
                action, why = "run", f"--from {start}"
            elif not kept:
                action, why = "run", "not run yet"
            elif not same:
                action, why = "run", "its inputs or options have changed"
            elif kept.get("status") != "done":
                resumes = isinstance(step, TrainStep | GenerateStep)
                action, why = ("resume" if resumes else "run"), f"was {kept.get('status')}"
            elif not all(map(os.path.exists, self.outputs(step))):
                action, why = "run", "its output is gone"
            else:
                action, why = "skip", "unchanged"
            planned.append(Planned(step, action, why, mark))
        return self._with_users(planned)

    def _with_users(self, planned: list[Planned]) -> list[Planned]:
        """A new output is a new input of the steps that use it, whatever their fingerprints say."""
        anew: set[str] = set()
        result = []
        for one in planned:
            made = [name for name in files.references(one.step.model_dump()) if name in anew]
            if one.action == "skip" and made:
                one = Planned(one.step, "run", f"{made[0]} runs again", one.fingerprint)
            if one.action != "skip":
                anew.add(one.step.name)
            result.append(one)
        return result

    def run(self, start: str | None = None, notice: Callable[[str], None] = print) -> pathlib.Path:
        """Does what the plan says and writes the page; goes on where an earlier call was stopped.

        Args:
          start: see `plan`.
          notice: told about every step.

        Returns:
          The page.

        Raises:
          UserError: of the step that failed; the steps before it are kept.
          ConfigError: if another process runs the workflow.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise lock.cannot_write(self.folder, error) from error
        with lock.held(self.folder):
            self.state = self._read()  # another process may have held it until now
            return self._run(self.plan(start), notice)

    def _run(self, planned: list[Planned], notice: Callable[[str], None]) -> pathlib.Path:
        notice(f"workflow {self.workflow.name}: {len(planned)} steps in {self.folder}")
        for number, one in enumerate(planned, 1):
            head = f"[{number}/{len(planned)}] {one.step.name} ({one.step.kind})"
            if one.action == "skip":
                notice(f"{head}: unchanged")
                continue
            notice(f"{head}: {one.action}, {one.why}")
            self._do(one)
        page = report.write_story(self.folder)
        notice(f"page: {page}")
        return page

    def _do(self, one: Planned) -> None:
        """Runs one step and notes how it went."""
        name, began = one.step.name, time.time()
        entry = {"kind": one.step.kind, "fingerprint": one.fingerprint, "started": began}
        entry["options"] = one.step.model_dump(mode="json", exclude={"name", "kind"})
        earlier = self.state["steps"].get(name, {})
        spent = earlier.get("seconds", 0.0) if one.action == "resume" else 0.0
        if one.action == "run":
            self._make_room(name)
        self._note(name, entry | {"status": "running", "seconds": spent})
        status = "failed"
        try:
            outputs = _RUN[one.step.kind](self, one.step)
            status = "done"
        except KeyboardInterrupt:
            status = "stopped"
            raise
        finally:
            entry["seconds"] = round(spent + time.time() - began, 1)
            entry["status"] = status
            if status == "done":
                entry["output"] = self.outputs(one.step)
                entry["found"] = outputs
            self._note(name, entry)

    def _note(self, name: str, entry: Mapping[str, Any]) -> None:
        """Writes the state in one move."""
        self.state["steps"][name] = dict(entry)
        self.state["order"] = [step.name for step in self.workflow.steps]
        try:
            text = json.dumps(redacted(json_lines.safe(self.state)), indent=1) + "\n"
            whole_file.write_text(self.folder / STATE, text)
        except OSError as error:
            raise StorageError(f"{self.folder}: cannot be written: {error}") from error

    def _make_room(self, name: str) -> None:
        """Moves an output that is no longer wanted aside."""
        old = self.folder / name
        if old.exists():
            aside = self.folder / ASIDE
            try:
                aside.mkdir(exist_ok=True)
                os.rename(old, aside / f"{name}-{_last(aside, name) + 1}")
            except OSError as error:
                raise StorageError(
                    f"{old}: cannot be moved to {aside}, where what a step made before is kept: "
                    f"{error.strerror or error}: move it yourself, and run the workflow again"
                ) from error

    def outputs(self, step: Any) -> list[str]:
        """The paths that `${name}` stands for: several for a train step with seeds."""
        folder = self.folder / step.name
        if isinstance(step, TrainStep) and step.seeds:
            return [str(folder / f"seed_{seed}") for seed in step.seeds]
        inside = {"importance": scores.FILE, "compare": comparison.FILE}.get(step.kind)
        return [str(folder / inside if inside else folder)]

    def first_outputs(self) -> dict[str, str]:
        """Step name -> what `${name}` stands for where one path is wanted."""
        return {step.name: self.outputs(step)[0] for step in self.workflow.steps}

    def resolved(self, step: Any) -> Any:
        """The step with its references as paths."""
        return type(step)(**files.replaced(step.model_dump(), self.first_outputs()))

    def _fingerprint(self, step: Any, before: Mapping[str, str]) -> str:
        """A digest of all that the step's output depends on."""
        options = step.model_dump(mode="json")
        if isinstance(step, TrainStep):
            options["config"] = inherit.merge(self.workflow.base, step.config)
        marks = {name: f"step {mark}" for name, mark in before.items()}
        told = {
            "options": files.replaced(options, marks),
            "files": {text: _identity(text) for text in sorted(_texts(options))},
            "version": jaxdistill.__version__,
        }
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def _train(self, step: TrainStep) -> dict[str, Any]:
        tables = {}
        for seed, folder in zip(step.seeds or (None,), self.outputs(step), strict=True):
            config = files.train_config(self.workflow, step, folder, self.first_outputs(), seed)
            if (pathlib.Path(folder) / "RUN.json").is_file():
                tables[folder] = list(session.resume(folder).rows)
            else:
                tables[folder] = list(session.train(config).rows)
        return {"tables": tables}

    def _generate(self, step: GenerateStep) -> dict[str, Any]:
        folder = str(self.folder / step.name)
        written = teacher_generate.generate(files.generation(step, folder, self.first_outputs()))
        return {"samples": written["samples"], "correct": written.get("correct")}

    def _importance(self, step: ImportanceStep) -> dict[str, Any]:
        step = self.resolved(step)
        measured = command.importance(step.model, step)
        scores.save(measured, self.folder / step.name / scores.FILE)
        return {"rows": measured.facts["rows"], "tokens": measured.facts["tokens"]}

    def _prune(self, step: PruneStep) -> dict[str, Any]:
        step = self.resolved(step)
        folder = self.folder / step.name
        command.prune(step.model, folder, step)
        note = command.pruning_note(folder)
        return {key: note[key] for key in ("parameters", "layers")}

    def _sparsify(self, step: SparsifyStep) -> dict[str, Any]:
        step = self.resolved(step)
        folder = self.folder / step.name
        command.prune(step.model, folder, step)
        note = command.pruning_note(folder)
        return {key: note[key] for key in ("sparsity", "by", "zeros")}

    def _quantize(self, step: QuantizeStep) -> dict[str, Any]:
        step = self.resolved(step)
        quantize(step.model, self.folder / step.name, step)
        return {"scheme": str(quantization_of(step.model, step))}

    def _export(self, step: ExportStep) -> dict[str, Any]:
        step = self.resolved(step)
        export(step.model, self.folder / step.name, step)
        return {}

    def _compare(self, step: CompareStep) -> dict[str, Any]:
        by_name = {one.name: self.outputs(one) for one in self.workflow.steps}
        models = []
        for name, source in step.models.items():
            several = max((len(by_name[ref]) for ref in files.references(source)), default=1)
            for seed in range(several):
                paths = {ref: own[min(seed, len(own) - 1)] for ref, own in by_name.items()}
                models.append((name, files.replaced(source, paths)))
        plain = self.resolved(step)
        compared = comparison.compare_models(models, plain, out=self.folder / step.name)
        print(report.comparison_table(compared["rows"]), file=sys.stderr)
        return {"models": len(models)}


_RUN: Mapping[str, Callable[[Runner, Any], dict[str, Any]]] = {
    "train": Runner._train,
    "generate": Runner._generate,
    "importance": Runner._importance,
    "prune": Runner._prune,
    "sparsify": Runner._sparsify,
    "quantize": Runner._quantize,
    "export": Runner._export,
    "compare": Runner._compare,
}


def workflow(
    path: str | os.PathLike, *, start: str | None = None, notice: Callable[[str], None] = print
) -> pathlib.Path:
    """Runs a workflow file, or what is left of it; see `Runner.run`.

    Raises:
      UserError: whatever is wrong with the file, before any step; or of the step that failed.
    """
    return Runner(path).run(start, notice)


def plan(path: str | os.PathLike, start: str | None = None) -> list[Planned]:
    """What `workflow` would do, without doing it."""
    return Runner(path).plan(start)


def _last(aside: pathlib.Path, name: str) -> int:
    """The largest number of what a step of this name had made; 0: nothing of it is kept."""
    numbers = (path.name.removeprefix(f"{name}-") for path in aside.glob(f"{name}-*"))
    return max((int(one) for one in numbers if one.isdecimal()), default=0)


def _texts(value: Any) -> set[str]:
    """All texts in a value that may be paths of inputs."""
    if isinstance(value, str):
        return {value} if "${" not in value and 0 < len(value) < 1024 else set()
    if isinstance(value, Mapping):
        value = [part for key, part in value.items() if key != "cache_dir"]
    if isinstance(value, list | tuple):
        return {text for part in value for text in _texts(part)}
    return set()


def _identity(text: str) -> str | None:
    """What tells whether what this names has changed; None where there is no such file.

    A name may be of a file, a folder, or a pattern of files; a checkpoint behind `@` and what a
    task or a named set of records is asked for behind `?` are no part of it.
    """
    try:
        whole = (text, text.rpartition("@")[0], text.partition("?")[0])
        path = next((one for name in whole if name and (one := pathlib.Path(name)).exists()), None)
        if path is None:
            matches = sorted(glob.glob(text, recursive=True)) if glob.has_magic(text) else []
            return str([(name, _identity(name)) for name in matches]) if matches else None
        if path.is_dir():
            own = any((path / name).is_file() for name in _OF_MODELS)
            below = sorted(path.glob("*") if own else path.rglob("*"))
            files = [one for one in below if one.is_file()]
            return str([(str(p.relative_to(path)), _identity(str(p))) for p in files])
        size = path.stat().st_size
        if size > HASHED_BYTES:
            return f"{size} bytes of {path.stat().st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, ValueError):
        return None
