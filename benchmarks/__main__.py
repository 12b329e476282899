"""Every operation's benchmark in one run, so that --save makes the one result file of a device.

    python -m peft_kernels.benchmarks [--quick] [--dtype float32] [--threads 1] [--save FILE.json]

With --threads 1 on a CPU: README's tables are made from that run, which takes minutes.
"""

import importlib
import pkgutil
import sys

from . import __path__ as folder
from . import runner

NAMES = sorted(module.name for module in pkgutil.iter_modules(folder) if module.name.startswith("bench_"))
BENCHES = [importlib.import_module(f".{name}", __package__).BENCH for name in NAMES]

if __name__ == "__main__":
    sys.exit(runner.main(BENCHES, __doc__))
