"Execute notebooks and save their outputs; by default all, without the cells flagged notest, slow or cuda"
import argparse
import base64
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
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
            fresh_ones = [o for o in ran.outputs if not noise(o)]
            cell.outputs = saved[cell.id] if cell.id in skipped else kept_pictures(fresh_ones, saved[cell.id])
    clean_nb(fresh)
    write_nb(fresh, path)


def kept_pictures(outputs, saved):
    "New outputs, but a saved picture in place of one that differs from it by the rounding of another processor alone"
    if len(outputs) != len(saved): return outputs
    return [old if same_picture(new, old) else new for new, old in zip(outputs, saved)]


def same_picture(*outputs):
    "Whether two outputs are one picture, up to two of 255 levels"
    coded = [o.get('data', {}).get('image/png') for o in outputs]
    if not all(coded): return False
    new, old = (np.asarray(Image.open(io.BytesIO(base64.b64decode(''.join(c))))).astype(int) for c in coded)
    return new.shape == old.shape and np.abs(new - old).max() <= 2


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
