"""The tests that are about the host alone, and why: they do not run in the lane ``--device standin``.

A file's name stands for all its tests, ``file::test`` for one with all its parameters.
"""

HOST = {
    "test_backend.py": "plays CuPy itself, with arrays that can do nothing",
    "test_budget.py": "reads files: lines, imports",
    "test_cli_page.py": "reads a page and what --help prints",
    "test_conventions.py": "compares a page's numbers with NumPy's",
    "test_data.py": "texts and tokens, before there is an array of numbers",
    "test_derivations.py": "reads pages and method files",
    "test_devices.py": "plays drivers and CuPy itself, to see which sentence is said",
    "test_exercises.py": "grades a file's lines on host arrays, whose values it watches",
    "test_tensorfile.py": "bytes on a disk, before an array of them is on a device",
    "test_hostile.py": "files that are refused before an array of them is on a device",
    "test_hostile_folders.py": "files that are refused before an array of them is on a device",
    "test_fused.py": "has the stand-in, and NumPy beside it, by itself",
    "test_notebooks.py": "reads files, and runs what the notebooks say on the host",
    "test_tables.py": "makes text and pictures from the method files",
    "test_workers.py": "worker processes share a host's memory, and a GPU refuses them",
    "test_progress.py": "a bar is text: there is no array in it",
    "test_recorded.py": "reads recorded files",
    "test_reliability_page.py": "reads files: commands and the names of tests",
    "test_jupyterlab.py": "a browser and a server, processes of their own",
    "test_reference.py": "pages that are built already",
    "test_site.py": "a browser, and pages that are built already",
    "test_speed_page.py": "reads recorded files",
    "test_determinism.py::test_three_runs_of_two_workers_are_the_same_to_the_bit": "worker processes are a host's",
    "test_determinism.py::test_a_new_process_comes_to_the_same_bits": "a process of its own, without the stand-in",
    "test_resume.py::test_a_run_of_two_workers": "worker processes are a host's",
    "test_resume.py::test_with_other_workers_the_run_says_that_rounding_differs": "worker processes are a host's",
    "test_resume.py::test_killed_at_random_moments_the_newest_checkpoint_is_always_good": "what a killed host leaves",
    "test_resume.py::test_a_signal_stops_between_two_steps_saves_and_says_how_to_go_on": "a process of its own",
    "test_standin.py": "has the stand-in by itself",
    "test_cli.py::test_device_cuda_without_cupy_is_one_clear_sentence": "there is no CuPy in it",
    "test_pages.py::test_code_blocks_that_count_the_plain_forms_bytes": (
        "bytes of the plain attention, half a GPU's"
    ),
    "test_gpt.py::test_recomputing_saves_what_arithmetic_says": "bytes of the plain attention, half a GPU's",
    "test_gpt.py::test_the_allocator_says_so_too": "NumPy's allocator",
    "test_gpt.py::test_what_is_recomputed_is_recomputed_once_for_all_who_ask": "counts calls of the plain forms",
    "test_memory.py::test_dropout_is_counted_too": "NumPy's allocator",
    "test_memory.py::test_the_total_is_what_the_allocator_says": "NumPy's allocator",
    "test_memory.py::test_without_a_graph_nothing_is_kept": "NumPy's allocator",
    "test_memory_page.py::test_the_arithmetic_gives_the_bytes_of_a_small_model": (
        "bytes of the plain attention, half a GPU's"
    ),
    "test_tools.py::test_the_ledger_s_total_is_what_the_allocator_says": "NumPy's allocator",
    "test_loop.py::test_a_loss_that_is_not_finite_in_a_later_part_moves_nothing": (
        "a GPU's loss is looked at once, at the end of the step: test_standin.py"
    ),
}


def reason(item):
    """Why the test ``item`` is the host's alone, or None."""
    return HOST.get(item.path.name) or HOST.get(f"{item.path.name}::{getattr(item, 'originalname', item.name)}")


def stale(items) -> list[str]:
    """Entries that name a test which is not among ``items``, though its file is."""
    files = {item.path.name for item in items}
    known = files | {f"{item.path.name}::{getattr(item, 'originalname', item.name)}" for item in items}
    return [entry for entry in HOST if entry.partition("::")[0] in files and entry not in known]
