"""Mutants that change nothing, each with the proof: (file, mutation, which of those alike in the file) -> why."""

EQUIVALENT: dict[tuple[str, str, int], str] = {}
