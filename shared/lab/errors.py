"""What goes wrong by the fault of whoever uses the lab."""


class LabError(Exception):
    """Says in one line, for the page, why something cannot be done."""
