"""Families of published checkpoints, one file each: a config translation and a table of rules."""
