"""What the checks of the READMEs are made of. See tests/readmes.py, their one command."""
