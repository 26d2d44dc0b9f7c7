"""From a method's configuration to its objective and its knobs."""

from typing import Any

import jax.numpy as jnp
import optax

from jaxdistill import objectives, optim
from jaxdistill.config import Config
from jaxdistill.config import methods as configured
from jaxdistill.data import encode
from jaxdistill.errors import ConfigError, MismatchError
from jaxdistill.kernels import rows
from jaxdistill.losses import features, whole_rows
from jaxdistill.objectives import Objective
from jaxdistill.reasoning import rationales


def objective_of(config: Config, models: Any) -> tuple[Objective, dict[str, Any]]:
    """The objective, and name -> number, schedule or transformation of each of its knobs.

    Args:
      config: of the run.
      models: `setup.Models`; the real vocabulary and the student's width are read.
    """
    method = config.method
    head: dict[str, Any] = {"vocab": models.vocab}
    for name in ("chunk", "implementation", "logits_dtype"):
        value = getattr(method, name)
        head[name] = None if value == "auto" else value
    if isinstance(method, configured.Sft):
        return objectives.sft(**head), {}
    knobs: dict[str, Any] = {"alpha": _schedule(method.alpha, config)}
    if isinstance(method, configured.StepByStep):
        return _step_by_step(method, config, models, head, knobs)
    if isinstance(method, configured.Taid):
        knobs["taid_t"] = optim.taid(
            config.train.steps,
            method.t_start,
            method.t_end,
            alpha=method.step_size,
            beta=method.beta,
            mode=method.mode,
        )
        return objectives.taid(**head), knobs
    if isinstance(method, configured.Ctkd):
        ramp = max(2, round(method.ramp * config.train.steps))
        knobs["reversal"] = optim.schedule("cosine", 0.0, -1.0, ramp)
        width = models.student.config.embed if method.per_token else None
        own = {"t_start": method.t_start, "t_range": method.t_range, "width": width}
        return objectives.ctkd(**own, **head), knobs
    if isinstance(method, configured.Distillm2):
        knobs["balance"] = _schedule(method.balance, config)
        return objectives.distillm2(skew=method.skew, **head), knobs
    if isinstance(method, configured.Hidden):
        return _hidden(method, config, models, head, knobs)
    if isinstance(method, configured.Ted):
        return _ted(method, config, models, head, knobs)
    if isinstance(method, configured.Minilm):
        return _minilm(method, config, models, head, knobs)
    assert isinstance(method, configured.Kd), method
    knobs["temperature"] = _schedule(method.temperature, config)
    divergence, parameters = _divergence(method, config, knobs)
    objective = objectives.kd(
        divergence=divergence,
        parameters=parameters,
        scale_by_t2=method.scale_by_t2,
        label_smoothing=method.label_smoothing or None,
        **head,
    )
    return objective, knobs


def _hidden(method, config: Config, models: Any, head, knobs) -> tuple[Objective, dict[str, Any]]:
    student, teacher = models.student.config, models.teacher.config
    knobs["temperature"] = _schedule(method.temperature, config)
    knobs["feature_weight"] = _schedule(method.feature_weight, config)
    if method.balance:
        knobs["feature_balance"] = optim.balance(
            "feature_balance", "loss/divergence", "loss/features"
        )
    objective = objectives.hidden(
        layers=features.layer_map(student.layers, teacher.layers, method.layers),
        widths=(student.embed, teacher.embed),
        distance=method.distance,
        balanced=method.balance,
        **head,
    )
    return objective, knobs


def _ted(method, config: Config, models: Any, head, knobs) -> tuple[Objective, dict[str, Any]]:
    student, teacher = models.student.config, models.teacher.config
    knobs["temperature"] = _schedule(method.temperature, config)
    knobs["feature_weight"] = _schedule(method.feature_weight, config)
    first = _first_stage(method, config)
    knobs["stage"] = lambda step: jnp.where(step < first, 1.0, 2.0)
    objective = objectives.ted(
        layers=features.layer_map(student.layers, teacher.layers, method.layers),
        widths=(student.embed, teacher.embed),
        **head,
    )
    return objective, knobs


