"The notebooks as the tests of their form read them: cells, what they export, what they import"
import ast
import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

root = Path(__file__).parents[1]


@dataclass(frozen=True)
class Cell:
    "A cell of a notebook: its kind, its text without directives, and which directives it has"
    notebook: str
    id: str
    kind: str
    text: str
    directives: tuple

    @property
    def is_exported(self): return self.kind == 'code' and any(re.match('exports?i?$', d) for d in self.directives)

    @property
    def tree(self):
        "The syntax tree; lines for IPython or the shell are left out"
        lines = ['pass' if re.match(r'\s*[%!]', line) else line for line in self.text.split('\n')]
        return ast.parse('\n'.join(lines))

    @property
    def place(self):
        "Where the cell is, in a word or two: notebook, cell, first line"
        return f'{self.notebook} [{self.id}] {self.text.split(chr(10))[0][:60]}'


def read_cells(path):
    "The cells of a notebook"
    cells = []
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        is_code = cell['cell_type'] == 'code'
        directives = tuple(re.findall(r'^#\|\s*(\S+)', source, re.M)) if is_code else ()
        text = re.sub(r'^#\|.*\n?', '', source, flags=re.M).strip('\n') if is_code else source
        cells.append(Cell(path.stem, cell['id'], cell['cell_type'], text, directives))
    return cells


@cache
def notebooks():
    "{name: cells} of all notebooks, in the order of their file names"
    return {path.stem: read_cells(path) for path in sorted((root/'nbs').glob('*.ipynb'))}


def only_imports(cell): return all(isinstance(node, (ast.Import, ast.ImportFrom)) for node in cell.tree.body)


@cache
def exported():
    "The exported cells of all notebooks, but for those that only import"
    return [cell for cells in notebooks().values() for cell in cells if cell.is_exported and not only_imports(cell)]


@cache
def notebook_of_module():
    "{module of the package: the notebook that it is generated from}"
    texts = {path.stem: path.read_text(encoding='utf-8') for path in (root/'nbs').glob('*.ipynb')}
    found = {name: re.search(r'#\| default_exp ([\w.]+)', text) for name, text in texts.items()}
    return {match[1]: name for name, match in found.items() if match}


def modules_imported(tree):
    "(line, module of the package) that a piece of code imports, wherever the statement stands"
    for node in ast.walk(tree):
        if isinstance(node, ast.Import): names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module, *(f'{node.module}.{alias.name}' for alias in node.names)]
        else: continue
        for name in names:
            module = name.removeprefix('spectrum_nb.')
            if module != name and module in notebook_of_module(): yield node.lineno, module


def public_definitions(cell):
    "The public functions and classes that a cell defines at its top; methods that are patched in are none"
    def is_patch(node): return any(re.match(r'patch\b', ast.unparse(d)) for d in node.decorator_list)

    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return [node.name for node in cell.tree.body
            if isinstance(node, kinds) and not node.name.startswith('_') and not is_patch(node)]


def inner_imports(cell):
    "(line, package) of the import statements inside the functions of a cell"
    functions = [n for n in ast.walk(cell.tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))]
    found = set()
    for node in (inner for function in functions for inner in ast.walk(function)):
        if isinstance(node, ast.Import): found |= {(node.lineno, alias.name.split('.')[0]) for alias in node.names}
        elif isinstance(node, ast.ImportFrom): found.add((node.lineno, (node.module or '.').split('.')[0]))
    return sorted(found)


def inline_code(text):
    "What stands in backticks in a text, fenced blocks left out"
    prose = re.sub(r'^```.*?^```', '', text, flags=re.M | re.S)
    return [code for _, code in re.findall(r'(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)', prose)]
