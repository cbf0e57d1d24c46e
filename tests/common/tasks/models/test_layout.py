"""The flat vector of a model."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.contract import Category, Contract, Label, Number
from common.errors import VerificationError
from common.methods import LogisticRegression, Mlp
from common.tasks.models.layout import Tensor, flatten, layout, layout_digest, size, size_bytes

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
def test_flat_vectors_are_in_layout_order(shape_list: list[tuple[int, ...]], seed: int) -> None:
    tensors = _tensors(shape_list)
    random = np.random.default_rng(seed)
    values = {t.name: random.normal(size=t.shape) * 1e300 for t in reversed(tensors)}
    naive = np.concatenate([values[t.name].ravel() for t in tensors])
    assert flatten(values, tensors).tobytes() == naive.tobytes()


@pytest.mark.parametrize(("classes", "codes"), [(2, 1), (2, 3), (5, 2)])
def test_logistic_regression_has_a_row_of_weights_for_each_class(classes: int, codes: int) -> None:
    tensors = layout(LogisticRegression(kind="logistic_regression"), _contract(classes, codes))
    assert tensors == (Tensor("weight", (classes, 1 + codes)), Tensor("bias", (classes,)))
    assert size(tensors) == classes * (2 + codes)
    assert size_bytes(tensors) == 4 * size(tensors)


def test_an_mlp_has_the_tensors_of_a_sequence_of_layers() -> None:
    tensors = layout(Mlp(kind="mlp", hidden=(7, 4)), _contract(3, 2))
    named = tuple(Tensor(tensor.name, tensor.shape) for tensor in tensors)
    assert named == (
        Tensor("0.weight", (7, 3)),
        Tensor("0.bias", (7,)),
        Tensor("2.weight", (4, 7)),
        Tensor("2.bias", (4,)),
        Tensor("4.weight", (3, 4)),
        Tensor("4.bias", (3,)),
    )


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
