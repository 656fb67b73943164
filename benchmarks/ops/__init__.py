"""The ops that are timed: inputs, sizes and implementations of each."""
