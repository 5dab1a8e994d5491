"""Source files and rules as data structures."""

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

CPP = (".h", ".inl", ".cpp", ".cu", ".cuh")
PYTHON = (".py",)
CODE = CPP + PYTHON

Findings = Iterator[tuple[int, str]]  # (line number, text found)


@dataclass(frozen=True)
class Source:
    """One file: its path relative to the repository, and its text."""

    path: str
    text: str

    @cached_property
    def lines(self) -> list[str]:
        return self.text.splitlines()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def cpp_code(self) -> list[str]:
        """The lines with comments and string contents blanked, except the names of included files."""
        blanked = CPP_NOT_CODE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), self.text)
        return [
            line if is_include(line) else blank for line, blank in zip(self.lines, blanked.splitlines(), strict=True)
        ]

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        """(line number, text without comment markers) for every line of every comment."""
        if self.path.endswith(PYTHON):
            tokens = tokenize.generate_tokens(io.StringIO(self.text).readline)
            return [(t.start[0], t.string.lstrip("#").strip()) for t in tokens if t.type == tokenize.COMMENT]
        found = []
        for match in CPP_NOT_CODE.finditer(self.text):
            if match[0].startswith("/"):
                first = self.text.count("\n", 0, match.start()) + 1
                found += [(first + i, line.strip(" \t/*")) for i, line in enumerate(match[0].splitlines())]
        return found


CPP_NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)


def is_include(line: str) -> bool:
    return line.lstrip().startswith("#") and "include" in line


@dataclass(frozen=True)
class Rule:
    """What is forbidden, where it is checked, and an example file that breaks the rule."""

    name: str
    find: Callable[[Source], Findings]
    bad: Source
    suffixes: tuple[str, ...] = CPP
    within: tuple[str, ...] = ("",)  # path prefixes
    outside: tuple[str, ...] = ()

    def covers(self, source: Source) -> bool:
        return (
            source.path.endswith(self.suffixes)
            and source.path.startswith(self.within)
            and not (self.outside and source.path.startswith(self.outside))
        )

    def violations(self, source: Source) -> list[str]:
        if not self.covers(source):
            return []
        return [f"{source.path}:{line}: {self.name}: {what}" for line, what in self.find(source)]


def pattern(expression: str) -> Callable[[Source], Findings]:
    """Finds a regular expression in C++ code, outside comments and strings."""
    compiled = re.compile(expression)

    def find(source: Source) -> Findings:
        for number, line in enumerate(source.cpp_code, 1):
            for match in compiled.finditer(line):
                yield number, match[0].strip()

    return find
