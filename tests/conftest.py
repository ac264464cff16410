"""Settings of the whole suite."""

from datetime import timedelta

from hypothesis import HealthCheck, settings

# The same examples on every run, so that a red run is red again; --hypothesis-profile=long looks
# for new ones, many more, and remembers what it found.
settings.register_profile(
    "repeatable",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    max_examples=100,
    suppress_health_check=list(HealthCheck),
)
settings.register_profile(
    "long",
    settings.get_profile("repeatable"),
    derandomize=False,
    max_examples=5000,
    deadline=timedelta(seconds=60),
)
settings.load_profile("repeatable")
