"""Functions of other libraries, by their own names and signatures, over those of hybrid_ops: a module for each."""
