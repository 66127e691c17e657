"""Calls in the prose of the notebooks are run, so that one that has become wrong is found

A call is what stands in backticks in a markdown cell, parses as an expression with a call in it, and has no names but
the public ones of `spectrum_nb` and the stand-ins below. So these are left out, since nobody can tell what they mean:
- methods without their object, as `reset()`, and calls of other packages, as `torch.compile(…)`;
- calls with an ellipsis in them, or with names that only the text around them explains, as `without(unet, …)`;
- fenced blocks, which are scripts to copy, and code cells, which the notebooks run themselves;
- the calls in `LEFT_OUT`, for the reason that stands there.

Lines of the command line, in backticks or in a block, are read by the program, but for those with an ellipsis."""
import ast
import re
import shlex
import shutil

import pytest

import spectrum_nb
from spectrum_nb.apply import apply_spectrum
from spectrum_nb.cli import COMMANDS, read_options
from spectrum_nb.handle import SpectrumHandle
from spectrum_nb.plan import make_plan
from spectrum_nb.settings import SpectrumConfig
from spectrum_nb.shipped import calibration_file

from notebooks import inline_code, notebooks

pytestmark = pytest.mark.filterwarnings('ignore')
STAND_INS = {'pipe', 'denoiser', 'plan', 'config', 'run', 'prompt', 'n_steps', 'K'}
LEFT_OUT = {"load_pipeline('flux')": 'its weights would be fetched'}


def names_of(code):
    "The names in a piece of code that is an expression with a call in it; none for all else"
    try: tree = ast.parse(code.strip(), mode='eval')
    except SyntaxError: return set()
    if not any(isinstance(node, ast.Call) for node in ast.walk(tree)): return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def calls_in_prose():
    "(notebook, call) of every call that can be run, each once a notebook"
    found = {}
    known = set(spectrum_nb.__all__) | STAND_INS
    for notebook, cells in notebooks().items():
        codes = [code for cell in cells if cell.kind == 'markdown' for code in inline_code(cell.text)]
        found |= {(notebook, code): None for code in codes if names_of(code) and names_of(code) <= known}
    return [*found]


CALLS = calls_in_prose()
RUN = [(notebook, code) for notebook, code in CALLS if code not in LEFT_OUT]


@pytest.fixture(scope='module')
def names(flux):
    "What the calls may name: a tiny pipeline with its denoiser, a plan, a run that is over, and the public names"
    pipe, call = flux
    config, n_steps = SpectrumConfig(), 50
    with apply_spectrum(pipe) as run: pipe('a red circle', num_inference_steps=8, **call)
    public = {name: getattr(spectrum_nb, name) for name in spectrum_nb.__all__}
    return public | dict(pipe=pipe, denoiser=pipe.transformer, plan=make_plan(config, n_steps), config=config, run=run,
                         prompt='a red circle', n_steps=n_steps, K=2)


@pytest.mark.parametrize('notebook, code', RUN)
def test_a_call_in_prose_runs(notebook, code, names, tmp_path, monkeypatch):
    shutil.copy(calibration_file('tiny-flux', 50), tmp_path/'plan.json')
    monkeypatch.chdir(tmp_path)
    try: made = eval(code.strip(), dict(names))
    except Exception as e: pytest.fail(f'`{code}` in {notebook}: {type(e).__name__}: {e}')
    if isinstance(made, SpectrumHandle): made.remove()


def commands_in_prose():
    "(notebook, words) of every line of the command line, each once a notebook"
    found = {}
    for notebook, cells in notebooks().items():
        prose = '\n'.join(cell.text for cell in cells if cell.kind == 'markdown')
        for line in re.findall(r'(?:^|`)spectrum-nb ([^`\n]+)', prose, re.M):
            words = shlex.split(line, comments=True)
            if len(words) > 1 and '…' not in line and words[0] in COMMANDS: found[notebook, tuple(words)] = None
    return [*found]


COMMAND_LINES = commands_in_prose()


@pytest.mark.parametrize('notebook, words', COMMAND_LINES)
def test_a_command_in_prose_has_options_that_there_are(notebook, words):
    name, *argv = words
    try: read_options(name, argv)
    except ValueError as e: pytest.fail(f'`spectrum-nb {" ".join(words)}` in {notebook}: {e}')


def test_commands_are_found_in_prose():
    assert {words[0] for _, words in COMMAND_LINES} >= {'bench', 'calibrate', 'run', 'train', 'tune'}


def test_calls_are_found_in_prose():
    found = {code for _, code in CALLS}
    assert any(code.startswith('SpectrumConfig(') for code in found)
    assert any(code.startswith('apply_spectrum(pipe, ') for code in found)
    assert LEFT_OUT.keys() <= found, 'a call that is left out is gone from the prose: it need not stand here'


@pytest.mark.parametrize('text, codes', [
    ('`f(1)` and `g(2)`', ['f(1)', 'g(2)']),
    ('``a `tick` b``', ['a `tick` b']),
    ('```python\nf(1)\n```\n`h()`', ['h()']),
    ('no code', []),
])
def test_what_counts_as_inline_code(text, codes): assert inline_code(text) == codes
