"""``python -m attnx``: trains a small transformer with every attention there is and compares them."""


class DemoError(ValueError):
    """What was asked for cannot be run; the message names the option, what was expected and what came."""
