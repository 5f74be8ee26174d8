"""Run a module with the stand-in in CuPy's place: python tests/host_cupy FOLDER -m MODULE ...

FOLDER is where built libraries are kept.
"""

import runpy
import sys
from pathlib import Path

# This folder itself would hide modules such as `array`.
sys.path[:1] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from host_cupy.install import installed  # noqa: E402

folder, flag, module, *arguments = sys.argv[1:]
if flag != "-m":
    sys.exit(__doc__)
sys.argv = [module, *arguments]
with installed(Path(folder)):
    runpy.run_module(module, run_name="__main__", alter_sys=True)
