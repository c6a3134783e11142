"""Tests past failures and random inputs; ``pytest -m slow tests/fuzz`` runs more random inputs."""

import pytest
from hypothesis import strategies as st

from tests.ops.strategies import MANY, for_all

from . import CORPUS, TARGETS, checker

CASES = sorted(CORPUS.glob("*/*"))

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.parent.name}-{case.name}")
def test_case_of_the_corpus(case):
    checker(case.parent.name)(case.read_bytes())


@pytest.mark.parametrize("target", TARGETS)
@MANY
def test_random_input(target, cases):
    for_all(st.binary(max_size=300), cases, checker(target))


def test_every_target_has_a_corpus():
    assert {case.parent.name for case in CASES} == set(TARGETS)
