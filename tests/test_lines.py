"""Lines that fit: at most 120 characters and one statement a line, in the notebooks' code and in the tests

`line_budget.json` says how many lines of each file still break these rules. A number in it may only go down:
`python tests/test_lines.py` writes the counts of today, and refuses where one grew."""
import io
import json
import sys
import tokenize
from pathlib import Path

import pytest

root = Path(__file__).parents[1]
BUDGET = Path(__file__).with_name('line_budget.json')
LONGEST = 120
FILES = sorted(str(p.relative_to(root)) for pattern in ('nbs/**/*.ipynb', 'tests/**/*.py', '.ci/*.py', '*.py')
               for p in root.glob(pattern) if '.ipynb_checkpoints' not in p.parts)


def code_of(path):
    "The pieces of code in a file: the code cells of a notebook, or the one text of a module"
    text = (root/path).read_text(encoding='utf-8')
    if not path.endswith('.ipynb'): return [text]
    return [''.join(cell['source']) for cell in json.loads(text)['cells'] if cell['cell_type'] == 'code']


def long_lines(code):
    "How many lines have more than 120 characters"
    return sum(len(line) > LONGEST for line in code.splitlines())


def chained_lines(code):
    "How many lines hold several statements, joined by semicolons; one at the end of a line joins nothing"
    plain = '\n'.join('pass' if line.startswith(('%', '!')) else line for line in code.splitlines())
    tokens = list(tokenize.generate_tokens(io.StringIO(plain + '\n').readline))
    ends = (tokenize.NEWLINE, tokenize.COMMENT)
    return len({token.start[0] for token, after in zip(tokens, tokens[1:])
                if token.type == tokenize.OP and token.string == ';' and after.type not in ends})


def counts_of(path):
    "What a file has of each kind, without the kinds it has none of"
    pieces = code_of(path)
    counts = dict(long=sum(map(long_lines, pieces)), chained=sum(map(chained_lines, pieces)))
    return {kind: n for kind, n in counts.items() if n}


def over_budget(counts, budget):
    "The kinds of which there are more than the budget allows, in words"
    return [f'{n} {kind} lines where at most {budget.get(kind, 0)} are allowed'
            for kind, n in counts.items() if n > budget.get(kind, 0)]


@pytest.mark.parametrize('path', FILES)
def test_lines_fit_and_hold_one_statement(path):
    budget = json.loads(BUDGET.read_text())
    counts = counts_of(path)
    grown = over_budget(counts, budget.get(path, {}))
    assert not grown, f'{path}: {", ".join(grown)}. Break the lines at {LONGEST} characters, one statement each'
    assert counts == budget.get(path, {}), f'{path} is better than its budget: python {Path(__file__).name} lowers it'


def test_the_budget_names_no_file_that_is_gone():
    gone = set(json.loads(BUDGET.read_text())) - set(FILES)
    assert not gone, f'no such files: {sorted(gone)}; python tests/test_lines.py forgets them'


@pytest.mark.parametrize('code, long, chained', [
    ('x = 1\n', 0, 0),
    ('x = 1; y = 2\n', 0, 1),
    ('plot(x);\n', 0, 0),
    ('plot(x);  # no output\n', 0, 0),
    ('x = "a; b"  # and; so on\n', 0, 0),
    ('%matplotlib inline; x\nx = 1; y = 2; z = 3\n', 0, 1),
    ('x = "' + 'a'*115 + '"\n', 1, 0),
    ('x = "' + 'a'*114 + '"\n', 0, 0),
])
def test_what_counts_as_long_and_as_chained(code, long, chained):
    assert (long_lines(code), chained_lines(code)) == (long, chained)


def test_a_budget_is_exceeded_in_each_kind_by_itself():
    assert not over_budget(dict(long=3), dict(long=3, chained=1))
    assert len(over_budget(dict(long=4, chained=1), dict(long=3))) == 2


def lower_budget():
    "Write the counts of today as the budget; a count that grew is refused, a file that is new has none to spend"
    budget = json.loads(BUDGET.read_text()) if BUDGET.exists() else None
    counts = {path: found for path in FILES if (found := counts_of(path))}
    if budget is not None:
        grown = [f'{path}: {", ".join(said)}' for path, found in counts.items()
                 if (said := over_budget(found, budget.get(path, {})))]
        if grown: sys.exit('\n'.join([*grown, 'The budget only falls: break these lines first.']))
    BUDGET.write_text(json.dumps(counts, indent=1) + '\n')
    kinds = ('long', 'chained')
    print(', '.join(f'{sum(found.get(kind, 0) for found in counts.values())} {kind} lines' for kind in kinds), 'in',
          len(counts), 'of', len(FILES), 'files')


if __name__ == '__main__': lower_budget()
