"""Criteria: from statistics, or from a checkpoint alone, to a score for every expert."""
