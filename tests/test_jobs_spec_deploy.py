"""Where a job runs: the address of a cluster, in the file and on the command line."""

from pathlib import Path

import pytest

from jobs.arguments import make_parser
from jobs.cli import _spec
from jobs.spec import load_spec
from schemas.errors import SpecError
from tests.fake_jobs import job_file

ADDRESS = "tcp://scheduler:8786"


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return job_file(tmp_path_factory.mktemp("job"))


def test_address_goes_with_runner_dask(job: Path) -> None:
    spec = load_spec(str(job), {"deploy": {"runner": "dask", "dask_address": ADDRESS}})
    assert (spec.runner, spec.dask_address) == ("dask", ADDRESS)
    assert load_spec(str(job)).dask_address == ""
    for deploy in ({}, {"runner": "local"}, {"runner": "portable"}):
        with pytest.raises(SpecError, match=r"\[deploy\] dask_address is \"tcp://scheduler:8786\"") as caught:
            load_spec(str(job), {"deploy": {**deploy, "dask_address": ADDRESS}})
        assert 'runner = "dask"' in caught.value.remedy


def test_address_on_the_command_line_implies_the_runner(job: Path) -> None:
    spec = _spec(make_parser().parse_args(["run", str(job), "--dask-address", ADDRESS]))
    assert (spec.runner, spec.dask_address) == ("dask", ADDRESS)
    with pytest.raises(SpecError, match="dask_address"):
        _spec(make_parser().parse_args(["run", str(job), "--dask-address", ADDRESS, "--runner", "local"]))
