"""The folder of a workflow: one process runs it, and no step takes the name of a file in it."""

import shutil

import pytest

from jaxdistill.config import workflow as files
from jaxdistill.errors import ConfigError, StorageError
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


def test_what_a_step_had_made_is_kept_under_a_number_that_is_free(tmp_path):
    runner = workflow.Runner(flow(tmp_path))
    aside = tmp_path / "out" / files.ASIDE
    for kept in ("cut-2", "cut-x", "cut-off-7"):  # the first one was removed by hand
        (aside / kept).mkdir(parents=True)
        (aside / kept / "it").write_text("old")
    for number in (3, 4):
        (tmp_path / "out" / "cut").mkdir()
        (tmp_path / "out" / "cut" / "it").write_text("new")
        runner._make_room("cut")
        assert (aside / f"cut-{number}" / "it").read_text() == "new"
    assert (aside / "cut-2" / "it").read_text() == "old"
    (tmp_path / "out" / "cut").write_text("")
    shutil.rmtree(aside)
    aside.write_text("no folder")
    with pytest.raises(StorageError, match="cannot be moved to"):
        runner._make_room("cut")


@pytest.mark.parametrize("name", ["replaced", "workflow.json", "LOCK", "report.html"])
def test_no_step_has_the_name_of_a_file(tmp_path, name):
    with pytest.raises(ConfigError, match="is the name of a file of the workflow"):
        workflow.Runner(flow(tmp_path, name))
