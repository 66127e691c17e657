"Command lines with something wrong in them: each is answered in one line that names it, and nothing is written"
import shutil

import pytest
import torch
from hypothesis import given, strategies as st

from spectrum_nb.cli import COMMANDS

from commands import assert_refused, run_command
from profiles import examples

pytestmark = pytest.mark.filterwarnings('ignore')

# Command lines

bad_int = st.sampled_from(
    ['0', '-1', '-99999999999999999999', '1.5', 'nan', '', ' ', 'x', '１x', '1e3', '0x10', '--', '9'*5000, '٣.٥'])
bad_float = st.sampled_from(['nan', 'inf', '-inf', '-1', '-1e-300', '1e999', 'x', '', '1,5', '--'])
odd_words = st.sampled_from(['\udcff', '🦊', 'a\nb', '../..', '%s', '{}', "'", 'x'*3000])
words = st.text(st.characters(exclude_categories=['Cs']), max_size=12) | odd_words
no_file = st.sampled_from(
    ['', 'nothing.txt', 'sub', './nowhere/x', 'x'*3000, 'nul\0', '~nobody/x', '/dev/null', 'bad.txt'])
no_model = st.sampled_from([
    '', 'tiny-flex', './nowhere', 'sub', '/', '.', 'bad.txt', '/dev/null', 'x'*300, 'nul\0', 'a\nb', 'TINY-FLUX',
    '🦊'])
no_name = st.sampled_from(['a/b', '/', '../x', 'x/', './x', '.'])
no_folders = st.sampled_from([
    [], ['a'], ['a', 'b', 'c'], ['a', 'b'], ['sub', 'sub'], ['sub', 'bad.txt'], ['bad.txt', 'sub'], ['nul\0', 'sub'],
    ['', ''], ['x'*3000, 'sub'], ['sub', 'sub', '--no'], ['sub', 'sub', '--out'], ['🦊', '\udcff']])
bad_seed = st.sampled_from(['x', '1.5', ''])


def is_unknown_option(word):
    "Whether the word would be no option of any command"
    if not word or '=' in word or any(c.isspace() for c in word): return False
    return not any(option.startswith(word) for option in ('help', 'pdb', 'xtra'))


def is_no_command(word): return word not in COMMANDS and word != 'help' and not word.startswith('-')


SIZES = {'--guidance': bad_float, '--height': bad_int, '--width': bad_int, '--frames': bad_int, '--fps': bad_int}
CONFIG = {
    '--alpha': bad_float,
    '--window': bad_float | st.just('.99'),
    '--warmup': bad_int,
    '--degree': bad_int.filter(lambda v: v != '0'),
    '--lam': bad_float,
    '--blend': bad_float | st.just('1.0001'),
    '--schedule': st.sampled_from(['', 'sigma', 'uniform', 'window', 'Even']),
    '--forecaster': st.sampled_from(['', 'linear', 'spectrum', 'gram']),
}
BAD = {
    'demo': {'--model': no_model | st.just('flux'), '--prompts': bad_int, '--seeds': bad_int, '--steps': bad_int},
    'sample': {
        '--model': no_model, '--steps': bad_int,
        '--out': st.sampled_from(['x.jpg', 'x.PNG', 'a.b/c.d', 'x.🦊']), '--seed': bad_seed,
    } | SIZES | CONFIG,
    'run': {
        '--prompts': no_file, '--model': no_model, '--name': no_name, '--limit': bad_int,
        '--seed': bad_int.filter(lambda v: v != '0'), '--seeds': bad_int, '--steps': bad_int,
    } | SIZES | CONFIG,
    'bench': {
        '--what': words.filter(lambda w: w not in ('forecast', 'loop', 'quality')), '--prompts': bad_int,
        '--rounds': bad_int,
    },
    'train': {'--model': no_model, '--seed': bad_seed},
}
GOOD = dict(demo=[], sample=['--prompt', 'x'], run=['--prompts', 'good.txt'], bench=[], train=['trained'])


