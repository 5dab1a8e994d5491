"""Tests of the CPU backend that hold for the kernels as they stand; conftest.py gives them inputs on the device."""

# ruff: noqa: F401
from test_backward import (
    test_rows_marked_as_seeing_nothing_take_no_part,
    test_rows_without_keys_take_either_infinity,
)
from test_dropout import (
    test_dropped_fraction,
    test_mask_does_not_depend_on_layout,
    test_mask_does_not_depend_on_the_other_sequences,
    test_mask_is_philox,
    test_mask_is_the_same_for_every_type,
    test_mask_of_a_longer_sequence_starts_with_that_of_a_shorter,
)
from test_layouts import (
    test_expanded_gradients_by_autograd,
    test_gradients,
    test_gradients_in_one_packed_tensor,
    test_inputs,
    test_other_inputs_of_the_backward_pass,
    test_small_tensors,
)
from test_metamorphic import (
    test_adding_keys_that_nobody_sees,
    test_batch_permutation,
    test_batch_size,
    test_extreme_scores,
    test_first_tile_visited_is_masked,
    test_heads_share_keys_as_if_each_had_its_own,
    test_many_equal_keys_do_not_stagnate,
    test_max_seqlen_may_be_larger_than_any_sequence,
    test_values_of_one_give_one,
    test_varlen_is_a_loop_of_dense,
)
from test_nan import (
    test_any_nan_among_gradients_of_softmax_lse_stays_nan,
    test_any_nan_stays_nan,
    test_infinite_values_show_in_their_column,
    test_nan_shows_where_it_is_attended_to,
    test_padding_does_not_matter,
    test_unused_pages_do_not_matter,
)
