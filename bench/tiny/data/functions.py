"""Functions of Python files: where they stand, their parts, the names in them. Found by Python's own parser."""

from __future__ import annotations

import ast
import builtins
import keyword
import re
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from softprune.bench.tiny.data.documents import Document


@dataclass(frozen=True)
class Function:
    """A function or method of 5 to 40 lines, dedented.

    Attributes:
        owner: the class that it is a method of; "" for a function of the module.
        signature: decorators and the lines up to the colon.
        docstring: its lines as they stand in the file, indented; "" without one.
        body: the lines after the docstring.
    """

    document: Document
    owner: str
    name: str
    signature: str
    docstring: str
    body: str

    @property
    def code(self) -> str:
        """The whole function."""
        return "\n".join(part for part in (self.signature, self.docstring, self.body) if part)

    @property
    def bare(self) -> str:
        """The function without its docstring."""
        return f"{self.signature}\n{self.body}"

    @cached_property
    def tree(self) -> ast.FunctionDef | ast.AsyncFunctionDef:
        """The parsed function."""
        node = ast.parse(self.code).body[0]
        assert isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        return node

    @property
    def summary(self) -> str:
        """First paragraph of the docstring on one line; "" without one."""
        text = ast.get_docstring(self.tree) or ""
        return re.sub(r"\s+", " ", text.strip().split("\n\n")[0])

    @property
    def parameters(self) -> list[str]:
        """Names of the parameters but self and cls."""
        arguments = self.tree.args
        every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
        return [argument.arg for argument in every if argument.arg not in ("self", "cls")]

    @property
    def locals(self) -> list[str]:
        """Names that the function binds, parameters among them, that can be renamed by a word-wise replacement."""
        bound = [node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        names = dict.fromkeys([*self.parameters, *bound])
        attributes = {node.attr for node in ast.walk(self.tree) if isinstance(node, ast.Attribute)}
        keywords = {node.arg for node in ast.walk(self.tree) if isinstance(node, ast.keyword)}
        return [name for name in names if name not in attributes | keywords and not hasattr(builtins, name) and len(name) > 1]

    @property
    def calls(self) -> list[str]:
        """What it calls, as written, in order of appearance."""
        found = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        found.sort(key=lambda node: (node.lineno, node.col_offset))
        return list(dict.fromkeys(text for text in (ast.unparse(node.func) for node in found) if re.fullmatch(r"[\w.]{1,40}", text)))


def is_free(name: str, code: str) -> bool:
    """Whether a name can be introduced into the code."""
    return not keyword.iskeyword(name) and not re.search(rf"\b{name}\b", code)


def functions(document: Document) -> Iterator[Function]:
    """The functions and methods of a Python file, none for a file that Python cannot parse."""
    text = document.paragraphs[0].replace("\r\n", "\n")
    if "\t" in text or "<|" in text:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    lines = text.split("\n")
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _function(document, "", node, lines)
        elif isinstance(node, ast.ClassDef):
            for member in node.body:
                if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                    yield from _function(document, node.name, member, lines)


def _function(document: Document, owner: str, node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> Iterator[Function]:
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    last = node.end_lineno or first
    if not 5 <= last - first <= 40 or node.body[0].lineno == node.lineno:
        return
    documented = ast.get_docstring(node) is not None
    body_start = node.body[1].lineno - 1 if documented and len(node.body) > 1 else node.body[0].lineno - 1
    if documented and len(node.body) == 1:
        return
    # A body's first statement may be decorated or follow a comment; both belong to the body.
    signature_end = node.body[0].lineno - 1
    docstring_end = (node.body[0].end_lineno or signature_end) if documented else signature_end
    pieces = [lines[first:signature_end], lines[signature_end:docstring_end], lines[docstring_end:last]]
    indent = len(lines[first]) - len(lines[first].lstrip())
    texts = ["\n".join(line[indent:] if not line[:indent].strip() else line for line in piece).strip("\n") for piece in pieces]
    whole = "\n".join(text for text in texts if text)
    if (
        body_start < signature_end
        or len(whole) > 1400
        or any(len(line) > 110 for line in whole.split("\n"))
        or textwrap.dedent(whole) != whole
    ):
        return
    try:
        parsed = ast.parse(whole).body
    except SyntaxError:
        return
    if len(parsed) == 1 and isinstance(parsed[0], ast.FunctionDef | ast.AsyncFunctionDef):
        yield Function(document, owner, node.name, *texts)
