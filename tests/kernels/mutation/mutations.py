"""Which lines of the kernels are broken, and how.

Most mutations are found by reading the sources, so that no line is forgotten: every call that stands alone is removed,
every wait leaves one group more in flight, every condition becomes true and false, every comparison is off by one, min,
max and clamp yield each of their arguments. What a scan cannot think of is listed by hand.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from paths import ROOT
from rules.source import Source

CSRC = ROOT / "csrc"
FOLDERS = ("policy", "cuda/tile", "cuda/attention", "cuda/sm*")
# These have exhaustive tests of their own: test_mask.py and test_dropout.py of tests/attention, on every backend, and
# the division among the primitives. What a problem is compiled for is no matter of kernels.
TESTED_ELSEWHERE = {
    f"policy/{name}.h" for name in ("divisor", "dropout", "mask", "paged_kv", "scalars", "score", "seqlen", "variant")
}

# What is computed before a launch: shapes, workspaces, plans, tensor maps. test_backends.py has tests of it.
OF_THE_HOST = {
    *("config.h", "with_smem.h", "launch_plan.h", "tma_strides.h", "tma_tensor.h", "encode_tensor_map.h"),
    *("workspace.h", "place_workspace.h"),
}


@dataclass(frozen=True)
class Mutation:
    """The text of a file between two offsets is replaced."""

    path: str  # from the root of csrc
    line: int
    begin: int
    end: int
    replacement: str
    what: str  # what happens to which text
    synchronises: bool = False  # the race detector may have something to say

    @property
    def name(self) -> str:
        return f"{self.path}:{self.line} {self.what}"

    def apply(self, text: str) -> str:
        return text[: self.begin] + self.replacement + text[self.end :]


def files(csrc: Path = CSRC) -> list[str]:
    """The scanned sources."""
    found = [path for folder in FOLDERS for path in csrc.glob(f"{folder}/*.h") if path.name not in OF_THE_HOST]
    return sorted({path.relative_to(csrc).as_posix() for path in found} - TESTED_ELSEWHERE)


class Scan:
    """One file with comments, strings and preprocessor lines blanked, character by character as long as before."""

    def __init__(self, path: str, csrc: Path = CSRC):
        self.path = path
        self.text = (csrc / path).read_text()
        lines = Source(f"csrc/{path}", self.text).cpp_code
        self.code = "\n".join(" " * len(line) if line.lstrip().startswith("#") else line for line in lines)

    def mutation(self, begin: int, end: int, replacement: str, what: str, synchronises: bool = False) -> Mutation:
        line = self.text.count("\n", 0, begin) + 1
        return Mutation(self.path, line, begin, end, replacement, what, synchronises)

    def closing(self, opening: int) -> int:
        """The place of the bracket that closes the one at `opening`."""
        pairs = {"(": ")", "{": "}", "[": "]"}
        depth, inner, outer = 0, self.code[opening], pairs[self.code[opening]]
        for at in range(opening, len(self.code)):
            depth += (self.code[at] == inner) - (self.code[at] == outer)
            if depth == 0:
                return at
        raise ValueError(f"{self.path}: no {outer} for the {inner} at {opening}")

    def line_at(self, at: int) -> str:
        return self.code[self.code.rfind("\n", 0, at) + 1 : self.code.find("\n", at)]

    def shown(self, begin: int, end: int) -> str:
        """One line of at most 60 characters."""
        text = " ".join(self.text[begin:end].split())
        return f"`{text if len(text) <= 60 else text[:57] + '...'}`".replace("|", "\\|")


SYNCHRONISING = re.compile(
    r"sync_|grid_|cp_async|turn\b|_turn\(|clear_|load_|barrier|fence|wait|release|take|pass\(|commit|acquire|bulk_|init"
)
CALL = re.compile(r"(?<=[;{})\n ])(?:ptx::|this->)?\w[\w.]*(?:<[\w:, ]*>)?\(")
# Words before brackets that are no calls, and calls that only hold a device's compiler back.
NOT_CALLS = re.compile(
    r"(if|for|while|switch|return|constexpr|else|static_assert|sizeof|pin_tile|ptx::pin_registers|ptx::converge)\b"
)


def removed_calls(scan: Scan) -> Iterator[Mutation]:
    """Statements that are nothing but a call."""
    for match in CALL.finditer(scan.code):
        before = scan.code[: match.start()].rstrip()
        if NOT_CALLS.match(match[0]) or not before.endswith((";", "{", "}", ")", "else")):
            continue
        end = scan.closing(match.end() - 1) + 1
        if scan.code[end : end + 1] != ";":
            continue
        synchronises = bool(SYNCHRONISING.search(match[0]))
        yield scan.mutation(match.start(), end, "", f"removed: {scan.shown(match.start(), end)}", synchronises)


def shorter_waits(scan: Scan) -> Iterator[Mutation]:
    for match in re.finditer(r"((?:cp_async|wgmma)_wait|bulk_wait(?:_read)?)<(\d+)>", scan.code):
        replacement = f"{match[1]}<{int(match[2]) + 1}>"
        yield scan.mutation(*match.span(), replacement, f"one group short: `{match[0]}`", True)


def decided_conditions(scan: Scan) -> Iterator[Mutation]:
    """if (x) and x ? a : b with x true and false."""
    for match in re.finditer(r"\bif \(|\bwhile \(", scan.code):
        begin, end = match.end(), scan.closing(match.end() - 1)
        yield from decided(scan, begin, end)
    for match in re.finditer(r" \? ", scan.code):
        if not is_compiled(scan.line_at(match.start())):
            yield from decided(scan, condition_start(scan.code, match.start()), match.start())


def decided(scan: Scan, begin: int, end: int) -> Iterator[Mutation]:
    condition = scan.text[begin:end]
    for value in ("true", "false"):
        what = f"{value}: {scan.shown(begin, end)}"
        synchronises = bool(
            re.search("deterministic|turn|nonfinite|next|found|leader|lane_id|thread|Apart|is_full", condition)
        )
        yield scan.mutation(begin, end, f"(({condition}), {value})", what, synchronises)


STARTS_CONDITION = (" = ", "+= ", "return ", ", ", "{", ";", "(")


def condition_start(code: str, end: int) -> int:
    """Where the condition before a question mark starts."""
    depth = 0
    for at in range(end - 1, 0, -1):
        depth += (code[at] in ")]") - (code[at] in "([")
        found = [start for start in STARTS_CONDITION if code.startswith(start, at)]
        if found and depth == (-1 if found[0] == "(" else 0):
            begin = at + len(found[0])
            return begin + len(code[begin:end]) - len(code[begin:end].lstrip())
    raise ValueError("a question mark without a condition")


def is_compiled(line: str) -> bool:
    """Whether what the line says is known when it is compiled: a mistake there is a mistake in a constant."""
    return "constexpr" in line or "static_assert" in line or "template" in line


OFF_BY_ONE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def shifted_comparisons(scan: Scan) -> Iterator[Mutation]:
    """But for those of loops over registers, whose bounds are known when they are compiled."""
    for match in re.finditer(r"(?<= )(<=?|>=?|==|!=)(?= )", scan.code):
        line = scan.line_at(match.start())
        if is_compiled(line) or (line.lstrip().startswith("for (") and "tiles" not in line):
            continue
        begin, end = max(match.start() - 24, 0), match.end() + 24
        what = f"`{match[0]}` becomes `{OFF_BY_ONE[match[0]]}`: {scan.shown(begin, end)}"
        synchronises = bool(re.search("lane_id|thread|leader", what))
        yield scan.mutation(*match.span(), OFF_BY_ONE[match[0]], what, synchronises)


def taken_arguments(scan: Scan) -> Iterator[Mutation]:
    """min, max and clamp become their arguments."""
    for match in re.finditer(r"\b(min|max|clamp|fmaxf)(<\w+>)?\(", scan.code):
        end = scan.closing(match.end() - 1)
        arguments = split_arguments(scan, match.end(), end)
        for argument in arguments[:2] if match[1] != "clamp" else arguments:
            what = f"`{argument}` instead of {scan.shown(match.start(), end + 1)}"
            yield scan.mutation(match.start(), end + 1, f"({argument})", what)


def split_arguments(scan: Scan, begin: int, end: int) -> list[str]:
    depth, start, arguments = 0, begin, []
    for at in range(begin, end):
        depth += (scan.code[at] in "([{") - (scan.code[at] in ")]}")
        if scan.code[at] == "," and depth == 0:
            arguments.append(scan.text[start:at].strip())
            start = at + 1
    return [*arguments, scan.text[start:end].strip()]


# File, text, what it becomes.
BY_HAND: list[tuple[str, str, str]] = [
    ("cuda/sm80/fwd.h", "ptx::sync_threads_or(", "bool("),
    ("cuda/sm80/fwd.h", "ptx::sync_threads_or(", "(ptx::sync_threads(), "),
    ("cuda/sm80/fwd.h", "mask.is_full_block(rows, {n0, n0 + N})", "true"),
    ("cuda/sm80/fwd.h", "mask.is_full_block(rows, {n0, n0 + N})", "mask.is_full_block(rows, {n0 + 1, n0 + N - 1})"),
    ("cuda/sm80/fwd.h", "int n = tiles.end - 1;", "int n = tiles.end - 2;"),
    ("cuda/sm80/fwd.h", "n >= tiles.begin;", "n > tiles.begin;"),
    ("cuda/sm80/bwd.h", "ptx::sync_threads_or(", "bool("),
    ("cuda/sm80/bwd.h", "ptx::sync_threads_or(", "(ptx::sync_threads(), "),
    ("cuda/sm80/bwd.h", "mask.template is_full_block<true>(rows, {n0, n0 + N})", "true"),
    (
        "cuda/sm80/bwd.h",
        "mask.template is_full_block<true>(rows, {n0, n0 + N})",
        "mask.template is_full_block<true>(rows, {n0 + 1, n0 + N - 1})",
    ),
    (
        "cuda/sm80/bwd.h",
        "n - tiles_of(mask.kv_range(rows), N).begin",
        "n + 1 - tiles_of(mask.kv_range(rows), N).begin",
    ),
    ("cuda/sm80/bwd.h", "n - tiles_of(mask.kv_range(rows), N).begin", "n"),
    ("cuda/sm80/bwd.h", "n - tiles_of(mask.kv_range(rows), N).begin", "0"),
    ("cuda/sm80/bwd.h", "m = tiles.begin;", "m = tiles.begin + 1;"),
    ("cuda/sm90/fwd.h", "at_v_.advance();", ""),
    ("cuda/sm90/fwd.h", "at_k_.advance();", ""),
    ("cuda/sm90/fwd.h", "at_q_.advance();", ""),
    ("cuda/sm90/fwd.h", "values_done(tile, n + 1, cleared", "values_done(tile, n, cleared"),
    ("cuda/sm90/fwd.h", "(consumer + 1) % Config::kConsumers", "consumer"),
    ("cuda/sm90/fwd.h", "sees_keys ? Config::TileQ::kBytes : 0", "Config::TileQ::kBytes"),
    ("cuda/sm90/fwd.h", "out_left_ ^= 1;", ""),
    ("cuda/sm90/tile_queue.h", "num_blocks + (taken", "(taken"),
    ("cuda/sm90/tile_queue.h", "if (lane_id() == 0) pipe().release(at);", "pipe().release(at);"),
    ("cuda/sm90/bwd.h", "Variant::kMasked ? kScanWarps : 0", "0"),
    ("cuda/sm90/bwd_tile.h", "end - 1 - n", "end - n"),
    ("cuda/sm90/bwd_consumer.h", "(times_cleared() - 1) % 2", "0"),
    ("cuda/sm90/bwd.h", "is_first = false;", ""),
    ("cuda/sm90/bwd_columns.h", "wgmma_wait<kPanels>", "wgmma_wait<kPanels + 1>"),
    ("cuda/sm90/fwd_config.h", "pipe_q.init(4)", "pipe_q.init(3)"),
    ("cuda/sm90/fwd_config.h", "init(out_left(), Config::kConsumers)", "init(out_left(), 1)"),
    ("cuda/sm90/fwd_config.h", "queue.init(kWarps)", "queue.init(kWarps - 1)"),
    ("cuda/sm90/fwd_config.h", "pipe_k.init(kWarps)", "pipe_k.init(kWarps - 1)"),
    ("cuda/sm90/fwd_config.h", "pipe_v.init(kWarps)", "pipe_v.init(kWarps - 1)"),
    ("cuda/sm90/fwd_repeats.h", "index < limit", "true"),
    ("cuda/sm90/fwd_repeats.h", "place >= num_places", "place >= num_places - 1"),
    ("cuda/sm90/bwd_config.h", "pipe_q.init(4 * Config::kConsumers + ", "pipe_q.init(4 * Config::kConsumers - 1 + "),
    (
        "cuda/sm90/bwd_config.h",
        "pipe_dout.init(4 * Config::kConsumers + ",
        "pipe_dout.init(4 * Config::kConsumers - 1 + ",
    ),
    ("cuda/tile/pipeline.h", "parity ^= int(wraps);", ""),
    ("cuda/tile/pipeline.h", "at.parity ^ 1", "at.parity"),
    ("cuda/tile/copy_sm90.h", "row0_(kTmaRows - seqlen)", "row0_(kTmaRows - seqlen - 1)"),
    ("cuda/tile/copy_sm90.h", "(first_row + seqlen) * t.row_steps", "first_row * t.row_steps"),
    ("cuda/tile/gemm_sm90.h", "true);", "i > 0);"),
    ("cuda/tile/gemm_sm90.h", "kAdd || i > 0", "i > 0"),
    ("cuda/tile/gemm_sm90.h", "kAdd || i > 0", "true"),
    ("policy/tile_order.h", "p.seqlens.total_q / block_m + p.batch_size + 1", "p.seqlens.total_q / block_m + 1"),
    ("policy/tile_order.h", "return first_row_q / block_m + batch;", "return first_row_q / block_m;"),
]


def listed(csrc: Path) -> Iterator[Mutation]:
    for path, text, replacement in BY_HAND:
        scan = Scan(path, csrc)
        places = [match.start() for match in re.finditer(re.escape(text), scan.text)]
        if not places:
            raise ValueError(f"{path} has no {text!r}")
        for begin in places:
            end = begin + len(text)
            what = f"{scan.shown(begin, end)} becomes `{replacement}`".replace("\n", " ")
            synchronises = bool(re.search("sync|turn|ping_pong|init|parity|advance|scan|Apart|wait|cleared", text))
            yield scan.mutation(begin, end, replacement, what, synchronises)


def all_mutations(csrc: Path = CSRC) -> list[Mutation]:
    found: dict[tuple, Mutation] = {}
    kinds = (removed_calls, shorter_waits, decided_conditions, shifted_comparisons, taken_arguments)
    for path in files(csrc):
        scan = Scan(path, csrc)
        for kind in kinds:
            for mutation in kind(scan):
                found.setdefault((path, mutation.begin, mutation.end, mutation.replacement), mutation)
    for mutation in listed(csrc):
        found.setdefault((mutation.path, mutation.begin, mutation.end, mutation.replacement), mutation)
    return sorted(found.values(), key=lambda m: (m.path, m.begin))
