"""Benchmarks: `hybrid-ops bench FAMILY`, a file per family with its cases, which `harness.run` measures; `bench model`."""