@st.composite
def bad_lines(draw):
    "A line with one thing wrong in it, and harmless things said twice around it"
    name = draw(st.sampled_from([*BAD, 'compare', 'none']))
    if name == 'none': return [draw(words.filter(is_no_command))]
    if name == 'compare': return ['compare', *draw(no_folders)]

    option, values = draw(st.sampled_from(sorted(BAD[name].items(), key=lambda item: item[0])))
    joined = values.map(lambda v: [f'{option}={v}'])
    apart = values.filter(lambda v: not v.startswith('-')).map(lambda v: [option, v])
    unknown = words.filter(is_unknown_option).map(lambda w: [f'--{w}-'])
    stray = st.sampled_from([['stray'], [option, option]])
    wrong = draw(st.one_of(joined, apart, unknown, st.just([option]), stray))
    harmless = draw(st.sampled_from([[], [], ['--pdb']]))
    return [name, *GOOD[name], *harmless, *wrong]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    "A folder with an empty folder, a file that is no text, and a file with one prompt"
    folder = tmp_path_factory.mktemp('cli')
    (folder/'sub').mkdir()
    (folder/'bad.txt').write_bytes(b'caf\xe9')
    (folder/'good.txt').write_text('a red circle')
    return folder


@examples(300, 3000)
@given(line=bad_lines())
def test_bad_command_lines_are_answered_in_one_line(line, folder):
    assert_refused(run_command(folder, *line))


@pytest.mark.parametrize('name', COMMANDS)
def test_help(name, folder):
    assert run_command(folder, name, '--help') == (0, '', set())


HUGE = '1' + '0'*400
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason='there is one')


@pytest.mark.parametrize('line, word', [
    (['sample', '--prompt', 'x', '--steps', HUGE], 'steps'),
    (['sample', '--prompt', 'x', '--degree', HUGE], 'degree'),
    (['run', '--prompts', 'good.txt', '--limit', HUGE], 'limit'),
    (['sample', '--prompt', 'x', '--steps', '1000000'], 'steps'),
    (['sample', '--prompt', 'x', '--steps', '9', '--degree', '1000000'], 'degree'),
    (['demo', '--steps', '1000000'], 'steps'),
    pytest.param(['sample', '--prompt', 'x', '--device', 'cuda'], 'cuda', marks=without_cuda),
    pytest.param(['run', '--prompts', 'good.txt', '--device', 'cuda'], 'cuda', marks=without_cuda),
    (['sample', '--prompt', 'x', '--device', 'toaster'], 'toaster'),
    (['bench', '--what', 'loop', '--device', 'toaster'], 'toaster'),
    (['sample', '--prompt', 'x', '--steps', '1', '--seed', '9'*30], 'seed'),
    (['sample', '--prompt', 'x', '--steps', '1', '--frames', '3'], 'num_frames'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', 'good.txt/x'], ''),
    (['sample', '--prompt', 'x', '--steps', '1', '--height', '9'*30], 'height'),
    (['run', '--prompts', 'good.txt', '--steps', '1', '--seed', '9'*30], 'seed'),
    (['run', '--prompts', 'good.txt', '--model', './nowhere', '--name', '..'], 'one folder'),
    (['run', '--prompts', 'good.txt', '--model', './nowhere', '--name', ''], 'one folder'),
    (['sample', '--prompt', '\udcff', '--steps', '1'], 'UTF-8'),
    (['sample', '--prompt', 'x', '--steps', '1', '--guidance', '1e308'], 'guidance'),
    (['sample', '--prompt', 'x', '--steps', '1', '--height', '7'], 'height'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', '..'], 'out'),
    (['sample', '--prompt', 'x', '--steps', '1', '--out', ''], 'out'),
    (['sample', '--prompt', 'x', '--steps', '1', '--model', 'tiny-wan', '--fps', '9'*20], 'fps'),
    (['train', '', '--model', 'tiny-wan'], 'out'),
    (['train', 'x', '--seed', '-1'], 'seed'),
    (['train', 'x', '--denoiser_steps', '-5'], 'denoiser'),
    (['train', 'sub/papers'], 'something else'),
    (['train', 'good.txt'], 'no folder'),
])
def test_arguments_that_are_answered_late_or_badly(line, word, folder, tmp_path):
    here = tmp_path/'here'
    shutil.copytree(folder, here)
    (here/'sub/papers').mkdir()
    (here/'sub/papers/thesis.txt').write_text('years of work')
    assert_refused(run_command(here, *line), word)
