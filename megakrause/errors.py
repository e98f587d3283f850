"""The one exception that people see: a single clear line, no traceback."""


class UserError(Exception):
    """Something the user can mend. Its text names the thing, the value and what would be right."""
