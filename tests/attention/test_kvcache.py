"""Attention with a KV cache against the float64 reference: results, appended rows, and all that must stay as it is."""

import pytest

from cases import sampled
from device import on_device
from kvcache import check_kvcache, kv_for_device
from kvcache_cases import SELECTED, sink_cases, table, upstream_table

SAMPLE = 80  # cases of each long table, without --whole

TABLE, UPSTREAM_TABLE = kv_for_device(table()), kv_for_device(upstream_table())


def pytest_generate_tests(metafunc):
    if "sampled_case" in metafunc.fixturenames:
        chosen = [case for cases in (TABLE, UPSTREAM_TABLE) for case in sampled(cases, SAMPLE, metafunc.config)]
        metafunc.parametrize("sampled_case", chosen, ids=lambda case: case.name)


@on_device
def test_tables(sampled_case):
    check_kvcache(sampled_case)


@on_device
@pytest.mark.parametrize("case", kv_for_device([*SELECTED, *sink_cases()]), ids=lambda case: case.name)
def test_selected(case):
    check_kvcache(case)
