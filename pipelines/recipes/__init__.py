"""Recipes, one a file: `def recipe()` returns the typed configuration of a run; its docstring gives the command."""
