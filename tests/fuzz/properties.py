"""A property: a test that is given many inputs, and counts those for which it held, and that had something in them."""

import functools
from collections.abc import Callable

from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import SearchStrategy

# The same inputs in every run of the tests. No deadline: a machine may be busy. No database: nothing is left behind.
# Fixtures are made once for all inputs of a test, and those here depend on their parameter alone.
settings.register_profile(
    "tests",
    derandomize=True,
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.large_base_example,
        HealthCheck.function_scoped_fixture,
    ],
)
# Many more, of the seed that --hypothesis-seed gives.
settings.register_profile("fuzz", parent=settings.get_profile("tests"), derandomize=False)

held = 0  # examples for which a property held, of all that ran in this process
informative = 0  # those of them in which there was something to get wrong


def fuzzing() -> bool:
    """Tell whether the profile is "fuzz", which hypothesis knows once it is configured: when tests are collected."""
    return settings.get_current_profile_name() == "fuzz"


def holds(*, tests: int = 5, fuzz: int, **strategies: SearchStrategy) -> Callable[[Callable], Callable]:
    """Make a property of a test, whose arguments by these names are drawn.

    The test tells whether the example was informative: whether there was something in it that could have been wrong,
    as there is not where no row is valid or every distribution is one-hot.

    Args:
        tests, fuzz: how many examples the two profiles run.
    """
    profile = settings.get_profile("fuzz" if fuzzing() else "tests")

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def counted(*args, **kwargs):
            global held, informative
            found = test(*args, **kwargs)
            assert type(found) is bool, f"{test.__name__} must tell whether the example was informative"
            held += 1
            informative += found

        return settings(profile, max_examples=fuzz if fuzzing() else tests)(given(**strategies)(counted))

    return decorate
