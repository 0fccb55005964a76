"""What the assignments are made of: the tasks' chapters, points, places in the paper and tests.

A task is a function marked `# task N.M` in the code. Its checks are those of its number in checks.py, of the
function alone; `tests` are of this project, with all other tasks solved.
"""
from typing import NamedTuple

CHAPTERS = {1: "A candidate, at any width (Table 2, channel masks)",
            2: "Two sampled paths (Architecture Space)",
            3: "SuperNet2SuperNet (Eqs. 1-3, Fig. 1)", 4: "Progressive SuperNet Distillation (Eq. 4)",
            5: "From a supernet to a network (Table 3)"}


class Task(NamedTuple):
    points: int               # of 100 in all
    paper: str                # where the paper speaks of it
    file: str                 # tests/test_<file>.py
    tests: tuple              # names of tests in it, without test_


TASKS = {
    "1.1": Task(3, "the paper is silent", "ops", ("a_residual_is_cut_or_padded_to_the_output",)),
    "1.2": Task(4, "Architecture Space: channel masks", "ops",
                ("the_mask_is_the_weighted_sum_of_prefixes",)),
    "1.3": Task(12, "Table 2", "ops", (
        "a_candidate_at_any_prefix_width_is_a_plain_one_with_sliced_weights",
        "hidden_widths_are_one_soft_mask_behind_batch_norm_and_activation",
        "candidates_that_are_computed_together_are_those_computed_alone")),
    "2.1": Task(2, "the paper is silent", "supernet",
                ("the_temperature_falls_exponentially_from_5_to_a_tenth",)),
    "2.2": Task(10, "Architecture Space: two sampled paths", "supernet", (
        "pairs_are_drawn_without_replacement_from_the_softmax",
        "the_choices_of_a_path_are_drawn_independently",
        "at_a_low_temperature_one_path_has_nearly_all_the_weight_and_at_a_high_one_half",
        "at_temperature_0_one_network_is_computed_and_the_gates_learn_as_soft_ones_do")),
    "2.3": Task(10, "Architecture Space: two paths, masks", "supernet", (
        "the_sliced_supernet_is_the_full_width_masked_one", "one_path_is_the_network_of_its_choices",
        "gates_of_0_and_1_for_two_sampled_paths_give_the_network_of_one_of_them")),
    "3.1": Task(6, "Eq. 1", "grow", ("eq_1_keeps_old_channels_and_samples_the_new_ones",
                                     "no_channel_is_copied_twice_before_all_are_once")),
    "3.2": Task(3, "Eq. 2", "grow", ("one_map_serves_all_that_carry_a_channel",)),
    "3.3": Task(8, "Eq. 3", "grow", (
        "the_grown_supernet_computes_the_same_at_its_largest", "growth_is_as_exact_as_its_numbers",
        "consumers_ignore_new_channels_after_zero_widening",
        "split_shares_are_random_positive_and_sum_to_one")),
    "3.4": Task(7, "“To deeper the network”", "grow", (
        "a_new_block_is_exactly_the_identity", "a_new_block_learns_from_the_first_step",
        "a_new_block_has_identity_kernels")),
    "4.1": Task(6, "Eq. 4", "distill", (
        "the_loss_is_equation_4", "the_gradient_is_that_of_equation_4_and_reaches_the_student_alone",
        "without_a_teacher_or_with_lambda_0_it_is_the_cross_entropy",
        "the_loss_is_finite_for_a_sure_teacher")),
    "4.2": Task(2, "Eq. 4: λ from 0.5 to 0.05", "distill",
                ("lambda_falls_linearly_from_a_half_to_a_twentieth",)),
    "5.1": Task(7, "Table 3: FLOPs, parameters", "flops",
                ("candidate", "layers_are_the_steps_and_shapes_of_a_network")),
    "5.2": Task(7, "Table 3: the derived network", "derive", (
        "a_network_inherits_the_leading_corner_of_every_tensor",
        "a_derived_network_computes_what_its_path_computed")),
    "5.3": Task(5, "the paper is silent", "derive",
                ("recalibrated_statistics_are_the_mean_over_batches_of_their_statistics",)),
    "5.4": Task(8, "ours: any budget", "derive", ("viterbi_finds_the_best_network_at_a_price",
                                                  "the_list_of_viterbi_is_the_best_networks_in_order"))}
