"Quiet output, sub-commands, and what a new user does from README alone"
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from spectrum_nb.candidates import candidates
from spectrum_nb.cli import main
from spectrum_nb.presets import load_pipeline

COMMAND = Path(sys.executable).with_name('spectrum-nb')
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS='1')
root = Path(__file__).parents[1]


def call(*words, cwd):
    return subprocess.run([COMMAND, *map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=300,
                          env=ONE_THREAD)


@pytest.mark.parametrize('model', ['tiny-flux', 'tiny-sdxl'])
def test_a_sample_says_nothing_but_one_bar(model, tmp_path):
    done = call('sample', '--prompt', 'a red cross', '--model', model, '--steps', 12, '--out', 'one', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.replace('\r', '\n').split('\n') if line.strip()]
    assert done.stderr.count(' 0/12 [') == 1
    assert 'Loading' not in done.stderr
    assert all('12 [' in line for line in lines), done.stderr


def test_a_note_of_ours_is_one_line(tmp_path):
    done = call('sample', '--prompt', 'a red cross', '--steps', 4, '--out', 'one', cwd=tmp_path)
    notes = [line for line in done.stderr.split('\n') if 'note:' in line]
    assert len(notes) == 1
    assert notes[0].startswith('spectrum-nb: note: a run of 4 steps')
    assert '.py' not in done.stderr


@pytest.mark.slow
def test_from_a_saved_pipeline_to_a_report_card_in_one_command(tmp_path):
    shutil.copytree(root/'spectrum_nb/weights/tiny-flux', tmp_path/'mine')
    (tmp_path/'mine/training.json').unlink()                    # a pipeline of somebody else
    (tmp_path/'prompts.txt').write_text('a red cross\na blue circle\na green square\n')

    done = call('tune', '--model', './mine', '--prompts', 'prompts.txt', '--steps', 8, '--speedups', '2',
                '--out', 'card', cwd=tmp_path)

    assert done.returncode == 0, done.stderr
    card = json.loads((tmp_path/'card/card.json').read_text())
    ways = {'default', 'calibrated', "paper's", 'reuse, equal gaps', 'plain steps', 'second-order steps'}
    assert {row['name'] for row in card['rows']} == ways
    assert card['model'] == './mine'
    assert card['calibrated_on'] == ['a red cross']
    assert card['verdicts'][0]['sentence'] in done.stdout
    assert {'card.html', 'card.md', 'plan.json', 'strip.png'} <= {p.name for p in (tmp_path/'card').iterdir()}


@pytest.mark.slow
def test_bench_has_sub_commands(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, says in (
            ('nothing', 'choose forecast'),
            ('--what nothing', 'choose forecast'),
            ('cost --prompts 3', 'bench cost has no --prompts'),
            ('hard --models tiny-flix', 'knows no model tiny-flix')):
        assert main(['bench', *words.split()]) == 2
        assert says in capsys.readouterr().err

    few = ['--models', 'tiny-sd3', '--prompts', '1']
    assert main(['bench', 'few', *few]) == 0
    assert main(['bench', '--what', 'few', *few, '--out', 'too.json']) == 0
    one, two = (json.loads((tmp_path/f).read_text())['tables'] for f in ('bench.json', 'too.json'))
    assert one == two
    assert one


def test_an_unfinished_table_that_was_measured_otherwise_is_refused_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    there = dict(tables={'tiny-sd3': {'20 steps': [dict(psnr=1.)]}}, unfinished=True,
                 provenance=dict(command='spectrum-nb bench --what few --prompts 1 --out few.json', device='none'))
    for what in ('few', 'cost', 'loop'):
        (tmp_path/'other.json').write_text(json.dumps(there))
        assert main(['bench', what, '--out', 'other.json']) == 2
        said = capsys.readouterr()
        assert said.err.count('\n') == 1 and not said.out, said.err
        for words in ("device was 'none', now 'CPU", '--out few.json', 'give another --out, or remove the file'):
            assert words in said.err, said.err
        assert json.loads((tmp_path/'other.json').read_text()) == there


@pytest.mark.parametrize('model', ['tiny-flux', 'flux'])
def test_what_a_report_card_pastes_can_be_imported(model):
    ways = candidates(load_pipeline('tiny-flux', 'cpu'), model, 50, (3.5, 5))
    lines = [line for way in ways for line in way.code.split('\n') if line.startswith('from ')]
    assert any('second_order' in line for line in lines)
    for line in lines: exec(line, {})


@pytest.mark.parametrize('command', ['sample', 'run', 'calibrate', 'tune'])
@pytest.mark.parametrize('words, says', [
    (['--offload', 'everything'], '--offload must be'),
    (['--dtype', 'int8'], '--dtype must be'),
    (['--quantize', 'int1'], '--quantize must be'),
    (['--lora', './no.safetensors'], '--lora: there is no'),
    (['--scheduler', 'Euclid'], '--scheduler Euclid'),
    (['--set', 'speed=1'], '--set speed'),
    (['--num', '0'], 'num must'),
    (['--image', 'no.png'], '--image no.png'),
    (['--frames', '9'], '--frames: FluxPipeline'),
])
def test_bad_options_are_answered_in_one_line_and_write_nothing(command, words, says, tmp_path, monkeypatch, capsys):
    # an index without weights: whatever is loaded fails otherwise
    (tmp_path/'mine').mkdir()
    shutil.copy(root/'spectrum_nb/weights/tiny-flux/model_index.json', tmp_path/'mine')
    (tmp_path/'p.txt').write_text('a\nb\nc\n')
    monkeypatch.chdir(tmp_path)
    wanted = ['--prompt', 'x'] if command == 'sample' else ['--prompts', 'p.txt']

    status = main([command, '--model', './mine', *wanted, *words])

    said = capsys.readouterr()
    assert status == 2
    assert says in said.err
    assert said.err.count('\n') == 1
    assert not said.out
    assert sorted(p.name for p in tmp_path.iterdir()) == ['mine', 'p.txt']
