"""Measurements that several processes share are those of one process."""

from functools import cache

import pytest

from cases import shared
from cases.group import run

WORLDS = (2, 3, 4)


def _values(answers):
    assert all(answer is not None and not answer.error for answer in answers), answers
    return [answer.value for answer in answers]


@cache
def _single(ordered, dtype):
    """In a process of its own, so that threads are as in the others."""
    return _values(run(1, shared.equality, ordered, dtype))[0]


def _off(one, other):
    """Largest difference, relative to the largest number of each list."""
    assert one.keys() == other.keys()
    worst = 0.0
    for name, expected in one.items():
        size = max(map(abs, expected))
        worst = max(worst, max(abs(a - b) for a, b in zip(expected, other[name], strict=True)) / size)
    return worst


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.slow) for world in (3, 4))])
def test_any_number_of_processes_gives_the_same_numbers(world):
    """Ragged batches, fewer batches than processes, ignored targets, and batches that the library cuts."""
    sums, measured, texts = _single(False, "float64")
    everyone = _values(run(world, shared.equality, False))
    assert all(own == everyone[0] for own in everyone), "every rank returns the same, costs included"
    worst = max(_off(sums, everyone[0][0]), _off(measured, everyone[0][1]))
    print(f"{world} processes: largest relative difference {worst:.1e}")
    assert worst <= 1e-12
    assert len(texts) == len(everyone[0][2])


@pytest.mark.parametrize(
    ("world", "dtype"),
    [(2, "float32")]
    + [pytest.param(world, "float64", marks=pytest.mark.slow) for world in (2, 3, 4)]
    + [pytest.param(world, "float32", marks=pytest.mark.slow) for world in (3, 4)],
)
def test_sums_in_order_are_the_same_bits(world, dtype):
    """Floats compare as they are."""
    sums, measured, _ = _single(True, dtype)
    everyone = _values(run(world, shared.equality, True, dtype))
    for own in everyone:
        assert own[0] == sums
        assert own[1] == measured


def test_a_sample_is_the_same_for_any_number_of_processes():
    alone = _values(run(1, shared.sampled))[0]
    everyone = _values(run(2, shared.sampled))
    assert everyone[0] == everyone[1]
    assert everyone[0][:3] == pytest.approx(alone[:3], rel=1e-9)
    assert everyone[0][3] == alone[3]


REFUSED = {
    "weights": ("RanksDiffer", "rank 1 differs from rank 0 in '2.bias'"),
    "network": ("RanksDiffer", "modules"),
    "frozen": ("RanksDiffer", "names of parameters"),
    "mode": ("UnsupportedModel", "rank 1: "),
    "nan": ("NonFinite", "rank 1: parameter '0.weight' holds 1 NaN"),
    "constant": ("RanksDiffer", "loss of the first batch"),
    "data": ("RanksDiffer", "rank 1 differs from rank 0 in data"),
    "shard": ("RanksDiffer", "DistributedSampler"),
    "missing batch": ("RanksDiffer", "number of batches (3 on rank 1, 4 on rank 0)"),
    "swinging": ("NondeterministicRisk", "rank 1: "),
    "seed": ("RanksDiffer", "seed (1 on rank 1, 0 on rank 0)"),
    "tolerance": ("RanksDiffer", "rtol (0.0001 on rank 1, 0.001 on rank 0)"),
    "precision": ("RanksDiffer", "precision"),
    "argument": ("UnknownName", "no_such_measure"),
    "seconds": ("UsageError", "limit the number of products"),
    "failure": ("UserCodeError", "raised RuntimeError: no room on this device"),
}


def test_what_differs_is_refused_on_all_ranks_in_the_same_words():
    """And the group can go on measuring."""
    everyone = _values(run(3, shared.refusals))
    for name, (kind, words) in REFUSED.items():
        answers = [own[name] for own in everyone]
        assert {answer.error for answer in answers} == {kind}, (name, answers)
        own = {answer.message for answer in answers}
        if name == "failure":  # the rank itself raises what it has met
            assert "no room on this device" in answers[1].message
        assert len(own) == 1, (name, own)
        assert words in own.pop(), name
    last = [own["after all that"] for own in everyone]
    assert last[0].value > 0
    assert all(answer == last[0] for answer in last)


@pytest.mark.parametrize("memory", [None, pytest.param(5_000, marks=pytest.mark.slow)])
def test_what_happens_to_one_rank_happens_to_all(memory):
    """An error, or memory that runs out, at any time: the same end on all ranks, and a right number if there is one."""
    everyone = _values(run(2, shared.accidents, memory))
    assert everyone[0] == everyone[1]
    values = [value for error, _, value in everyone[0] if not error]
    print(f"{len(values)} of {len(everyone[0])} accidents survived")
    assert values
    assert max(values) - min(values) <= 1e-12 * max(values)
    errors = {error for error, _, _ in everyone[0] if error}
    assert errors <= {"RuntimeError", "RanksDiffer", "UnsupportedModel", "UserCodeError"}, everyone[0]


def test_vectors_that_drift_apart_are_refused():
    answers = run(2, shared.drifting)
    assert {answer.error for answer in answers} == {"RanksDiffer"}
    assert "vectors" in answers[0].message


TIMEOUT = 4.0


@pytest.mark.parametrize(
    ("work", "arguments"),
    [
        (shared.lost, ("ends",)),
        (shared.lost, ("hangs",)),
        pytest.param(shared.lost, ("ends", True), marks=pytest.mark.slow),
        pytest.param(shared.lost, ("hangs", True), marks=pytest.mark.slow),
        pytest.param(shared.lost_before, ("ends",), marks=pytest.mark.slow),
        pytest.param(shared.lost_before, ("hangs",), marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_ends_the_others(work, arguments):
    answers = run(3, work, *arguments, timeout=TIMEOUT, deadline=40.0, lost=(1,))
    survivors = [answers[0], answers[2]]
    assert [answer and answer.error for answer in survivors] == ["RankLost", "RankLost"]
    assert len({answer.message for answer in survivors}) == 1
    assert all(answer.seconds < TIMEOUT + 10 for answer in survivors)


def test_data_parallel_wrappers_are_looked_through():
    for plain, inside, notes, untouched in _values(run(2, shared.wrapped)):
        assert plain == inside
        assert "measured without its wrapper: DistributedDataParallel" in notes
        assert untouched


def test_sharded_parameters_are_refused_and_the_remedy_works():
    for refused, refused_too, (plain, gathered) in _values(run(1, shared.sharded)):
        assert refused.error == refused_too.error == "UnsupportedModel"
        assert "DTensor" in refused.message
        assert "FSDP" in refused_too.message
        assert "get_model_state_dict" in refused.message
        assert plain == gathered