def _minilm(method, config: Config, models: Any, head, knobs) -> tuple[Objective, dict[str, Any]]:
    student, teacher = models.student.config, models.teacher.config
    knobs["temperature"] = _schedule(method.temperature, config)
    knobs["feature_weight"] = _schedule(method.feature_weight, config)
    layers = []
    for who, arch in (("student", student), ("teacher", teacher)):
        layer = getattr(method, f"{who}_layer")
        if layer is not None and layer >= arch.layers:
            raise ConfigError(
                f"method.{who}_layer = {layer}: the {who} has layers 0 to {arch.layers - 1}"
            )
        layers.append(arch.layers - 1 if layer is None else layer)
    widths = [
        count * arch.head_dim
        for arch in (student, teacher)
        for count in (arch.heads, arch.kv_heads)
    ]
    fits = lambda heads: all(width % heads == 0 for width in widths)
    heads = method.heads or max(filter(fits, range(1, student.heads + 1)))
    if not fits(heads):
        raise ConfigError(
            f"method.heads = {heads}: must divide the widths of queries and keys, "
            f"{', '.join(map(str, sorted(set(widths))))}; leave it out to let it be chosen"
        )
    return objectives.minilm(layers=tuple(layers), heads=heads, **head), knobs


def _first_stage(method: configured.Ted, config: Config) -> int:
    """Steps in which TED's filters alone are trained."""
    return min(max(1, round(method.filter_steps * config.train.steps)), config.train.steps)


def trained(config: Config) -> dict[str, tuple[int, int | None]]:
    """Which parameters are trained when, as `optim.optimizer` takes it."""
    if isinstance(config.method, configured.Ted):
        first = _first_stage(config.method, config)
        return {"student": (first, None), "objective/teacher_filters": (0, first)}
    return {}


def _step_by_step(method, config: Config, models: Any, head, knobs) -> tuple[Objective, dict]:
    knobs["temperature"] = _schedule(method.temperature, config)
    objective = objectives.step_by_step(
        explains=explains(models.tokenizer),
        label_weight=method.label_weight,
        with_teacher=method.with_teacher,
        **head,
    )
    return objective, knobs if method.with_teacher else {}


def explains(tokenizer: Any) -> tuple[int, int]:
    """(place, token) by which an "explain: " prompt differs from a "predict: " one.

    Raises:
      MismatchError: if this tokenizer does not tell the two apart.
    """
    codec = encode.prepare(tokenizer)
    found = encode.encode_text(codec, [rationales.EXPLAIN + "x", rationales.PREDICT + "x"])
    pairs = zip(*[row for row in found if not isinstance(row, str)], strict=False)
    for place, (explain, predict) in enumerate(pairs):
        if explain != predict:
            return len(codec.prefix) + place, int(explain)
    raise MismatchError("step_by_step: the tokenizer writes 'explain' and 'predict' alike")


def objective_lr_ratio(config: Config) -> float:
    """Learning rate of the objective's own parameters over the student's."""
    method = config.method
    if isinstance(method, configured.Ctkd):
        return method.temperature_lr / config.optimizer.lr
    if isinstance(method, configured.Hidden):
        return method.projector_lr / config.optimizer.lr
    if isinstance(method, configured.Ted):
        return method.filter_lr / config.optimizer.lr
    return 1.0


def _divergence(
    method: configured.Kd, config: Config, knobs: dict[str, Any]
) -> tuple[Any, tuple[float | str, ...]]:
    """A kind of the table with its parameters, or a function of whole rows.

    Parameters that move become knobs, of the name divergence_NAME.
    """
    values: dict[str, Any] = method.parameter_values()
    if method.divergence not in rows.KINDS:
        return whole_rows.bound(method.divergence, **values), ()
    found: list[float | str] = []
    for name, value in values.items():
        moves = not isinstance(value, int | float)
        found.append(f"divergence_{name}" if moves else value)
        if moves:
            knobs[f"divergence_{name}"] = _schedule(value, config)
    return method.divergence, tuple(found)


def _schedule(knob: Any, config: Config) -> float | optax.Schedule:
    """A knob of the configuration as a number or an Optax schedule over the whole run."""
    if isinstance(knob, int | float):
        return float(knob)
    return optim.schedule(knob.schedule, knob.start, knob.end, config.train.steps)
