"""The command line: `main.py` reads it, `verbs.py` does what it asks for, `terminal.py` writes to a person."""
