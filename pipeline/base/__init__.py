"""Utilities for every package: errors, command lines, files, progress. Imports no other package."""
