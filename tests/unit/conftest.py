import os

from hypothesis import HealthCheck, settings

# The same examples in every run, on a busy machine, too. HYPOTHESIS_PROFILE=default looks for new ones.
settings.register_profile(
    "suite", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("default", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))
