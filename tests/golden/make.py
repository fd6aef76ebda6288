"""Golden bytes: what the quantisers of other libraries make of fixed inputs.

    pip install nvidia-modelopt==0.47.0
    git clone --depth 1 --branch v2.18 https://github.com/NVIDIA/TransformerEngine
    python -m tests.golden.make TransformerEngine

in an environment with torch, apart from the library's own; writes `nvfp4.npz` and `fp8.npz` beside this file. The
reference quantisers of Transformer Engine are Python and need nothing compiled.
"""

import sys

from . import fp8, nvfp4

if __name__ == "__main__":
    nvfp4.make(sys.argv[1])
    fp8.make(sys.argv[1])
