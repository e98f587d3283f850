"""The one exception that people see: a single clear line, no traceback."""


class UserError(Exception):
    """Something the user can mend. Its text names the thing, the value and what would be right."""


def explain_os_error(error: OSError) -> str:
    """One line that names the file and what is wrong with it."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)
