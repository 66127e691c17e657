"""The commands that two pages offer to whoever has the real checkpoints, run small

The lines are read from the pages themselves. The tiny twin stands in the model's place, with two of its captions and
12 steps for 50; the numbers of passes shrink in proportion."""
import json
import math
import re
import shlex
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path

import pytest
from fastcore.xtras import working_directory

from spectrum_nb.cli import main
from spectrum_nb.lab.captions import held_captions
from spectrum_nb.lab.images import WAYS, real_row, real_table
from spectrum_nb.presets import call_defaults
from spectrum_nb.runs import finished

NOTEBOOKS = Path(__file__).parents[1]/'nbs'
PICTURES, CLIPS = 'M=flux', 'M=hunyuan'      # how the two blocks of commands begin
# of 12 steps: what 14 and 10 of 50 become, passes or plain steps
PASSES = dict(zip(WAYS, (8, 7, 4, 3, 4, 3, 4, 3)))


def command_lines(first):
    "The lines that begin with `spectrum-nb` in the block of the page on pictures and clips that begins with `first`"
    cells = json.loads((NOTEBOOKS/'53_images.ipynb').read_text(encoding='utf-8'))['cells']
    texts = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'markdown']
    blocks = [block for text in texts for block in re.findall(r'^```\w*\n(.*?)^```', text, re.S | re.M)]
    return [line for block in blocks if block.startswith(f'{first}\n') for line in block.splitlines()
            if line.startswith('spectrum-nb ')]


def first_ways(lines):
    "The full runs, the paper's 14 passes and the calibrated 14: enough to see that a model is served"
    return [line for line in lines
            if re.search(r'/?\$M-(paper|calibrated)-14 *(--baseline)? *(--exact)?$|calibrate ', line)]


def rehearsal(line, twin, steps=12):
    "The same command, small: the twin for the model, two prompts, fewer steps and passes in proportion; its words"
    def small(k): return str(math.ceil(int(k)*steps/50))
    words = shlex.split(line.replace('$M', twin))[1:]
    for i, word in enumerate(words[:-1]):
        if word == '--steps': words[i + 1] = small(words[i + 1])
        if word == '--passes': words[i + 1] = ','.join(map(small, words[i + 1].split(',')))
    return words + {'run': ['--limit', '2'], 'calibrate': ['--limit', '2', '--trials', '1']}.get(words[0], [])


def rehearse(lines, twin, folder):
    "Run command lines small in a folder, one after another; one that fails is told with its words and its answer"
    with working_directory(folder):
        for words in (rehearsal(line, twin) for line in lines):
            out, err = StringIO(), StringIO()
            with redirect_stdout(out), redirect_stderr(err): code = main(words)
            assert code == 0, f'spectrum-nb {" ".join(words)}\n{err.getvalue()}'


def rehearsed(lines, twin, prompts, folder):
    "The rows that a page's lines measure with a twin, after checks of what is the same for pictures and clips"
    captions = held_captions(call_defaults(None, twin), 10)
    (folder/f'{prompts}.txt').write_text('\n'.join(captions[:2]))
    (folder/'calibration.txt').write_text('\n'.join(captions[2:]))
    rehearse(lines, twin, folder)
    rows = {way: row for way in WAYS if (row := real_row(f'{twin}-{way}', folder/'results/real'))}
    assert {way: (row['pairs'], row['passes']) for way, row in rows.items()} == {way: (2, PASSES[way]) for way in rows}
    return captions, rows


@pytest.mark.slow
@pytest.mark.parametrize('twin, choose, measured', [
    ('tiny-flux', list, 8),
    ('tiny-sd3', first_ways, 2),
    ('tiny-sdxl', first_ways, 2),
])
def test_the_commands_for_pictures_work(twin, choose, measured, tmp_path):
    captions, rows = rehearsed(choose(command_lines(PICTURES)), twin, 'drawbench', tmp_path)
    assert len(rows) == measured
    for way in rows:
        folder = tmp_path/f'spectrum_runs/{twin}-{way}'
        samples = finished(folder).values()
        assert [(folder/s['file']).is_file() and s['prompt'] in captions for s in samples] == [True]*2
    assert all(10 < row['psnr'] < 100 and row['speedup'] > 0 for row in rows.values())
    lines = real_table([twin], tmp_path/'results/real').data.splitlines()[2:]
    assert [line.split(' | ')[4] != '' for line in lines] == [way in rows for way in WAYS]


@pytest.mark.slow
@pytest.mark.parametrize('twin, choose, measured', [('tiny-hunyuan', list, 8), ('tiny-wan', first_ways, 2)])
def test_the_commands_for_clips_work(twin, choose, measured, tmp_path):
    _, rows = rehearsed(choose(command_lines(CLIPS)), twin, 'video_prompts', tmp_path)
    assert len(rows) == measured
    for way in rows:
        samples = finished(tmp_path/f'spectrum_runs/{twin}-{way}').values()
        assert [s['size'] for s in samples] == [[9, 32, 32, 3]]*2
    summary = json.loads((tmp_path/f'spectrum_runs/{twin}-paper-14/summary.json').read_text())
    # packed as FFV1 a clip loses next to nothing
    assert abs(summary['against full']['psnr'] - rows['paper-14']['psnr']) < 1


def test_the_commands_for_clips_are_those_for_pictures():
    pictures, clips = command_lines(PICTURES), command_lines(CLIPS)
    assert len(pictures) == 17
    adapted = [line.replace('drawbench', 'video_prompts').replace('--limit 8', '--limit 4') for line in pictures]
    assert [line.replace(' --exact', '') for line in clips] == adapted


def test_a_rehearsal_is_the_same_command_small():
    words = 'run --model tiny-wan --steps 12 --passes 4,3 --limit 2'.split()
    assert rehearsal('spectrum-nb run --model $M --steps 50 --passes 14,10', 'tiny-wan') == words


def test_a_command_that_fails_is_not_taken_for_one_that_works(tmp_path):
    with pytest.raises(AssertionError, match=r'none\.txt'):
        rehearse(['spectrum-nb run --model $M --prompts none.txt --name x'], 'tiny-flux', tmp_path)
