"""How a notebook becomes a page of the site: nbdev's own steps, but for four

Definitions stand in the order of their cell, the fields of a dataclass are shown with their comments, sources are
folded below what they define, and every figure has a text for those who cannot see it."""
import ast
import dataclasses
import json
import re
from functools import cache
from inspect import isclass, signature

from fastcore.docments import _show_param, docments
from nbdev import processors
from nbdev.config import get_config
from nbdev.doclinks import NbdevLookup
from nbdev.process import Processor
from nbdev.showdoc import BasicMarkdownRenderer
from execnb.nbio import mk_cell


@cache
def linked_methods():
    "Methods that a page names in backticks, which nbdev makes links: {'SpectrumConfig.paper', …}"
    texts = (p.read_text(encoding='utf-8') for p in get_config().nbs_path.glob('*.ipynb'))
    return {name for text in texts for name in re.findall(r'`([A-Z]\w+\.[a-z]\w+)(?:\(\))?`', text)}


def methods_of(cell, name):
    "The methods of a class in a cell that some page links to, in their order"
    defined = [node for node in cell.parsed_() if isinstance(node, ast.ClassDef) and node.name == name]
    names = [f'{name}.{f.name}' for node in defined for f in node.body if isinstance(f, ast.FunctionDef)]
    return [method for method in names if method in linked_methods()]


class ShownInOrder(processors.add_show_docs):
    "Documentation after the cell that exports: one entry a definition, in the order of the source"
    def begin(self):
        cells = self.nb.cells
        exports = [cell for cell in cells if processors._want_doc(cell)]
        trees = [tree for cell in cells for tree in cell.parsed_() or ()]
        shown = {processors._get_nm(tree) for tree in processors._show_docs(trees)}
        for cell in exports:
            entries = []
            for name in processors._def_names(cell, shown):
                entries.append(f"show_doc({name}, renderer='pages.WithFields')")
                entries += [f'show_doc({m}, title_level=4)' for m in methods_of(cell, name) if m not in shown]
            new = [mk_cell(entry) for entry in entries]
            for entry in new: entry.has_sd = True
            at = next(i for i, other in enumerate(cells) if other is cell)
            cells[at + 1:at + 1] = new
        self.nb.has_docs_ = shown or exports


class SourceAfterDocumentation(Processor):
    "A shown source stands after the documentation of all that it defines, and is folded"
    def begin(self):
        cells = self.nb.cells
        for cell in [c for c in cells if c.cell_type == 'code' and 'exports' in c.directives_]:
            at = end = next(i for i, other in enumerate(cells) if other is cell)
            while end + 1 < len(cells) and getattr(cells[end + 1], 'has_sd', False): end += 1
            cells[at:end + 1] = [*cells[at + 1:end + 1], cell]
            cell.source = f'#| code-fold: true\n#| code-summary: "Source"\n{cell.source}'


def comments_of(cls):
    "{setting: the comment beside it in the source}, of a class with its own `__init__` or the fields of a dataclass"
    if cls.__init__.__code__.co_filename != '<string>': return docments(cls.__init__, returns=False)
    comments = {}
    for base in reversed(cls.__mro__):      # inherited fields are explained where they are defined
        if dataclasses.is_dataclass(base): comments |= {k: v for k, v in docments(base, returns=False).items() if v}
    return comments


def with_comments(cls):
    "How a dataclass is called: a line for each setting, with the comment that stands beside it in the source"
    comments = comments_of(cls)
    settings = signature(cls).parameters.values()
    if not settings: return f'class {cls.__name__}()'
    lines = []
    for setting in settings:
        text, comment = f'    {_show_param(setting)},'.replace('<factory>', '…'), comments.get(setting.name)
        lines.append(f'{text} # {" ".join(comment.split())}' if comment else text)
    return '\n'.join([f'class {cls.__name__}(', *lines, ')'])


