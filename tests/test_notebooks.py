"Every notebook runs from top to bottom; its cells are the tests of its module."
import gc, os
from unittest.mock import patch

import pytest
from nbdev.config import get_config
from nbdev.doclinks import nbglob
from nbdev.test import test_nb as run_notebook

cfg = get_config()
notebooks = sorted(nbglob(cfg.nbs_path, as_path=True))


@pytest.mark.parametrize('path', notebooks, ids=lambda o: o.relative_to(cfg.nbs_path).with_suffix('').as_posix())
def test_notebook(path):
    with patch.dict(os.environ): passed, _ = run_notebook(path.absolute(), skip_flags=cfg.tst_flags.split())
    gc.collect()
    assert passed, f'{path.name} fails; the traceback of its cell is on stderr'
