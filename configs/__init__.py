"""Configurations of the runs."""
