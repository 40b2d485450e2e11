"""The catalogue of search spaces: one file, one space."""

if __name__ != "nasgraph.search_spaces":  # imported as a second copy, every class would exist twice
    raise ImportError("import this package as nasgraph.search_spaces, not as " + __name__)
