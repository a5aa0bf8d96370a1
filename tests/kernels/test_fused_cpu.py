"""The fused kernel's C on the CPU: what is asked of it on a GPU, and what is its own."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.test_fused import (
    test_a_dispatch_mode_sees_the_operator,
    test_a_dtype_it_does_not_have_is_refused,
    test_a_forward_mode_derivative_is_refused_and_not_zero,
    test_a_forward_that_kept_no_signs_still_gives_the_gradient,
    test_all_of_them,
    test_an_empty_batch_gives_empty_results,
    test_backward_needs_x_and_two_vectors_and_a_bit_an_element_at_most,
    test_first_and_second_derivatives_are_those_of_finite_differences,
    test_forward_and_all_gradients_are_natives_of_float64,
    test_half_precision_activations_take_float32_weights,
    test_nan_and_infinity_pass_as_in_torch_and_stay_in_their_channel,
    test_nothing_is_written_into_an_input,
    test_other_strides_give_the_same,
    test_results_lie_as_the_input_does,
    test_running_statistics_move_as_torchs_do,
    test_the_operator_refuses_an_input_with_gaps,
    test_the_operators_keep_the_rules_of_custom_operators,
    test_third_derivatives_are_those_of_differentiable_operators,
    test_torch_compile_takes_it_whole,
    test_two_runs_agree_bit_for_bit,
    test_vectors_with_gaps_are_read_where_their_values_are,
    test_what_does_not_fit_is_refused_before_a_pointer_is_followed,
    test_whoever_saved_running_statistics_learns_that_they_moved,
)


@pytest.fixture
def device() -> torch.device:
    return torch.device("cpu")
