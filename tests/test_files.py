"Files of samples, runs, prompts and trainings that are damaged: read rightly or refused in one line"
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from hypothesis import given, strategies as st
from torch import nn

from spectrum_nb.lab.training import fit, save_pipeline
from spectrum_nb.samples import all_jobs, read_prompts, save_sample

from commands import assert_refused, run_command
from profiles import examples

pytestmark = pytest.mark.filterwarnings('ignore')

# Files of samples, runs, prompts and trainings

def write_note(folder, name, **changes):
    "The note of a sample, with these entries in place of the usual ones"
    note = dict(prompt=name, seed=0, nth=0, file=f'{name}.png', seconds=1., passes={'': [0, 1]}, errors={},
                fallbacks={}, settings={})
    (folder/f'{name}.json').write_text(json.dumps(note | changes))


def sample_folder(folder, names=('one', 'two')):
    "A folder of small noise pictures and their notes"
    folder.mkdir()
    for k, name in enumerate(names):
        pixels = np.random.default_rng(k).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/f'{name}.png')
        write_note(folder, name)
    return folder


@pytest.fixture
def samples(tmp_path): return sample_folder(tmp_path/'a'), sample_folder(tmp_path/'b')


def compared(folder): return run_command(folder, 'compare', 'a', 'b', '--out', 'c')


def test_sound_folders_compare(samples, tmp_path):
    status, err, new = compared(tmp_path)
    assert status == 0 and {p.name for p in new} == {'c', 'comparison.json', 'comparison.png'}


BROKEN_NOTES = (b'', b'{"file": ', b'\xff\xfe', b'{}', b'{"file": "one.png"}', b'[]', b'null',
                b'{"file": "one.png", "seconds": 1, "passes": []}')


@pytest.mark.parametrize('text, word', [
    *((text, 'one.json') for text in BROKEN_NOTES),
    (b'{"file": "no.png", "seconds": 1, "passes": {}}', 'no.png'),
    (b'{"file": "../b", "seconds": 1, "passes": {}}', 'b'),
])
def test_a_damaged_note_of_a_sample_is_refused(text, word, samples, tmp_path):
    (tmp_path/'a/one.json').write_bytes(text)
    assert_refused(compared(tmp_path), word)


@examples(60, 600)
@given(cut=st.none() | st.integers(0, 900),
       flips=st.lists(st.tuples(st.integers(0, 899), st.integers(1, 255)), max_size=4))
def test_a_damaged_png_is_read_or_refused(cut, flips, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('png')
    a, _ = sample_folder(tmp_path/'a', ('one',)), sample_folder(tmp_path/'b', ('one',))
    data = bytearray((a/'one.png').read_bytes())
    for where, what in flips:
        if where % len(data) not in range(16, 24): data[where % len(data)] ^= what       # other sizes: below
    (a/'one.png').write_bytes(data[:cut])

    answer = compared(tmp_path)
    if answer[0] != 0: assert_refused(answer)
    shutil.rmtree(tmp_path)


def test_a_png_of_a_gigantic_size_is_refused(samples, tmp_path):
    import zlib
    data = bytearray((tmp_path/'a/one.png').read_bytes())
    data[16:24] = (50_000).to_bytes(4, 'big')*2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, 'big')
    (tmp_path/'a/one.png').write_bytes(data)
    assert_refused(compared(tmp_path))


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A clip of four frames: an mp4, and beside it the exact mkv"
    frames = np.random.default_rng(0).random((4, 32, 32, 3))
    return save_sample(frames, tmp_path_factory.mktemp('film')/'one', exact=True)


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
@pytest.mark.parametrize('share', [0, .1, .5, .9])
def test_a_truncated_clip_is_refused(suffix, share, film, tmp_path):
    whole = film.with_suffix(suffix).read_bytes()
    for name, data in dict(a=whole[:int(share*len(whole))], b=whole).items():
        folder = sample_folder(tmp_path/name, ('one',))
        (folder/f'one{suffix}').write_bytes(data)
        write_note(folder, 'one', file=f'one{suffix}')
    assert_refused(compared(tmp_path), 'one')


