"The profiles of the property tests: short ones that repeat exactly, and long ones that are run at night"
import os

from hypothesis import HealthCheck, settings

common = dict(deadline=None, suppress_health_check=list(HealthCheck))
settings.register_profile('short', derandomize=True, database=None, **common)
settings.register_profile('nightly', print_blob=True, **common)
NIGHTLY = os.environ.get('HYPOTHESIS_PROFILE') == 'nightly'
settings.load_profile('nightly' if NIGHTLY else 'short')


def examples(short, nightly): return settings(max_examples=nightly if NIGHTLY else short)
