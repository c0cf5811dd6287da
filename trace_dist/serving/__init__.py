"""Answers from a bank: the right delta for each prompt, in Python, from the command line, and over HTTP."""
