"""What holds for every test."""

from hypothesis import HealthCheck, settings

# Beside other tests on a busy machine an example takes as long as it takes; pytest-timeout ends what hangs.
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")
