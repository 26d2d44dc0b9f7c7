import pathlib
import re

import pydantic
import pytest

from jaxdistill import config
from jaxdistill.config import syntax, workflow
from jaxdistill.errors import ConfigError

CONFIGS = pathlib.Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(CONFIGS.glob("*.yaml"))
RECIPES = [path for path in FILES if not workflow.is_workflow(path.read_text())]

BASE = """\
teacher: {source: big}
student: {source: small}
data:
  train: [{path: a.jsonl}]
  eval: [{path: b.jsonl}]
method: {name: kd}
train: {steps: 100}
"""


def errors(text, overrides=()):
    with pytest.raises(ConfigError) as caught:
        config.loads(text, "conf.yaml", overrides)
    assert caught.value.exit_code == 2
    return str(caught.value).splitlines()


def test_there_are_recipes():
    assert {path.stem for path in FILES} >= {"tiny", "quickstart", "kd", "reverse_kd", "sft"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_its_resolved_form_is_the_same(path):
    loaded = config.load(path)
    text = config.dump(loaded)
    assert config.loads(text) == loaded
    assert config.dump(config.loads(text)) == text


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_recipe_says_what_it_is_at_its_head(path):
    head = re.match(r"(#.*\n)+", path.read_text()).group()
    for word in ("Source:", "Command:", "Device:", "Time:", "Expected:"):
        assert f"# {word}" in head
    assert len(head.splitlines()[0]) > 20


def test_every_workflow_loads():
    flows = [workflow.load(path) for path in FILES if path not in RECIPES]
    assert {"compress_smollm2", "r1_pipeline"} <= {flow.name for flow in flows}


def test_resolved_form_holds_every_default():
    resolved = syntax.parse(config.dump(config.loads(BASE))).value
    assert resolved["run"] == {"name": "run", "dir": "runs/run", "compilation_cache": "auto"}
    assert resolved["optimizer"]["lr"] == 1e-4
    assert resolved["student"]["from"] is None
    assert set(resolved) == set(config.Config.model_fields)


def test_all_errors_come_at_once_each_at_its_place():
    text = """\
versoin: 1
teacher: {source: big}
student: {source: small}
data:
  train: [{path: a.jsonl}]
  eval: [{path: b.jsonl}]
method:
  name: kd
  alpha: 1.4
  tempreture: 2.0
train: {steps: ten, steps: 3}
optimizer: {lr: 1e400, betas: [0.9, 1.0]}
logging: {tensorboard: yes}
"""
    assert errors(text, ["train.log_every=no"]) == [
        'conf.yaml:1:1: versoin = 1: unknown key; did you mean "version"?',
        "conf.yaml:9:3: method.alpha = 1.4: must be at most 1.0",
        'conf.yaml:10:3: method.tempreture = 2.0: unknown key; did you mean "temperature"?',
        'conf.yaml:11:9: train.steps = "ten": must be a whole number',
        'conf.yaml:11:21: duplicate key "steps" (first on line 11)',
        "conf.yaml:12:13: optimizer.lr = inf: must be a finite number",
        "conf.yaml:12:37: optimizer.betas.1 = 1.0: must be below 1.0",
        'conf.yaml:13:11: logging.tensorboard = "yes": must be true or false, small letters, '
        "without quotes",
        'override "train.log_every=no": train.log_every = "no": must be a whole number',
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps=true", "must be a whole number"),
        ("train.steps=1e3", "must be a whole number: write 1000"),
        ("train.steps=1_000", "must be a whole number: decimal digits"),
        ("train.steps=0", "must be at least 1"),
        (f"train.steps={'9' * 300}", "must be at most 1000000000"),
        ("train.steps=null", "must be a whole number"),
        ("optimizer.lr=.nan", "must be a finite number"),
        ("optimizer.lr=1e308", "must be at most 10"),
        ("optimizer.lr=fast", "must be a number"),
        ("optimizer.betas=[0.9]", "missing"),
        ("optimizer.betas=0.9", "must be a list"),
        ("optimizer.clip_norm=0", "must be above 0"),
        ("optimizer.warmup=1.0", "must be below 1"),
        ("optimizer.warmup=fast", "must be a whole number of steps, or a fraction below 1"),
        ("optimizer.warmup=100", "must be below train.steps (100)"),
        ("optimizer={schedule: constant, end_lr_ratio: 0}", "has no effect"),
        ("version=true", "must be a whole number"),
        ("version=2", "must be at most 1"),
        ("run.name=../x", "letters, digits"),
        ('run.dir="a\\0b"', "control characters"),
        ('run.dir=""', "must not be empty"),
        ("run.name=3", 'must be text: put it in quotes, "3"'),
        ("data.packing=bestfit", 'must be one of best_fit, none; did you mean "best_fit"?'),
        ("data.train=[]", "needs 1 or more entries"),
        ("data.train={path: x}", "must be a list"),
        ("data.eval=[{path: a.jsonl}]", "must not be trained on"),
        ("data.eval={fraction: 0}", "data.eval.fraction = 0: must be above 0"),
        ("data.eval={part: 0.1}", "data.eval.fraction: required, but missing"),
        ("data.eval=a.jsonl", "must be a list, such as [a, b], or {fraction: 0.01}"),
        ("data.eval=[{path: c.jsonl, weight: 2}]", "held-out records are measured once"),
        ("data.template_kwargs={a: [1]}", "data.template_kwargs.a: must be text, a number"),
        ("data.turns=each", "learns single turns: use data.loss_on: assistant"),
        (
            'data={train: [{path: "python:docs"}], eval: [{path: "python:docs?split=held_out"}]}',
            "must not be trained on",
        ),
        ("method={nam: kd, alpha: 0.5}", 'method.nam = "kd": unknown key; did you mean "name"?'),
        ("data={train: [{path: a.txt}], eval: [{path: b}], loss_on: assistant}", "use all"),
        ("method=kd", "must be a section"),
        ("method={}", "must be one of kd, reverse_kd, jsd, "),
        ("method.name=kdd", 'did you mean "kd"?'),
        ("method.name=gkd", "here it is jsd, with a section rollout"),
        ("method.name=KL", "here it is kd, KL(teacher"),
        ("train.epochs=3", 'unknown key; here it is "train.steps"'),
        ("method.name=os.system", "must be one of kd, reverse_kd, jsd, "),
        ("method.alpha=high", "must be a number or {schedule: linear, start: a, end: b}"),
        ("method.alpha={schedule: liner, start: 0, end: 1}", 'did you mean "linear"?'),
        ("method.alpha={schedule: linear, start: 0, end: 2}", "must be at most 1"),
        ("method.temperature=0", "must be at least 0.01"),
        ("method.chunk=automatic", "must be auto or a number of tokens"),
        ("mesh.tensor=-1", "only one size may be -1, and fsdp is -1 too"),
        ("mesh={data: -1}", "only one size may be -1"),
        ("train.micro_batches=5", "must divide train.batch_size (32)"),
        ("student={from: teacher, layers: [2, 1]}", "must rise"),
        ("student={from: teacher, layers: [1, 1]}", "must rise"),
        ("student={from: teacher, layers: [1], every: 2}", "not both"),
        ("student={source: x, every: 2}", "has no effect"),
        ("student={source: x, from: teacher}", "give only one of"),
        ("student={}", "needs one of source, from, random"),
        ("student={random: {layers: 2}}", "required unless `like`"),
        ("student={random: {like: teacher, heads: 3, kv_heads: 2}}", "must divide heads (3)"),
        ("teacher={random: {like: teacher}}", "cannot be shaped like itself"),
        ("checkpoint.every={steps: null, minutes: null}", "nothing would be saved"),
        ("checkpoint.mode=max", "use min"),
        ("teacher={cache: x, sharding: all}", "no parameters of a teacher are in the step"),
    ],
)
def test_a_wrong_value_is_told_with_its_override(override, message):
    found = errors(BASE, [override])
    assert any(message in line for line in found), found
    assert all(line.startswith("override ") for line in found), found


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.fsdp=3", "must be a multiple of mesh.data * mesh.fsdp * mesh.expert (3)"),
        ("teacher={random: {layers: 1, embed: 8, mlp: 8, heads: 2}}", "has no tokenizer"),
        ("teacher=null", "method kd needs a teacher"),
        ("checkpoint.best_metric=eval/agree_top1", "use max"),
        ("train.gather_once=both", "has no effect with train.micro_batches: 1"),
        (
            "mesh={expert: 2, fsdp: 3}",
            "must be a multiple of mesh.data * mesh.fsdp * mesh.expert (6)",
        ),
    ],
)
def test_a_rule_between_sections_is_told_where_the_broken_field_stands(override, message):
    found = errors(BASE, [override])
    assert any(message in line for line in found), found
    assert all(re.match(r"conf.yaml:\d+:\d+: |override ", line) for line in found), found


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("method: {name: sft}\neval: {compare: true}", "eval.compare"),
        ("method: {name: sft}\ncheckpoint: {best_metric: eval/kl_t1}", "checkpoint.best_metric"),
        ("method: {name: sft}", "tokenizer.from"),
    ],
)
def test_without_a_teacher(text, key):
    base = BASE.replace("teacher: {source: big}\n", "").replace("method: {name: kd}\n", "")
    found = errors(base + text)
    assert any(f": {key}" in line for line in found), found