def with_links(cell):
    "Names in backticks become links, in texts and in entries, but not within code"
    def linked(text):
        parts = re.split(r'(^```.*?^```)', text, flags=re.M | re.S)
        # what is a link already stays one: its name must not become a link within it
        parts[::2] = [re.sub(r'\[`([^`\n]+)`\]\(', r'[<code>\1</code>](', part) for part in parts[::2]]
        return lookup.linkify(''.join(parts))

    lookup = NbdevLookup()
    if cell.cell_type == 'markdown': cell.source = linked(cell.source)
    for output in cell.get('outputs', []):
        data = output.get('data', {})
        if 'text/markdown' in data: data['text/markdown'] = linked(''.join(data['text/markdown']))


class WithFields(BasicMarkdownRenderer):
    "nbdev's entry for a definition, in which the fields of a dataclass have their comments"
    def _repr_markdown_(self):
        text = super()._repr_markdown_()
        if not (isclass(self.sym) and dataclasses.is_dataclass(self.sym)): return text
        call = with_comments(self.sym)
        return re.sub(r'```python\n.*?\n```', lambda _: f'```python\n{call}\n```', text, count=1, flags=re.S)


def written(node):
    "A title as it stands in the code: its text, with … for a number that is put in later; None for a variable"
    if isinstance(node, ast.Constant) and isinstance(node.value, str): return node.value
    if isinstance(node, ast.JoinedStr):
        text = ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
        return text if re.sub(r'[\W_]', '', text) else None


def titles_of(code):
    "The titles that a cell gives its figure, of the whole first; one that begins with a value if there is no other"
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == 'title':
            found.append((True, node.lineno, node.col_offset, written(node.value)))
        if not isinstance(node, ast.Call): continue
        called = getattr(node.func, 'attr', getattr(node.func, 'id', ''))
        titles = node.args[:None if called.endswith('_figure') else 1 if called in ('set_title', 'suptitle') else 0]
        titles = [*titles, *(k.value for k in node.keywords if k.arg == 'title')]
        found += [(called != 'suptitle', node.lineno, node.col_offset, written(title)) for title in titles]
    texts = list(dict.fromkeys(' '.join(text.split()) for *_, text in sorted(f for f in found if f[-1])))
    return [text for text in texts if not text.startswith('…')] or texts


def plain(markdown):
    "A text without the marks of Markdown"
    text = re.sub(r'!?\[([^\]]*)\]\([^)]*\)', r'\1', markdown)
    return ' '.join(re.sub(r'[*`#>|$\\]', '', text).split())


class Described(Processor):
    "`fig-alt` for the figures that have none: their titles, or else the words that lead to them"
    def begin(self):
        heading = plain(str(getattr(self.nb, 'frontmatter_', {}).get('title', '')))
        lead = ''
        for cell in self.nb.cells:
            source = cell.get('source') or ''
            if cell.cell_type == 'markdown':
                heads = re.findall(r'^#+ +(.+?)(?: *\{.*\})?$', source, re.M)
                if heads: heading, lead = plain(heads[-1]), ''
                texts = [p for p in re.split(r'\n\s*\n', source) if re.match(r'[\w*`(\[“]', p.strip())]
                if texts: lead = plain(texts[-1])
            drawn = cell.cell_type == 'code' and any('image/png' in o.get('data', {}) for o in cell.get('outputs', []))
            if not drawn or not source or re.search(r'^#\| *fig-alt:', source, re.M): continue
            words = '; '.join(titles_of(source)) or ' '.join([heading + ':'*heading[-1:].isalnum(), lead]).strip(': ')
            cell.source = f'#| fig-alt: {json.dumps(words, ensure_ascii=False)}\n{source}'


class Pages(processors.FilterDefaults):
    "nbdev's steps from a notebook to a page, with those of this file in place of their counterparts"
    def base_procs(self):
        instead = {processors.add_show_docs: ShownInOrder, processors.add_links: with_links,
                   processors.mv_exports: SourceAfterDocumentation}
        steps = [instead.get(step, step) for step in super().base_procs() if step is not processors.add_fold]
        return [*steps, Described]
