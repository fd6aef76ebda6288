"""Microbenchmarks: `hybrid-ops bench FAMILY`. A file per family declares its cases; `harness.run` measures them."""
