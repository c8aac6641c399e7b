"""The Python API, by subject: runs (pictures), slides (features, training sets), learning (training, quality).

Its names are those of the package `engine`, which loads them when they are first used.
"""