def test_compare_writes_all_or_nothing(film, tmp_path):
    for name in 'ab':
        folder = sample_folder(tmp_path/name, ('one',))
        shutil.copy(film, folder/'one.mp4')
        write_note(folder, 'one', file='one.mp4')
    (tmp_path/'a/one.mkv').write_bytes(b'broken')
    assert_refused(compared(tmp_path))


@pytest.mark.parametrize('text, word', [
    (b'', 'settings.json'),
    (b'{"model"', 'settings.json'),
    (b'[]', 'settings.json'),
    (b'{}', 'other settings'),
    (b'{"model": "x"}', 'other settings'),
])
def test_damaged_settings_of_a_run_are_refused(text, word, tmp_path):
    (tmp_path/'spectrum_runs/run').mkdir(parents=True)
    (tmp_path/'spectrum_runs/run/settings.json').write_bytes(text)
    (tmp_path/'p.txt').write_text('a red circle')
    assert_refused(run_command(tmp_path, 'run', '--prompts', 'p.txt', '--steps', '1'), word)


@pytest.mark.parametrize('data, word', [
    (b'\xff\xfea\x00', 'not UTF-8'),
    (b'caf\xe9', 'not UTF-8'),
    (b'', 'no prompt'),
    (b'\n \n# x\n', 'no prompt'),
    (b'\xef\xbb\xbf', 'no prompt'),
])
def test_a_prompt_file_that_is_none_is_refused(data, word, tmp_path):
    (tmp_path/'p.txt').write_bytes(data)
    assert_refused(run_command(tmp_path, 'run', '--prompts', 'p.txt'), word)


@examples(60, 600)
@given(st.binary(max_size=300) | st.text(max_size=300).map(lambda s: s.encode('utf-8', 'replace')))
def test_any_bytes_are_prompts_or_refused(data):
    path = Path('/tmp')/f'prompts-{os.getpid()}.txt'
    path.write_bytes(data)
    try: prompts = read_prompts(path)
    except ValueError as e: assert str(path) in str(e)
    else:
        assert len(prompts) >= 1
        assert all(p == p.strip() and p and not p.startswith('#') for p in prompts)
    finally: path.unlink()


def test_a_prompt_listed_many_times_gets_as_many_names_at_once():
    jobs = all_jobs(['a', 'b', 'a']*50_000, [0])
    assert [job.nth for job in jobs][-3:] == [99_998, 49_999, 99_999]


def test_nul_bytes_and_huge_lines_are_a_prompt(tmp_path):
    (tmp_path/'p.txt').write_bytes(b'a\0b\n' + b'x'*10_000_000)
    jobs = all_jobs(read_prompts(tmp_path/'p.txt'), [0])
    assert [len(job.prompt) for job in jobs] == [3, 10_000_000]
    assert all(len(job.name) < 70 for job in jobs)


@pytest.mark.parametrize('c', ['\x0b', '\x0c', '\x1c', '\x85', '\u2028', '\u2029'])
def test_only_newlines_end_a_prompt(c, tmp_path):
    (tmp_path/'p.txt').write_text(f'a red{c}circle', encoding='utf-8')
    assert len(read_prompts(tmp_path/'p.txt')) == 1


@pytest.mark.parametrize('data', [b'', b'broken', None])
def test_a_damaged_checkpoint_of_a_training_is_refused(data, tmp_path):
    from safetensors.torch import save_file
    if data is None: save_file(dict(x=torch.zeros(1)), tmp_path/'vae.safetensors')
    else: (tmp_path/'vae.safetensors').write_bytes(data)
    with pytest.raises((ValueError, TypeError, RuntimeError, OSError)):
        fit('vae', [nn.Parameter(torch.zeros(1))], None, 1, tmp_path)


def test_training_for_negative_steps_is_refused(tmp_path):
    with pytest.raises((ValueError, TypeError)): fit('vae', [nn.Parameter(torch.zeros(1))], None, -5, tmp_path)


def test_training_does_not_delete_a_folder_that_is_no_pipeline(two_pipes, tmp_path):
    (tmp_path/'papers').mkdir()
    (tmp_path/'papers/thesis.txt').write_text('years of work')
    with pytest.raises(ValueError, match='something else'): save_pipeline(two_pipes[0], tmp_path/'papers', {})
    assert (tmp_path/'papers/thesis.txt').exists()
