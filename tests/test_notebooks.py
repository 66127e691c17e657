"""Every notebook is a test: its cells run in order, those flagged notest, slow or cuda excepted

Theory, method and engine (the notebooks up to 17, and the first page) are among the quick tests."""
from pathlib import Path

import pytest
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

config = get_config(path=Path(__file__).parent)
QUICK = [f'{number:02}' for number in range(18)] + ['in']
NOTEBOOKS = [pytest.param(path, id=path.stem, marks=() if path.stem[:2] in QUICK else pytest.mark.slow)
             for path in sorted(config.nbs_path.glob('*.ipynb'))]


@pytest.mark.parametrize('path', NOTEBOOKS)
def test_notebook(path):
    passed, _ = run_nb(path, skip_flags=config.tst_flags.split())
    assert passed, f'{path.name}: see the traceback above'
