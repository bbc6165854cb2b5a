"""Runs from outside: who has one, how far it is, when it ends. Nothing here imports torch."""
