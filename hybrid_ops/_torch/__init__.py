"""The operators in vectorised torch, a file per family: the CPU path, `impl="torch"`, and the backward passes."""
