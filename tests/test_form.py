"""The form of the notebooks: short cells, one public definition each, short modules, imports that lead downwards

The numbers below may only become stricter, as those of the line budget. A message names what breaks a rule."""
import subprocess
import sys

import numpy as np
import pytest

from notebooks import (exported, inner_imports, modules_imported, notebook_of_module, notebooks, public_definitions,
                       root)

MEDIAN, NINE_IN_TEN, LONGEST = 10, 25, 60      # lines of an exported cell
SEVERAL = .10                                  # share of the exported cells with several public definitions
MODULE = 260                                   # lines of a generated module

# packages that the library does without until somebody asks for what they do, and what draws
OPTIONAL = {'bitsandbytes', 'cache_dit', 'lpips', 'matplotlib', 'torchao'}


def lines_of(cell): return len(cell.text.split('\n'))


def listed(offenders, shown=30):
    "The offenders, one a line; of many the first"
    more = len(offenders) - shown
    return '\n'.join(['', *map(str, offenders[:shown]), *([f'… and {more} more'] if more > 0 else [])])


def longest_first(limit):
    "The exported cells of more lines than the limit"
    cells = sorted((cell for cell in exported() if lines_of(cell) > limit), key=lines_of, reverse=True)
    return listed([f'{lines_of(cell)} lines: {cell.place}' for cell in cells])


def test_the_typical_exported_cell_is_short():
    median = np.median([lines_of(cell) for cell in exported()])
    assert median <= MEDIAN, f'the median is {median:g} lines, at most {MEDIAN} are allowed'


def test_nine_in_ten_exported_cells_fit_half_a_screen():
    quantile = np.quantile([lines_of(cell) for cell in exported()], .9)
    assert quantile <= NINE_IN_TEN, (f'one in ten has more than {quantile:g} lines, at most {NINE_IN_TEN} are allowed'
                                     + longest_first(NINE_IN_TEN))


def test_no_exported_cell_is_longer_than_a_screen():
    offenders = longest_first(LONGEST)
    assert not offenders, f'more than {LONGEST} lines:{offenders}'


def test_an_exported_cell_has_one_public_definition():
    several = [cell for cell in exported() if len(public_definitions(cell)) > 1]
    share = len(several)/len(exported())
    assert share <= SEVERAL, (f'{share:.1%} of the exported cells have several, at most {SEVERAL:.0%} may'
                              + listed([f'{cell.place}: {", ".join(public_definitions(cell))}' for cell in several]))


def test_a_generated_module_is_a_few_screens_long():
    files = [p for p in sorted((root/'spectrum_nb').rglob('*.py')) if p.name != '_modidx.py']
    lengths = {str(p.relative_to(root)): len(p.read_text(encoding='utf-8').splitlines()) for p in files}
    offenders = [f'{n} lines: {name}' for name, n in sorted(lengths.items(), key=lambda item: -item[1]) if n > MODULE]
    assert not offenders, f'more than {MODULE} lines, make two notebooks of each:{listed(offenders)}'


@pytest.mark.parametrize('where', ['exported cells', 'checks'])
def test_a_notebook_imports_from_those_before_it(where):
    order = {name: number for number, name in enumerate(notebooks()) if name != 'index'}
    offenders = []
    for name in order:
        cells = [c for c in notebooks()[name] if c.kind == 'code' and c.is_exported == (where == 'exported cells')]
        for cell in cells:
            modules = {module for _, module in modules_imported(cell.tree)}
            later = [m for m in sorted(modules) if order.get(notebook_of_module()[m], -1) > order[name]]
            offenders += [f'{name} [{cell.id}] imports {m}, which is {notebook_of_module()[m]}' for m in later]
    assert not offenders, f'imports of later notebooks in {where}:{listed(offenders)}'


def test_importing_the_package_loads_nothing_of_the_lab():
    code = 'import sys, spectrum_nb; print(*sorted(m for m in sys.modules if m.startswith("spectrum_nb.lab")))'
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    assert not done.stdout.split(), f'loaded:{listed(done.stdout.split())}'


def test_no_function_of_an_exported_cell_imports():
    offenders = [f'{cell.place}: line {line} imports {package}' for cell in exported()
                 for line, package in inner_imports(cell) if package not in OPTIONAL]
    assert not offenders, f'imports inside functions:{listed(offenders)}'
