import os, shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

root = Path(__file__).resolve().parent.parent
os.environ |= dict(BLIPBOOTH_QUIET='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
os.chdir(root)  # nbdev looks for settings.ini from here


@pytest.fixture(scope='session')
def project(): return root


@pytest.fixture
def tmp_path(tmp_path, request):
    "pytest's own, emptied once its test has passed: the runs of all tests together would fill a small disk."
    before = request.session.testsfailed
    yield tmp_path
    if request.session.testsfailed == before: shutil.rmtree(tmp_path, ignore_errors=True)


@pytest.fixture
def here(capfd, monkeypatch):
    "The `blipbooth` command in this process, where all that it imports is there already: for what ends before any work."
    from blipbooth.cli import main
    def run(*args, cwd):
        monkeypatch.chdir(cwd)
        capfd.readouterr()
        try: status = main([*map(str, args)]) or 0
        except SystemExit as e: status = e.code
        return SimpleNamespace(returncode=status, stderr=capfd.readouterr().err)
    return run
