"""What compiling is said to cost, and when that has grown, with a compiler that takes what time it is told."""

import itertools
import json
from pathlib import Path

import pytest

from build_tools import compile_costs, cuda_objects
from build_tools.cuda_objects import Object

HOME = Path("no toolkit")


@pytest.mark.parametrize("count", [10, 11, 31, 50])
def test_calibration_meets_the_conditions_of_the_kernels(count):
    wanted, between = objects(count), compile_costs.calibrations(count)
    compiled = compile_costs.interleaved(wanted, between)
    assert [each for each in compiled if each not in between] == wanted
    assert len({each.name for each in between}) == 10
    places = [compiled.index(each) for each in between]
    assert places[0] == 0
    assert all(b - a <= -(-count // 10) + 1 for a, b in itertools.pairwise(places))


def test_few_objects_are_compiled_with_as_few_calibrations():
    assert len(compile_costs.calibrations(2)) == 2


def objects(count):
    return [Object(Path(f"{i}.cu"), ("sm_80",), "bf16", 64) for i in range(count)]


@pytest.fixture
def compiler(monkeypatch):
    """Set its seconds: what compiling an object takes. Like ninja, it leaves alone what is up to date."""

    class Compiler:
        seconds = staticmethod(lambda built: 1.0)

        def build(self, home, wanted, folder):
            assert home is HOME
            for each in wanted:
                if not each.path(folder).exists():
                    each.path(folder).write_bytes(bytes(100))
                    log = {"cpu_seconds": self.seconds(each), "peak_bytes": 7, "output": ""}
                    each.log(folder).write_text(json.dumps(log))

    compiler = Compiler()
    monkeypatch.setattr(cuda_objects, "build", compiler.build)
    return compiler


def is_calibration(built):
    return built.source == compile_costs.CALIBRATION


def test_costs(compiler, tmp_path):
    compiler.seconds = lambda built: 2.0 if is_calibration(built) else 3.0
    assert compile_costs.compile_all(HOME, objects(20), tmp_path).costs() == {
        "object_bytes": 2000, "peak_bytes": 7, "cpu_seconds": 60.0, "calibration_cpu_seconds": 2.0,
        "relative_time": 30.0,
    }  # fmt: skip


def test_a_slow_spell_changes_little(compiler, tmp_path):
    """Half of what is compiled, kernels and calibrations, takes twice as long."""
    order = itertools.count()
    compiler.seconds = lambda built: (1.0 if is_calibration(built) else 3.0) * (1 + (next(order) >= 27))
    costs = compile_costs.compile_all(HOME, objects(50), tmp_path).costs()
    assert costs["cpu_seconds"] > 220
    assert costs["relative_time"] == pytest.approx(150, rel=0.05)


def test_the_lesser_time_counts(compiler, tmp_path):
    """A busy machine may slow the kernels alone, or calibration.cu alone, in either of two runs."""
    compiler.seconds = lambda built: 1.0 if is_calibration(built) else 5.0
    before = compile_costs.compile_all(HOME, objects(20), tmp_path)
    assert before.costs()["relative_time"] == 100
    assert compile_costs.compile_all(HOME, objects(20), tmp_path) == before
    compiler.seconds = lambda built: 4.0 if is_calibration(built) else 3.0
    again = compile_costs.compile_again(HOME, before)
    assert again.costs()["relative_time"] == 60
    assert again.objects == before.objects


COSTS = {"kernels": 100, "object_bytes": 1000, "peak_bytes": 2000, "cpu_seconds": 10.0, "relative_time": 50.0}


@pytest.mark.parametrize("key", COSTS)
def test_growth(key):
    allowed, grown = {**COSTS, key: 1.25 * COSTS[key]}, {**COSTS, key: 1.3 * COSTS[key]}
    assert compile_costs.growth(allowed, COSTS) == []
    expected = [] if key == "cpu_seconds" else [f"{key} has grown from {COSTS[key]} to {grown[key]}"]
    assert [sentence.split(";")[0] for sentence in compile_costs.growth(grown, COSTS)] == expected
    assert compile_costs.growth(grown, COSTS, ["cpu_seconds"]) == (
        [f"{key} has grown from 10.0 to 13.0; if that has to be, run make report and commit it"]
        if key == "cpu_seconds"
        else []
    )
