"""The one family of errors that users see."""


class JDLoRAError(Exception):
    """What was wrong and what to do about it, in one line.

    Raised where the fact is known. The command line prints the message on stderr and exits with 2; the vLLM
    plugin lets it end start-up.
    """
