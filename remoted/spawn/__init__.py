"""The only package that starts processes or changes ids."""
