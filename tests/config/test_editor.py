import copy
import json

import jsonschema
import pytest

from jaxdistill import cli
from jaxdistill.config import editor, inherit, syntax

RECIPES = inherit.recipes()


@pytest.fixture(scope="module")
def validators():
    """Kind of file -> its validator; the schemas keep the rules of JSON Schema themselves."""
    found = {}
    for kind in ("run", "workflow", "generate"):
        schema = json.loads(editor.text(kind))
        jsonschema.Draft202012Validator.check_schema(schema)
        found[kind] = jsonschema.Draft202012Validator(schema)
    return found


def where(validator, tree):
    """The places that an editor would underline."""
    return sorted(".".join(map(str, e.absolute_path)) for e in validator.iter_errors(tree))


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_their_schema_and_keep_to_it(validators, name):
    text = RECIPES[name].read_text()
    kind = editor.kind_of(text)
    assert text.splitlines()[0] == f"# yaml-language-server: $schema={kind}.schema.json"
    assert (RECIPES[name].parent / f"{kind}.schema.json").is_file()
    assert where(validators[kind], syntax.parse(text).value) == []


def test_what_is_wrong_is_underlined_where_it_stands(validators):
    run = syntax.parse(RECIPES["kd"].read_text()).value
    for path, value in (("train.steps", "x"), ("data.loss_on", "assistent"), ("train.step", 5)):
        wrong = copy.deepcopy(run)
        section, key = path.split(".")
        wrong[section][key] = value
        assert where(validators["run"], wrong) == [section if key == "step" else path]
    del run["teacher"]["source"], run["data"]
    assert where(validators["run"], run)
    flow = syntax.parse(RECIPES["compress_smollm2"].read_text()).value
    step = next(i for i, step in enumerate(flow["steps"]) if step["kind"] == "train")
    flow["steps"][step]["config"]["train"] = {"stesp": 4}
    assert where(validators["workflow"], flow) == [f"steps.{step}"]


def test_a_copied_recipe_leads_to_the_schema_that_is_installed(tmp_path, capsys):
    target = tmp_path / "mine.yaml"
    assert cli.main(["init", "grpo", "-o", str(target)]) == 0
    lines = target.read_text().splitlines()
    assert lines[0] == f"# yaml-language-server: $schema={editor.file('run').as_uri()}"
    assert not any(line.startswith(editor.MODELINE) for line in lines[1:])
    capsys.readouterr()
    assert cli.main(["schema", "workflow"]) == 0
    assert capsys.readouterr().out == editor.file("workflow").read_text()
