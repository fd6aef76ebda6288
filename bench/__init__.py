"""Benchmarks: `hybrid-ops bench FAMILY`, a file per family, measured by `harness`; `hybrid-ops bench model`."""
