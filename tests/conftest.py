import os
from pathlib import Path

import pytest

root = Path(__file__).resolve().parent.parent
os.environ |= dict(BLIPBOOTH_QUIET='1', HF_HUB_OFFLINE='1', MPLBACKEND='agg')
os.chdir(root)  # nbdev looks for settings.ini from here


@pytest.fixture(scope='session')
def project(): return root
