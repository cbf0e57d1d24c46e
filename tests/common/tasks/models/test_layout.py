"""The flat vector of a model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.contract import Category, Contract, Label, Number
from common.errors import VerificationError
from common.study import Model
from common.tasks.models.layout import Tensor, flatten, layout, layout_digest, size, size_bytes, unflatten

shapes = st.lists(st.lists(st.integers(1, 4), max_size=3).map(tuple), min_size=1, max_size=4)


def _tensors(shape_list: list[tuple[int, ...]]) -> tuple[Tensor, ...]:
    return tuple(Tensor(f"t{i}", shape) for i, shape in enumerate(shape_list))


def _contract(classes: int, codes: int) -> Contract:
    return Contract(
        patient="id",
        features=(
            Number(kind="number", name="age", unit="a", minimum=0.0, maximum=100.0),
            Category(kind="category", name="sex", codes=tuple(f"c{i}" for i in range(codes))),
        ),
        label=Label(name="y", classes=tuple(f"k{i}" for i in range(classes))),
    )


@given(shapes, st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_flatten_inverts_unflatten(shape_list: list[tuple[int, ...]], seed: int) -> None:
    tensors = _tensors(shape_list)
    vector = np.random.default_rng(seed).normal(size=size(tensors)) * 1e300
    values = unflatten(vector, tensors)
    assert {name: array.shape for name, array in values.items()} == {t.name: t.shape for t in tensors}
    assert flatten(values, tensors).tobytes() == vector.tobytes()
    naive = np.concatenate([values[t.name].ravel() for t in tensors])
    assert naive.tobytes() == vector.tobytes()


def test_unflattened_values_are_copies() -> None:
    tensors = _tensors([(2,)])
    vector = np.zeros(2)
    unflatten(vector, tensors)["t0"][:] = 1
    assert not vector.any()


@pytest.mark.parametrize(("classes", "codes"), [(2, 1), (2, 3), (5, 2)])
def test_logistic_regression_has_a_row_of_weights_for_each_class(classes: int, codes: int) -> None:
    tensors = layout(Model(kind="logistic_regression"), _contract(classes, codes))
    assert tensors == (Tensor("weight", (classes, 1 + codes)), Tensor("bias", (classes,)))
    assert size(tensors) == classes * (2 + codes)
    assert size_bytes(tensors) == 4 * size(tensors)


def test_digest_tells_layouts_apart() -> None:
    layouts = [
        _tensors([(2, 3)]),
        _tensors([(3, 2)]),
        _tensors([(6,)]),
        _tensors([(2,), (3,)]),
        _tensors([(2, 3), ()]),
        (Tensor("u0", (2, 3)),),
        (Tensor("t1", (3,)), Tensor("t0", (2,))),
    ]
    assert len({layout_digest(tensors) for tensors in layouts}) == len(layouts)


@pytest.mark.parametrize(
    ("values", "code"),
    [
        ({"t0": np.zeros(2)}, "layout.names"),
        ({"t0": np.zeros(2), "t1": np.zeros(3), "x": np.zeros(1)}, "layout.names"),
        ({"t0": np.zeros(2), "t1": np.zeros((3, 1))}, "layout.shape"),
        ({"t0": np.zeros(2), "t1": np.zeros(1)}, "layout.shape"),
    ],
)
def test_other_tensors_are_refused(values: dict[str, np.ndarray], code: str) -> None:
    with pytest.raises(VerificationError) as caught:
        flatten(values, _tensors([(2,), (3,)]))
    assert caught.value.code == code


@pytest.mark.parametrize("length", [0, 4, 6])
def test_vectors_of_another_length_are_refused(length: int) -> None:
    with pytest.raises(VerificationError, match="layout needs"):
        unflatten(np.zeros(length), _tensors([(2,), (3,)]))
