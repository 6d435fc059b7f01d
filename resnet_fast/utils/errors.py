"""What an error says, for a message of one line."""


def first_line(error: BaseException) -> str:
    """Its first line that is not empty, else what kind of error it is: an assertion often says nothing."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
