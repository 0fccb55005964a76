"""Mistakes to plant in the project, as data: each is found by its symptom, and its fix is known by tests."""
from typing import NamedTuple


class Bug(NamedTuple):
    file: str                 # where it is planted
    right: str                # stands there once
    wrong: str                # what comes in its place
    symptom: str              # what a user sees
    tests: tuple              # all pass once it is mended, and not before


BUGS = (
    Bug("grow.py", "        if place == 0:  ", "        if place >= 0:  ",
        """Accuracy falls after growth. `search.py` says that the largest network's logits moved by a fifth of
        their size from one stage to the next, where it should be a millionth.""",
        ("grow.py::test_the_grown_supernet_computes_the_same_at_its_largest",
         "grow.py::test_a_new_block_is_exactly_the_identity",
         "grow.py::test_one_map_serves_all_that_carry_a_channel",
         "grow.py::test_copies_are_drawn_anew_for_every_set_of_channels")),
    Bug("ops.py", "return prefixes @ gates", "return prefixes @ gates.detach()",
        """The alphas of widths and expansions never move: after a whole search `plot.py` shows their
        probabilities as uniform as at the start, while those of the operations have moved.""",
        ("supernet.py::test_the_sliced_supernet_is_the_full_width_masked_one",
         "supernet.py::test_an_alpha_step_has_a_gradient_for_the_sampled_options_alone",
         "ops.py::test_the_mask_is_the_weighted_sum_of_prefixes")),
    Bug("distill.py", "teacher_logits.detach()", "student_logits.detach()",
        """Distillation teaches nothing. Whatever the teacher is, even one that answers at random, the search
        goes the same way to the last digit. Only the loss is lower than with `--no-distill`, from A1's first
        step on.""",
        ("distill.py::test_the_loss_is_equation_4", "distill.py::test_the_loss_is_finite_for_a_sure_teacher",
         "distill.py::test_the_gradient_is_that_of_equation_4_and_reaches_the_student_alone",
         "search.py::test_both_steps_learn_from_the_teacher")),
    Bug("search.py", "    start //= WEIGHTS_A_STEP\n", "",
        """A resumed run differs. A search that was stopped in the middle of a stage and went on with
        `--resume` ends in other networks than the same search in one go.""",
        ("search.py::test_a_stopped_run_goes_on_as_if_nothing_had_been",
         "search.py::test_the_same_seed_gives_the_same_run")),
    Bug("flops.py", 'Layer("expand", inputs, hidden, pixels, pixels, 1, act)',
        'Layer("expand", inputs, hidden, pixels, after, 1, act)',
        """MACs are too few. A profiler counts 3 to 16 % more than `flops.py` for the networks of a search.
        The parameters are right, and so are the MACs of a block that has as many pixels behind it as in
        front.""",
        ("flops.py::test_candidate", "flops.py::test_networks",
         "flops.py::test_layers_are_the_steps_and_shapes_of_a_network")),
    Bug("derive.py", "middle(corner, tensor.shape[-1])", "corner[..., :tensor.shape[-1], :tensor.shape[-1]]",
        """A network with the supernet's weights is much worse than its path through the supernet, and the
        more so the more blocks with 3 x 3 kernels it has. Networks of 5 x 5 kernels alone are as good.""",
        ("derive.py::test_a_network_inherits_the_leading_corner_of_every_tensor",
         "derive.py::test_a_derived_network_computes_what_its_path_computed")),
    Bug("supernet.py", "torch.where(alpha.grad == 0, old, alpha)", "torch.where(old == 0, old, alpha)",
        """The architecture never moves: after a whole search every choice is still uniform, though the
        alphas have gradients, and Adam steps.""",
        ("supernet.py::test_an_alpha_step_moves_the_sampled_options_alone_whatever_their_momentum",)),
    Bug("search.py", "tau = temperature(step / steps)", "tau = temperature(step / epoch_length)",
        """In the later stages the weights learn mixtures of two networks to the end. By the log the
        temperature ends at 0.1 in A0, but at about 1 in A1 to A4; with `--epochs 2` at 0.002 in all.""",
        ("search.py::test_a_stage_is_trained_step_for_step_as_the_paper_says",)),
    Bug("grow.py", "torch.cat([known, known[-1].expand(len(alpha) - len(known))])",
        "torch.cat([known, known.new_zeros(len(alpha) - len(known))])",
        """Growth forgets what was chosen. After each growth the log shows new widths and expansions with
        probabilities that have nothing to do with what the stage before had come to prefer: where it had
        driven the largest down, the new, still larger ones are likely all the same.""",
        ("grow.py::test_architecture_parameters_are_inherited",)),
    Bug("supernet.py", "hidden = [self.block.hidden(width, option) for width in widths for",
        "hidden = [self.block.hidden(max(widths), option) for _ in widths for",
        """The supernet does not compute the networks that it stands for. With gates of 0 and 1 two sampled
        paths should give exactly one network of the space; they do not where that network has the narrower
        of two widths in front of a block. A single path does.""",
        ("supernet.py::test_the_sliced_supernet_is_the_full_width_masked_one",
         "supernet.py::test_gates_of_0_and_1_for_two_sampled_paths_give_the_network_of_one_of_them")))
