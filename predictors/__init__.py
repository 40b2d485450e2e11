"""What predicts a candidate's quality without training it: training-free proxies, tables of published results."""

if __name__ != "nasgraph.predictors":  # imported as a second copy, every class would exist twice
    raise ImportError("import this package as nasgraph.predictors, not as " + __name__)
