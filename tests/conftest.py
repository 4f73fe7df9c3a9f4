"""Puts the project on the path, keeps torch to one thread a process, and leaves out the slow tests.

    python -m pytest -q -n 2 tests              the fast tests, at most four minutes on two cores
    python -m pytest -q -n 2 tests -m slow      the slow ones
    python -m pytest -q -n 2 tests -m "slow or not slow"    all

A slow test that is named, as tests/test_train.py::test_frozen_weights_stay, runs without -m.
"""
import os
import sys
from fnmatch import fnmatchcase

import pytest

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [os.path.dirname(HERE), HERE, os.path.join(HERE, "bench")]
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402

torch.set_num_threads(1)

# File and test (with * and ?) of what takes more than three seconds of a processor, where a faster test stays that covers
# the same less thoroughly. Tests may also be marked where they stand, by pytest.mark.slow.
SLOW = (
    # the methods on scenes are pinned among the fast tests
    "test_pins.py::test_each_benchmark",
    "test_pins.py::test_each_method_on_pairs",
    # every tower and export against its peer; one of each stays, and the exported files are pinned
    "test_model.py::test_export_*[[]siglip]",
    "test_model.py::test_export_transformers*",
    "test_model.py::test_every_name_agrees_with_open_clip_and_is_accepted",
    "test_model.py::test_mistakes_say_what_to_do",
    "test_model.py::test_open_clip_clip[[]ViT-B-16*",
    "test_model.py::test_open_clip_clip[[]ViT-B-32-quickgelu*",
    "test_model.py::test_open_clip_clip[[]ViT-L*",
    "test_model.py::test_open_clip_real_shape_and_memory",
    "test_model.py::test_open_clip_siglip[[]*SigLIP2*",
    "test_model.py::test_peer_in_and_out_again_is_bit_equal",
    "test_model.py::test_single_files",
    "test_model.py::test_spans_compile_without_a_break*",
    "test_model.py::test_transformers_real_shape*",
    "test_model.py::test_works_alone",
    # NLTK's own tagger and chunker, kills, hours of text; the concepts of 2,000 captions are pinned
    "test_concepts.py::test_both_paths_agree*",
    "test_concepts.py::test_cache_is_bounded",
    "test_concepts.py::test_long_captions",
    "test_concepts.py::test_resume_after_kill",
    "test_concepts.py::test_swaps_and_negations_differ_from_the_caption",
    "test_concepts.py::test_training_is_reproducible",
    "test_concepts.py::test_weights_of_nltk",
    # two processes stay
    "test_losses.py::test_processes_equal_the_whole_batch[[]4]",
    "test_peer_losses.py::test_processes_equal_the_whole_batch[[][14]]",
    "test_pooling.py::test_compiles_whole_for_any_number_of_concepts*",
    "test_data.py::test_the_order_is_random_in_every_place",
    # peers' models, item by item; whole commands
    "test_evaluate.py::test_all_runs_what_is_there_and_lists_the_rest",
    "test_evaluate.py::test_other_crafted_archives",
    "test_evaluate.py::test_processes_share_the_work_and_count_nothing_twice",
    "test_evaluate.py::test_sugarcrepe_equals_the_official_protocol_item_by_item",
    "test_evaluate.py::test_hard_positives_and_vl_checklist",
    "test_evaluate.py::test_long_retrieval",
    "test_evaluate.py::test_sets_with_names_and_prompts_of_clip_benchmark[[]c*",
    "test_evaluate_tools.py::test_verify_tells_a_wrong_figure",
    "test_evaluate_tools.py::test_a_wrong_flag_costs_two_lines",
    "test_evaluate_tools.py::test_open_clip_models_pick_as_open_clip_does*",
    # runs of train.py; of each kind the shortest stays
    "test_train.py::test_a_new_run_does_not_begin_in_the_folder_of_another",
    "test_train.py::test_a_signal_to_all_during_an_evaluation",
    "test_train.py::test_a_signal_is_not_deaf_while_others_hang",
    "test_train.py::test_all_shapes_are_compiled_at_the_start*",
    "test_train.py::test_average_of_the_weights",
    "test_train.py::test_bfloat16_stays_near_float32",
    "test_train.py::test_going_back_discards_what_followed",
    "test_train.py::test_killed_at_*",
    "test_train.py::test_methods_do_not_depend_on_processes_and_parts[[]*_clip *",
    "test_train.py::test_methods_do_not_depend_on_processes_and_parts[[]degla *",
    "test_train.py::test_methods_beside_compositionality_on_pairs[[]tecoa*",
    "test_train.py::test_on_a_terminal_an_error_stands_on_a_line_of_its_own",
    "test_train.py::test_one_dead_process_ends_all",
    "test_train.py::test_processes_and_accumulation_change_nothing[[]1-4*",
    "test_train.py::test_processes_and_accumulation_change_nothing[[]2-2*",
    "test_train.py::test_processes_and_accumulation_change_nothing[[]3-2*",
    "test_train.py::test_resumed_on_another_number_of_processes",
    "test_train.py::test_resuming_with_other_arguments",
    "test_train.py::test_tensorboard_gets_what_the_log_has",
    "test_train.py::test_torchrun_restarts_what_died",
    "test_train.py::test_what_a_kill_left_behind_is_removed_not_written_into",
    "test_train.py::test_what_to_do_next_repeats_the_own_arguments",
    # about twenty commands
    "test_readme.py::test_every_command_works_without_tests",
)


def is_slow(item):
    name = f"{os.path.basename(item.location[0])}::{item.name}"
    return any(fnmatchcase(name, pattern) for pattern in SLOW)      # "[[]" there is "[" here


def pytest_collection_modifyitems(config, items):
    """Put test_train.py first, mark what SLOW names, and leave out the slow tests, unless -m or the name asks for them.

    test_train.py runs train.py in forks of this process, which autograd refuses in the child once a test here has run
    a backward within a backward, as checkpointing does. pytest-xdist hands out tests in their order, so that first is
    first on each of its processes.
    """
    items.sort(key=lambda item: not item.location[0].endswith("test_train.py"))
    for item in items:
        if is_slow(item):
            item.add_marker(pytest.mark.slow)
    if config.option.markexpr or any("::" in argument for argument in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if not item.get_closest_marker("slow")]
