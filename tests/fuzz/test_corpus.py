"""Cases that were found once, and random ones, are met with a result or an error that says why.

``pytest -m slow tests/fuzz`` takes more random ones, ``python -m tests.fuzz TARGET`` goes on for as
long as it is let.
"""

import pickle

import pytest
from hypothesis import strategies as st

from fcos_d2 import InputError
from fcos_d2.checkpoint.reading import load_safely
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


# ---- What takes more bytes than a corpus should hold ----


def test_tuples_in_tuples_whose_hash_would_crash_python_are_refused(tmp_path):
    """The hash of a tuple is a recursion in C; as the key of a dict it ends the process."""
    path = tmp_path / "tuples.pkl"
    path.write_bytes(b"\x80\x02}N" + pickle.TUPLE1 * 1_000_000 + b"Ns.")
    with pytest.raises(InputError, match="a key of a dict is a tuple"):
        load_safely(str(path))
