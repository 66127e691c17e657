"The command line, called within the process of a test, and what a refusal must look like"
import contextlib
import io
import os
from pathlib import Path

from spectrum_nb.cli import main

def run_command(cwd, *args):
    "(status, what was said to stderr, the files that are new)"
    err, old, before = io.StringIO(), Path.cwd(), set(cwd.rglob('*'))
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try: status = main(list(args))
            except SystemExit as e: status = e.code
    finally: os.chdir(old)
    return status, err.getvalue(), set(cwd.rglob('*')) - before


def assert_refused(answer, word=''):
    "Status 2, one sentence that has `word`, nothing written"
    status, err, new = answer
    at = err.rfind('spectrum-nb')
    said = err[at:].strip()
    # on a line of its own, not behind a progress bar
    assert err[:at][-1:] in ('', '\n', '\r') or 'usage:' in err, err[-500:]
    assert status == 2 and 'Traceback' not in err and not new, (status, err[-500:], new)
    assert len(said.splitlines()) == 1 and word in said, err[-1500:]
