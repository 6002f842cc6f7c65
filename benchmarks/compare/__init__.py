"""ID-LoRA beside other methods on real data, in the manner of PEFT's ``method_comparison``.

One experiment is one fresh process and one JSON file; a study is a declared list of experiments.

    python -m benchmarks.compare lr --jobs 2 --threads 1     # run what is missing of a study
    python -m benchmarks.compare.report                      # tables and plots of all studies
    python -m benchmarks.compare.cost                        # time, memory and file size, beside the frozen model
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "compare"

# For `harness`, as the scripts beside it import it, and for the real models and data of assets.py.
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "examples")]
