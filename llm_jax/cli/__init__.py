"""The command line: `main.py` parses it and lists the verbs, which the other files hold; `terminal.py` prints text."""
