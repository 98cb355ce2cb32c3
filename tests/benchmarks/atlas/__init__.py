"""Is anything slower, or larger in memory, with ten million cells than with one? See `__main__`."""
