"""A study: a grid of runs from one config file, made comparable, trained and compared."""
