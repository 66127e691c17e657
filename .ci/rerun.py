"Execute notebooks and save their outputs; by default all, without the cells flagged notest, slow or cuda"
import argparse
import os
import subprocess
import sys
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

SKIP = set(get_config(path=Path(__file__).parent).tst_flags.split())


def rerun(path, skip):
    "Run one notebook and save it with its outputs; whatever is flagged keeps the outputs it had"
    os.environ['IN_TEST'] = '1'
    nb = NBProcessor(path, process=True).nb
    saved = {c.id: c.outputs for c in nb.cells if c.cell_type == 'code'}
    for cell in nb.cells: cell.outputs = []          # the shell leaves those of a cell that has none now
    shell, skipped = CaptureShell(path), set()

    def preproc(cell):
        directives = getattr(cell, 'directives_', None) or {}
        if cell.cell_type != 'code' or skip & set(directives) or directives.get('eval:') == ['false']:
            skipped.add(cell.id)
            return True
        # a semicolon hides the value of a cell; the shell would hide what it prints, too
        if cell.cell_type == 'code' and cell.source.rstrip().endswith(';'): cell.source = f'{cell.source}\nNone'

    with working_directory(path.parent):
        try: shell.run_all(nb, exc_stop=True, preproc=preproc)
        except Exception: sys.exit(shell.prettytb(path.name))
    fresh = read_nb(path)            # the sources as they are on disk: processing may change them
    for cell, ran in zip(fresh.cells, nb.cells, strict=True):
        if cell.cell_type == 'code':
            cell.outputs = saved[cell.id] if cell.id in skipped else [o for o in ran.outputs if not noise(o)]
    clean_nb(fresh)
    write_nb(fresh, path)


def noise(output):
    "Progress bars and warnings go to the error stream; they differ from run to run and are not results"
    return output.get('name') == 'stderr'


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('notebooks', nargs='*', type=Path, help='by default all')
    parser.add_argument('--slow', action='store_true',
                        help='run the cells flagged slow, too: they write the saved results anew')
    args = parser.parse_args()
    given = [p.resolve() for p in args.notebooks]
    paths = given or sorted(get_config(path=Path(__file__).parent).nbs_path.glob('*.ipynb'))
    if len(paths) == 1: rerun(paths[0], SKIP - {'slow'} if args.slow else SKIP)
    else:
        for path in paths:      # each in a process of its own, so that no notebook feels those before it
            print(path.name, flush=True)
            subprocess.run([sys.executable, __file__, path, *(['--slow'] if args.slow else [])], check=True)
