"Before torch is imported: each of the processes that share the tests computes with one thread"
import os

if 'PYTEST_XDIST_WORKER' in os.environ: os.environ.setdefault('OMP_NUM_THREADS', '1')