def test_sft_needs_no_teacher():
    base = BASE.replace("teacher: {source: big}\n", "").replace("kd", "sft")
    assert config.loads(base + "tokenizer: {from: student}").teacher is None


def test_overrides_set_values_of_every_kind():
    loaded = config.loads(
        BASE,
        overrides=[
            "train.steps=20",
            "train.steps=30",
            "optimizer.lr=1e-3",
            "data.train.0.path=c.jsonl",
            "data.eval=[{path: d.txt, format: plain}, {path: e.jsonl}]",
            "method.alpha={schedule: cosine, start: 0, end: 1}",
            "student.source=null",
            "student.from=teacher",
            "student.layers=[0, 2]",
            "run.name=a=b".replace("=b", "-b"),
            'eval.prompts=["2 + 2 = "]',
            "train.eval_every=",
        ],
    )
    assert loaded.train.steps == 30
    assert loaded.optimizer.lr == 1e-3
    assert loaded.data.train[0].path == "c.jsonl"
    assert [source.path for source in loaded.data.eval] == ["d.txt", "e.jsonl"]
    assert loaded.method.alpha.end == 1.0
    assert (loaded.student.from_, loaded.student.layers) == ("teacher", (0, 2))
    assert loaded.run.dir == "runs/a-b"
    assert loaded.eval.prompts == ("2 + 2 = ",)
    assert loaded.train.eval_every is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.steps", "write it as key=value"),
        ("=3", "write it as key=value"),
        ("train..steps=3", "write it as key=value"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps=!!int 3", "tags"),
        ("train.steps={a: 1, a: 2}", "duplicate key"),
        ("data.train.1.path=x", "a list of 1, counted from 0"),
        ("data.train.first=x", "a list of 1, counted from 0"),
        ("train.steps.x=1", "train.steps = 100 is no section"),
        ("trian.steps=3", 'did you mean "train"?'),
        ("train.stesp=3", 'did you mean "steps"?'),
    ],
)
def test_an_override_that_cannot_be_applied(override, message):
    found = errors(BASE, [override])
    assert any(message in line for line in found), found


