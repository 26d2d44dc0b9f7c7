"""The folder of a workflow: one process runs it, and no step takes the name of a file in it."""

import pytest

from jaxdistill.config import workflow as files
from jaxdistill.errors import ConfigError
from jaxdistill.run import workflow
from jaxdistill.safe import lock


def flow(tmp_path, name="cut"):
    file = tmp_path / "flow.yaml"
    step = f"{{kind: export, name: {name}, model: nothing}}"
    file.write_text(f"dir: {tmp_path}/out\nsteps: [{step}]\n")
    return file


def test_two_processes_cannot_run_one_workflow(tmp_path):
    runner = workflow.Runner(flow(tmp_path))
    (tmp_path / "out").mkdir()
    with lock.held(tmp_path / "out"):
        with pytest.raises(ConfigError, match="is being written by process"):
            runner.run()
    assert not (tmp_path / "out" / files.STATE).exists()


@pytest.mark.parametrize("name", ["replaced", "workflow.json", "LOCK", "report.html"])
def test_no_step_has_the_name_of_a_file(tmp_path, name):
    with pytest.raises(ConfigError, match="is the name of a file of the workflow"):
        workflow.Runner(flow(tmp_path, name))
