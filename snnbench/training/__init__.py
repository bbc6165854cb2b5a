"""One run from inside: what is built, trained, evaluated, saved and shared out."""
