"""Finds what can be mutated in the kernels' sources.

Reading the sources forgets no line: every statement that is only a call is removed, every wait leaves one group more in
flight, every condition is true and false, every comparison is off by one, min, max and clamp yield each of their
arguments. Mutations that no scan can think of are listed by hand.
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from paths import ROOT

CSRC = ROOT / "csrc"
FOLDERS = ("policy", "cuda/tile", "cuda/attention", "cuda/sm*")
# tests/attention has exhaustive tests of masks and dropout on every backend, simulator/primitives of divisions.
TESTED_ELSEWHERE = {
    f"policy/{name}.h"
    for name in ("divisor", "dropout", "mask", "paged_kv", "range_mask", "scalars", "score", "seqlen", "variant")
}
# Computed on the host, before a launch: test_backends.py has tests of it.
OF_THE_HOST = {"config.h", "with_smem.h", "launch_plan.h", "tma_strides.h", "tma_tensor.h", "encode_tensor_map.h"}
OF_THE_HOST |= {"workspace.h", "place_workspace.h"}
# A mutant of such a line may be a data race.
SYNCHRONISES = re.compile(
    r"sync|grid_|cp_async|bulk_|barrier|fence|wait|init|load_|clear|take|commit|acquire|release|pass\(|(?<!re)turn"
    r"|parity|advance|ping_pong|scan|deterministic|nonfinite|next|found|leader|lane_id|thread|Apart|is_full"
)


@dataclass(frozen=True)
class Mutation:
    """The text of a file between two offsets is replaced."""

    path: str  # from the root of csrc
    begin: int
    end: int
    replacement: str
    what: str  # what happens to which text
    synchronises: bool  # ThreadSanitizer may have something to report
    which: int = 0  # of the mutations of this file that say the same

    @property
    def label(self) -> str:
        """Its name within the file. It has no line number, so it survives edits elsewhere."""
        return f"{self.what} [{self.which}]" if self.which else self.what

    @property
    def name(self) -> str:
        return f"{self.path}: {self.label}"

    def apply(self, text: str) -> str:
        return text[: self.begin] + self.replacement + text[self.end :]


def files(csrc: Path = CSRC) -> list[str]:
    """The scanned sources."""
    found = [path for folder in FOLDERS for path in csrc.glob(f"{folder}/*.h") if path.name not in OF_THE_HOST]
    return sorted({path.relative_to(csrc).as_posix() for path in found} - TESTED_ELSEWHERE)


NOT_CODE = re.compile(r'//[^\n]*|"(?:\\.|[^"\\\n])*"|^[ \t]*#[^\n]*', re.MULTILINE)
CLOSING = {"(": ")", "{": "}", "[": "]"}


class Scan:
    """One file: its text, and its code, which is as long but has blanks for comments, strings and directives."""

    def __init__(self, path: str, csrc: Path = CSRC):
        self.path = path
        self.text = (csrc / path).read_text()
        self.code = NOT_CODE.sub(lambda match: " " * len(match[0]), self.text)

    def mutation(self, begin: int, end: int, replacement: str, what: str) -> Mutation:
        synchronises = bool(SYNCHRONISES.search(what + self.text[begin:end]))
        return Mutation(self.path, begin, end, replacement, what, synchronises)

    def closing(self, opening: int) -> int:
        """The place of the bracket that closes the one at `opening`."""
        depth, inner, outer = 0, self.code[opening], CLOSING[self.code[opening]]
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
        return f"`{text if len(text) <= 60 else text[:57] + '...'}`"


CALL = re.compile(r"(?<=[;{})\n ])(?:ptx::|this->)?\w[\w.]*(?:<[\w:, ]*>)?\(")
# Words before brackets that are not calls, and calls that only restrain nvcc.
NOT_CALLS = re.compile(
    r"(if|for|while|switch|return|constexpr|else|static_assert|sizeof|pin_tile|ptx::pin_registers|ptx::converge)\b"
)


def removed_calls(scan: Scan) -> Iterator[Mutation]:
    """Statements that are only a call."""
    for match in CALL.finditer(scan.code):
        end = scan.closing(match.end() - 1) + 1
        starts_a_statement = scan.code[: match.start()].rstrip().endswith((";", "{", "}", ")", "else"))
        if starts_a_statement and not NOT_CALLS.match(match[0]) and scan.code[end : end + 1] == ";":
            yield scan.mutation(match.start(), end, "", f"removed: {scan.shown(match.start(), end)}")


def shorter_waits(scan: Scan) -> Iterator[Mutation]:
    for match in re.finditer(r"((?:cp_async|wgmma)_wait|bulk_wait(?:_read)?)<(\d+)>", scan.code):
        yield scan.mutation(*match.span(), f"{match[1]}<{int(match[2]) + 1}>", f"one group short: `{match[0]}`")


def decided_conditions(scan: Scan) -> Iterator[Mutation]:
    """if (x), while (x) and x ? a : b with x true and false."""
    spans = [(m.end(), scan.closing(m.end() - 1)) for m in re.finditer(r"\bif \(|\bwhile \(", scan.code)]
    for match in re.finditer(r" \? ", scan.code):
        if not is_compile_time(scan.line_at(match.start())):
            spans.append((condition_start(scan.code, match.start()), match.start()))
    for begin, end in spans:
        for value in ("true", "false"):
            replacement = f"(({scan.text[begin:end]}), {value})"
            yield scan.mutation(begin, end, replacement, f"{value}: {scan.shown(begin, end)}")


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


def is_compile_time(line: str) -> bool:
    """A mistake there is a mistake in a constant."""
    return "constexpr" in line or "static_assert" in line or "template" in line


OFF_BY_ONE = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}


def shifted_comparisons(scan: Scan) -> Iterator[Mutation]:
    """But for those of loops over registers, whose bounds are compile-time constants."""
    for match in re.finditer(r"(?<= )(<=?|>=?|==|!=)(?= )", scan.code):
        line = scan.line_at(match.start())
        if is_compile_time(line) or (line.lstrip().startswith("for (") and "tiles" not in line):
            continue
        context = scan.shown(max(match.start() - 24, 0), match.end() + 24)
        what = f"`{match[0]}` becomes `{OFF_BY_ONE[match[0]]}`: {context}"
        yield scan.mutation(*match.span(), OFF_BY_ONE[match[0]], what)


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


# By file: text => what it becomes.
BY_HAND = {
    "cuda/sm80/fwd.h": """
        ptx::sync_threads_or( => bool(
        ptx::sync_threads_or( => (ptx::sync_threads(),
        fresh_mask(mask, p, batch, head).is_full_block(rows, {n0, n0 + N}) => true
        is_full_block(rows, {n0, n0 + N}) => is_full_block(rows, {n0 + 1, n0 + N - 1})
        int n = tiles.end - 1; => int n = tiles.end - 2;
        n >= tiles.begin; => n > tiles.begin;
    """,
    "cuda/sm80/bwd.h": """
        ptx::sync_threads_or( => bool(
        ptx::sync_threads_or( => (ptx::sync_threads(),
        fresh_mask(mask, p, batch, head).template is_full_block<true>(rows, {n0, n0 + N}) => true
        is_full_block<true>(rows, {n0, n0 + N}) => is_full_block<true>(rows, {n0 + 1, n0 + N - 1})
        n - fresh_mask(mask, p, batch, head) => n + 1 - fresh_mask(mask, p, batch, head)
        n - fresh_mask(mask, p, batch, head).kv_tiles(rows, N).begin => n
        n - fresh_mask(mask, p, batch, head).kv_tiles(rows, N).begin => 0
        m = tiles.begin; => m = tiles.begin + 1;
    """,
    "cuda/sm90/fwd.h": """
        at_v_.advance(); =>
        at_k_.advance(); =>
        at_q_.advance(); =>
        clear_values(tile, n); => clear_values(tile, n + 1);
        add_nonfinite_values(tile, n); => add_nonfinite_values(tile, n + 1);
        (consumer + 1) % Config::kConsumers => consumer
        sees_keys ? Config::TileQ::kBytes : 0 => Config::TileQ::kBytes
        out_left_ ^= 1; =>
    """,
    "cuda/attention/max_logits.h": """
        mask = 4; => mask = 8;
        mask < kWarpThreads; => mask < kWarpThreads / 2;
    """,
    "cuda/attention/range_blocks.h": """
        lane = 1; => lane = 2;
        lane < kWarpThreads; => lane < kWarpThreads / 2;
        row += kWarpThreads) => row += 2 * kWarpThreads)
        row += kWarpThreads * kRangeTile) => row += 2 * kWarpThreads * kRangeTile)
        end = row + kRangeTile; => end = row + kRangeBlock;
        {row, row + kRangeTile} => {row, row + kRangeBlock}
    """,
    "cuda/sm90/tile_queue.h": """
        num_blocks + (taken => (taken
        if (lane_id() == 0) pipe().release(at); => pipe().release(at);
    """,
    "cuda/sm90/bwd.h": """
        Variant::kMasked ? kScanWarps : 0 => 0
        is_first = false; =>
    """,
    "cuda/sm90/bwd_tile.h": """
        end - 1 - n => end - n
    """,
    "cuda/sm90/bwd_consumer.h": """
        (times_cleared() - 1) % 2 => 0
    """,
    "cuda/sm90/bwd_columns.h": """
        wgmma_wait<kPanels> => wgmma_wait<kPanels + 1>
    """,
    "cuda/sm90/fwd_config.h": """
        pipe_q.init(4) => pipe_q.init(3)
        init(out_left(), Config::kConsumers) => init(out_left(), 1)
        queue.init(kWarps) => queue.init(kWarps - 1)
        pipe_k.init(kWarps) => pipe_k.init(kWarps - 1)
        pipe_v.init(kWarps) => pipe_v.init(kWarps - 1)
    """,
    "cuda/sm90/fwd_repeats.h": """
        index < limit => true
        place >= num_places => place >= num_places - 1
    """,
    "cuda/sm90/bwd_config.h": """
        pipe_q.init(4 * Config::kConsumers + => pipe_q.init(4 * Config::kConsumers - 1 +
        pipe_dout.init(4 * Config::kConsumers + => pipe_dout.init(4 * Config::kConsumers - 1 +
    """,
    "cuda/tile/pipeline.h": """
        parity ^= int(wraps); =>
        at.parity ^ 1 => at.parity
    """,
    "cuda/tile/copy_sm90.h": """
        row0_(kTmaRows - seqlen) => row0_(kTmaRows - seqlen - 1)
        (first_row + seqlen) * t.row_steps => first_row * t.row_steps
    """,
    "cuda/tile/gemm_sm90.h": """
        true); => i > 0);
        kAdd || i > 0 => i > 0
        kAdd || i > 0 => true
    """,
    "policy/tile_order.h": """
        p.seqlens.total_q / block_m + p.batch_size + 1 => p.seqlens.total_q / block_m + 1
        return first_row_q / block_m + batch; => return first_row_q / block_m;
    """,
}


def listed(scan: Scan) -> Iterator[Mutation]:
    for line in BY_HAND.get(scan.path, "").strip().splitlines():
        text, replacement = (part.strip() for part in line.split("=>"))
        if text not in scan.text:
            raise ValueError(f"{scan.path} has no {text!r}")
        for match in re.finditer(re.escape(text), scan.text):
            yield scan.mutation(*match.span(), replacement, f"{scan.shown(*match.span())} becomes `{replacement}`")


KINDS = (removed_calls, shorter_waits, decided_conditions, shifted_comparisons, taken_arguments, listed)


def all_mutations(csrc: Path = CSRC) -> list[Mutation]:
    """In the order of the sources."""
    found: dict[tuple, Mutation] = {}
    for scan in (Scan(path, csrc) for path in files(csrc)):
        for mutation in (m for kind in KINDS for m in kind(scan)):
            found.setdefault((scan.path, mutation.begin, mutation.end, mutation.replacement), mutation)
    alike: Counter = Counter()
    mutations = []
    for mutation in sorted(found.values(), key=lambda m: (m.path, m.begin)):
        mutations.append(replace(mutation, which=alike[mutation.path, mutation.what]))
        alike[mutation.path, mutation.what] += 1
    return mutations
