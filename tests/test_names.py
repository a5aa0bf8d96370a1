"""Tables of names: each row is as it says, and there are no other names elsewhere."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import nn

from bncli import kernels, names
from bncli.engine.models import factory
from bncli.kernels.definition import definition
from bncli.kernels.fused import cpu
from bncli.measure.profile.sources import PEERS
from bncli.measure.reference import case as cases
from bncli.recipe import sections

CHECKED = [names.NORMS[name] for name in names.CHECKED_NORMS]


@pytest.mark.parametrize("row", CHECKED, ids=names.CHECKED_NORMS)
def test_a_checked_norm_has_a_section_a_module_and_a_definition_that_agree(row: names.Norm) -> None:
    section = getattr(sections, row.section)
    assert section in get_args(get_args(sections.NormSection)[0])
    checked = {"groups": names.CHECKED_GROUPS, "group_size": names.CHECKED_GROUP_SIZE, "eps": 1e-5}
    make = factory(section(kind=row.name, **{name: checked[name] for name in checked.keys() & section.model_fields}))
    assert make is not None
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = definition(row.name)(x, None, None, None, None, True, 0.1, 1e-5, None, None)
    torch.testing.assert_close(y, make(4).double()(x))


@pytest.mark.parametrize("row", CHECKED, ids=names.CHECKED_NORMS)
def test_a_mean_is_taken_over_so_many_values_as_change_with_one_of_them(row: names.Norm) -> None:
    x = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = definition(row.name)(x, None, None, None, None, True, 0.1, 1e-5, None, None)
    (reached,) = torch.autograd.grad(y[1, 2, 3], x)
    channels = row.covariance_channels(names.CHECKED_GROUP_SIZE)
    assert int(reached.count_nonzero()) == channels * row.values_per_mean(x.shape, names.CHECKED_GROUPS)


def test_every_kind_of_norm_but_none_is_in_the_table() -> None:
    known = {section.__name__ for section in get_args(get_args(sections.NormSection)[0])}
    assert known - {"NoNorm"} == {row.section for row in names.NORMS.values()}


@pytest.mark.parametrize("row", names.ACTIVATIONS.values(), ids=names.ACTIVATIONS)
def test_an_activation_is_torchs_function_and_module_of_that_name(row: names.Activation) -> None:
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)
    module = getattr(nn, row.module)()
    torch.testing.assert_close(getattr(nn.functional, row.name)(z), module(z))
    assert getattr(module, "negative_slope", None) == row.slope


@pytest.mark.parametrize("name", names.FUSED_ACTIVATIONS)
def test_a_fused_activation_is_kinked_if_its_derivative_is_a_step(name: str) -> None:
    z = torch.tensor([-1.0, -1e-6, 1e-6, 1.0], dtype=torch.float64, requires_grad=True)
    (slopes,) = torch.autograd.grad(getattr(nn.functional, name)(z).sum(), z)
    steps = bool(slopes[0] == slopes[1] and slopes[2] == slopes[3] and slopes[1] != slopes[2])
    assert steps == names.ACTIVATIONS[name].kinked


def test_the_operations_of_each_fused_activation_are_counted() -> None:
    assert {*cases.ACTIVATION} == {*cases.DERIVATIVE} == {None, *names.FUSED_ACTIVATIONS}


def test_the_c_kernel_numbers_each_activation_that_kernels_apply() -> None:
    assert {*cpu.ACTIVATIONS} == {"none", *names.FUSED_ACTIVATIONS}


def test_each_kernel_is_one_of_bnclis_a_peer_or_the_compiled_native() -> None:
    assert {*names.RECIPE_KERNELS} <= {*names.GRADCHECK_KERNELS}
    assert {*names.KERNELS} == {*names.GRADCHECK_KERNELS, *PEERS}
    for name in {*names.GRADCHECK_KERNELS} - {"compiled"}:
        assert callable(kernels.load(name))
    assert "fused-interpreted" not in {*names.RECIPE_KERNELS, *names.PROFILE_KERNELS}
