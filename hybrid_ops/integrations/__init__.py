"""Patches for models of other libraries: a subpackage for each."""