def test_an_error_below_an_override_names_it_and_others_keep_their_line():
    found = errors(BASE.replace("100", "x"), ["data={train: [{pth: a}], eval: [{path: b}]}"])
    assert found[0].startswith("conf.yaml:7:9: train.steps")
    assert all(line.startswith('override "data=') for line in found[1:])
    assert len(found) == 3


def test_files_that_cannot_be_read(tmp_path):
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nb: \xe9\n")
    for path, words in [
        (tmp_path / "absent.yaml", "No such file"),
        (tmp_path, "directory"),
        (latin, "latin.yaml:2: not UTF-8"),
        ("nul\0", "cannot read"),
    ]:
        with pytest.raises(ConfigError, match=words):
            config.load(path)


def test_a_huge_file_is_refused_without_being_read(tmp_path):
    huge = tmp_path / "huge.yaml"
    with huge.open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(ConfigError, match="larger than 256 KiB"):
        config.load(huge)


@pytest.mark.parametrize("text", ["", "\n# only a comment\n", "null"])
def test_an_empty_file(text):
    assert errors(text) == [
        "conf.yaml:1:1: the file is empty: `jaxdistill init` writes one to start from"
    ]


@pytest.mark.parametrize("text", ["[]", "x", "3", "- a"])
def test_a_file_that_is_no_mapping(text):
    assert errors(text)[0].startswith("conf.yaml:1:1: must be sections")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_text("\ufeff" + BASE, encoding="utf-8")
    assert config.load(path) == config.loads(BASE)


def test_messages_hold_no_control_characters():
    for line in errors(BASE + '"\\e[31mred": "\\e[0m"\n'):
        assert line.isprintable()


def test_a_config_is_frozen():
    loaded = config.loads(BASE)
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        loaded.train.steps = 3


def test_rules_hold_for_configs_made_in_python_too():
    loaded = config.loads(BASE)
    with pytest.raises(ValueError, match="micro_batches: must divide"):
        type(loaded.train)(steps=10, batch_size=8, micro_batches=3)


def test_every_divergence_of_a_configuration_exists_with_its_defaults():
    import inspect

    from jaxdistill import ranges
    from jaxdistill.kernels import rows
    from jaxdistill.losses import divergences, whole_rows

    assert set(ranges.ENTRIES) == set(rows.KINDS)
    assert set(ranges.WHOLE_ROWS) < set(whole_rows.FUNCTIONS)
    for name, parameters in ranges.ENTRIES.items():
        assert list(inspect.signature(rows.KINDS[name]).parameters) == list(parameters)
    functions = {name: getattr(divergences, name) for name in ranges.ENTRIES}
    functions |= {name: whole_rows.FUNCTIONS[name] for name in ranges.WHOLE_ROWS}
    for name, function in functions.items():
        expected = {key: one.default for key, one in ranges.PARAMETERS[name].items()}
        given = inspect.signature(function).parameters
        assert {key: given[key].default for key in expected} == expected
