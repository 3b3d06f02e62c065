"""Seeds of requests."""

from nanoaipo.seeds import derive_seed


def test_seeds_depend_on_run_iteration_and_prompt_and_are_far_apart():
    seeds = set()
    for run in range(3):
        for iteration in range(3):
            for prompt in range(100):
                seeds.add(derive_seed(run, iteration, f"p{prompt}"))
    ordered = sorted(seeds)

    assert len(seeds) == 900
    assert derive_seed(0, 1, "a") == derive_seed(0, 1, "a")
    assert min(later - seed for seed, later in zip(ordered, ordered[1:])) > 5
    assert max(seeds) < 2**31
