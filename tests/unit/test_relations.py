"""Unknowns with linear relations: the sparse exact solution is the whole null space."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isoflat.symmetry.relations import ANY, ZERO, Relations

steps = st.lists(
    st.one_of(
        st.tuples(st.just("tie"), st.integers(0, 30), st.integers(0, 30)),
        st.tuples(st.just("pin"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("add"), st.integers(0, 30), st.integers(0, 30)),
        st.tuples(st.just("subtract"), st.integers(0, 30), st.integers(0, 30)),
        st.tuples(st.just("double"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("join"), st.integers(0, 30), st.integers(0, 30)),
    ),
    max_size=25,
)


@settings(deadline=None)
@given(st.integers(1, 8), steps)
def test_solutions_are_the_null_space(count, script):
    """Against dense linear algebra: every column solves every equation, and there are as many as the nullity."""
    relations = Relations()
    ids = [int(x) for x in relations.fresh(count)]
    equations: list[dict[int, float]] = []

    def equation(*terms):
        total: dict[int, float] = {}
        for c, x in terms:
            total[x] = total.get(x, 0.0) + c
        equations.append(total)

    for kind, i, j in script:
        a, b = ids[i % len(ids)], ids[j % len(ids)]
        one, two = torch.tensor([a]), torch.tensor([b])
        if kind == "tie":
            relations.tie(one, two)
            equation((1, a), (-1, b))
        elif kind == "pin":
            relations.pin(one, "test")
            equation((1, a))
        else:
            coefficients = {"add": (1, 1), "subtract": (1, -1), "double": (2, 0), "join": (3, -2)}[kind]
            made = int(relations.combine((coefficients[0], one), (coefficients[1], two))[0])
            equation((1, made), (-coefficients[0], a), (-coefficients[1], b))
            ids.append(made)
    solution = relations.solve()
    names = sorted({x for total in equations for x in total} | set(ids) | {ZERO})
    place = {x: k for k, x in enumerate(names)}
    dense = np.zeros((len(equations) + 1, len(names)))
    for row, total in enumerate(equations):
        for x, c in total.items():
            dense[row, place[x]] += c
    dense[-1, place[ZERO]] = 1
    values = solution.rows(torch.tensor(names)).toarray()
    assert np.abs(dense @ values).max(initial=0.0) <= 1e-9 * max(1.0, np.abs(values).max(initial=0.0))
    assert solution.dimension == len(names) - np.linalg.matrix_rank(dense)
    assert np.linalg.matrix_rank(values) == solution.dimension if values.size else solution.dimension == 0


def test_literal_zeros_relate_to_nothing():
    """A padded channel has every scale: it ties no one, but does not hide a pin either."""
    relations = Relations()
    a, b = relations.fresh(2)
    row = torch.stack([a, torch.tensor(ANY), b])[None]
    assert int(relations.along(row, 0)[0]) in (int(a), int(b))
    assert relations.solve().dimension == 1
    pinned = torch.tensor([[ZERO, ANY]])
    assert int(relations.along(pinned, 0)[0]) == ZERO


def test_further_forms_cut_the_solutions():
    relations = Relations()
    a, b, c = relations.fresh(3)
    relations.tie(relations.combine((1, a[None]), (1, b[None])), c[None])
    assert relations.solve().dimension == 2
    cut = relations.solve([{int(a): 1, int(b): -1}])
    assert cut.rows(torch.stack([a, b, c])).toarray().tolist() == [[1.0], [1.0], [2.0]]


def test_reasons_survive_ties_in_any_order():
    """What is tied to something pinned tells the same reason, whichever came first."""
    for first in ("tie", "pin"):
        relations = Relations()
        a, b = (x[None] for x in relations.fresh(2))
        if first == "tie":
            relations.tie(a, b)
        relations.pin(a, "gelu ('act')")
        if first == "pin":
            relations.tie(a, b)
        assert relations.solve().dimension == 0
        assert relations.reasons(a) == ["gelu ('act')"]
        if first == "tie":
            assert relations.reasons(b) == ["gelu ('act')"]


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3)])
def test_along_ties_what_repeats(shape):
    relations = Relations()
    ids = relations.fresh(int(np.prod(shape))).view(shape)
    kept = relations.along(ids, 1)
    assert kept.shape == (shape[1],)
    assert relations.solve().dimension == shape[1]
