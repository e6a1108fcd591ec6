"""Values as JSON and tensors: each kind there and back, and what is neither written nor read."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import torch as tensor_file

from headwise.errors import InputError, Refusal
from headwise.heads import Head, HeadSet, KVGroup, SiteId
from headwise.use.sharing.stored_form import Reading, Writing


def back(value: Any) -> Any:
    """Through the text of a JSON and the bytes of safetensors."""
    writing = Writing()
    text = json.dumps(writing.form(value, "it"), allow_nan=False)
    return Reading(tensor_file.load(tensor_file.save(writing.tensors))).value(json.loads(text))


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        0,
        -3,
        0.1,
        math.inf,
        -math.inf,
        "",
        "L0H1",
        (),
        (1, (2.5, None), "x"),
        {},
        {"a": {"b": (1, "c")}, "number": "nan", "heads": 3},
        HeadSet.parse("L0H1, encoder.L2H0"),
        HeadSet((), "group"),
        Head.parse("encoder.L2H0"),
        KVGroup.parse("L3G1@1"),
        SiteId.parse("L4"),
    ],
    ids=repr,
)
def test_plain_values_come_back(value: Any) -> None:
    found = back(value)
    assert found == value
    assert type(found) is type(value)


def test_what_is_no_number_comes_back() -> None:
    assert math.isnan(back(math.nan))


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    given = torch.arange(6)[: math.prod(shape)].reshape(shape).to(dtype)
    found = back({"a": given, "b": (given,)})
    for each in (found["a"], found["b"][0]):
        assert each.dtype == dtype
        assert torch.equal(each, given)


def test_parts_of_one_memory_and_of_autograd_come_back() -> None:
    whole = torch.arange(12.0).reshape(3, 4).requires_grad_()
    found = back({"column": whole[:, 1], "turned": whole.T, "whole": whole})
    assert torch.equal(found["column"], whole[:, 1])
    assert torch.equal(found["turned"], whole.T)
    assert not found["whole"].requires_grad


def test_numpy_comes_back_as_numpy() -> None:
    given = np.array([[0.5, np.nan]], dtype=np.float64)
    found = back(given)
    assert found.dtype == given.dtype
    assert np.array_equal(found, given, equal_nan=True)
    assert back(np.float64(0.5)) == 0.5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (len, "it is a builtin_function_or_method and cannot be saved"),
        ({"x": (1, {2})}, r"it/x/1 is a set and cannot be saved"),
        ({1: 2}, "it has the key 1, a int"),
        (torch.ones(2, dtype=torch.complex64), "complex, quantised or sparse"),
        (torch.ones(2).to_sparse(), "complex, quantised or sparse"),
    ],
    ids=str,
)
def test_what_cannot_be_written_is_refused_by_its_place(value: Any, message: str) -> None:
    with pytest.raises(Refusal, match=message):
        Writing().form(value, "it")


@pytest.mark.parametrize(
    "form",
    [
        {"code": "print()"},
        {"heads": {"kind": "head", "sites": {}}, "head": "L0H1"},
        {"number": "1e9"},
        {"mapping": [1]},
        {"record": "Popen", "fields": {}},
        {"record": "Verdict", "fields": {"command": 1}},
        {"intervention": "no-such-thing", "settings": {}},
        {"tensor": "elsewhere"},
        {"head": "first"},
        {"heads": "L0H1"},
        {},
    ],
    ids=str,
)
def test_what_no_version_wrote_is_not_read(form: Any) -> None:
    with pytest.raises(InputError) as error:
        Reading({}).value(form)
    assert "\n" not in str(error.value)
