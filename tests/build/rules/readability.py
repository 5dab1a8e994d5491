"""Rules for readable files and for a usable package."""

import ast
import re

from .source import PYTHON, Findings, Source

MAX_COLUMNS, MAX_FILE_LINES, MAX_FUNCTION_LINES = 120, 400, 60

CPP_STATEMENT = re.compile(
    r"(\w[\w:<>*&,.\[\]() ]*[-+*/|&]?= .*|[\w:.>-]+(<.*>)?\(.*\)|return\b.*|break|continue|using .*);$"
    r"|(if|for|while|switch|else|do|struct|class|void|template)\b.*[{}]$|\}$"
    r"|#\s*(include|define|undef|if|ifdef|ifndef|endif|else|pragma)\b"
)
PYTHON_HEADER = re.compile(r"(if|for|while|with|def|class|elif|except)\b.*:$|(else|try|finally):$")


def commented_out_code(source: Source) -> Findings:
    is_code = is_python_code if source.path.endswith(PYTHON) else CPP_STATEMENT.match
    for number, comment in source.comments:
        if is_code(comment):
            yield number, comment


def is_python_code(comment: str) -> bool:
    if PYTHON_HEADER.match(comment):
        return True
    try:
        body = ast.parse(comment).body
    except (SyntaxError, ValueError):
        return False
    statements = (ast.Assign, ast.AugAssign, ast.Import, ast.ImportFrom, ast.Return, ast.Raise, ast.Assert, ast.Delete)
    return any(isinstance(node, statements) or is_bare_call(node) for node in body)


def is_bare_call(node: ast.stmt) -> bool:
    """A call of print or of a method: `rowsum(dout * out)` is a formula, `out.backward(dout)` is code."""
    if not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
        return False
    function = node.value.func
    return isinstance(function, ast.Attribute) or (isinstance(function, ast.Name) and function.id == "print")


UNFINISHED = re.compile(r"\b(TO[D]O|FIX[M]E|XX[X])\b")


def unfinished(source: Source) -> Findings:
    for number, line in enumerate(source.lines, 1):
        if match := UNFINISHED.search(line):
            yield number, match[0]


def long_lines(source: Source) -> Findings:
    for number, line in enumerate(source.lines, 1):
        if len(line) > MAX_COLUMNS:
            yield number, f"{len(line)} columns"


def long_file(source: Source) -> Findings:
    if len(source.lines) > MAX_FILE_LINES:
        yield MAX_FILE_LINES + 1, f"{len(source.lines)} lines"


def long_functions(source: Source) -> Findings:
    """The docstring is not counted."""
    for node in ast.walk(source.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) is not None else None
            length = node.end_lineno - node.lineno + 1
            length -= docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            if length > MAX_FUNCTION_LINES:
                yield node.lineno, f"{node.name} has {length} lines"


def assert_statements(source: Source) -> Findings:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Assert):
            yield node.lineno, "python -O removes it: raise ValueError, TypeError or RuntimeError"


def not_implemented(source: Source) -> Findings:
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield node.lineno, node.id
