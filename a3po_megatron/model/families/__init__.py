"""The families of models that are known: one table each."""
