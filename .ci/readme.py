"Write the numbers of README.md from the saved table of the hard regime; --check only says whether they are those"
import json
import re
import sys
from pathlib import Path

root = Path(__file__).parents[1]
README = root/'README.md'
WAYS = ('default', 'paper', 'plain steps')


def decibels(rows, method, passes=10):
    "What a method reaches with so many passes, or a dash where it was not measured"
    found = [row['psnr'] for row in rows if (row['method'], row['passes']) == (method, passes)]
    return f'{found[0]:.1f}' if found else '–'


def table_row(model, cells):
    "A model's row: published guidance, then guidance 2.5; captions, 50 steps"
    published = next(cell for cell in cells if cell.endswith('captions, 50 steps') and 'guidance 2.5,' not in cell)
    shown = [decibels(cells.get(cell, []), method)
             for cell in (published, 'guidance 2.5, captions, 50 steps') for method in WAYS]
    return f'| {model} | {" | ".join(shown)} |'


def summary(hard):
    "How the default does against as many plain steps over all cells, each a set-up and a number of passes"
    gains = []
    for model, cells in hard.items():
        for rows in cells.values():
            default, plain = ({row['passes']: row['psnr'] for row in rows if row['method'] == method}
                              for method in ('default', 'plain steps'))
            gains += [(psnr - plain[passes], model) for passes, psnr in default.items()]
    behind = [(gain, model) for gain, model in gains if gain < -.5]
    mean = sum(gain for gain, _ in gains)/len(gains)
    return (f'Over {len(gains)} hard and easy cells the default gains {mean:.1f} dB on plain steps; '
            f'in {len(behind)} of them, all of {" or ".join(sorted({model for _, model in behind}))}, it is behind by '
            f'more than half a decibel, at worst by {-min(gains)[0]:.1f}.')


def with_numbers(text, hard):
    "The README with the numbers of the table"
    for model, cells in hard.items():
        row = table_row(model, cells)
        text, found = re.subn(rf'^\| {model} \|.*$', lambda _: row, text, flags=re.M)
        assert found == 1, f'README.md has {found} rows of {model}'
    text, found = re.subn(r'Over \d+ hard and easy cells.*$', lambda _: summary(hard), text, flags=re.M)
    assert found == 1, 'README.md has no sentence on all cells'
    return text


if __name__ == '__main__':
    old = README.read_text(encoding='utf-8')
    new = with_numbers(old, json.loads((root/'nbs/results/hard.json').read_text(encoding='utf-8'))['tables'])
    if '--check' in sys.argv and new != old: sys.exit('README.md shows other numbers: python .ci/readme.py writes them')
    README.write_text(new, encoding='utf-8')
