"Every notebook is a test: its cells run in order, those flagged notest, slow or cuda excepted"
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

config = get_config(path=Path(__file__).parent)


@pytest.mark.parametrize('path', sorted(config.nbs_path.glob('*.ipynb')), ids=lambda p: p.stem)
def test_notebook(path):
    passed, _ = run_nb(path, skip_flags=config.tst_flags.split())
    assert passed, f'{path.name}: see the traceback above'
