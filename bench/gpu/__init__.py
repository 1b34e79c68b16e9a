"""Unattended runs of the decode benchmark on a GPU host, in pieces of at most ten minutes, each row kept as soon as it is measured."""
