"""`python -m services.replay`, which `headrace replay` runs."""

from __future__ import annotations

import os
import sys

#: How the command is called in its help, when another one runs it.
NAME_VARIABLE = "HEADRACE_REPLAY_NAME"


def main() -> None:
    """Run the command. Exits."""
    try:
        from services.replay import app
    except ModuleNotFoundError as error:
        sys.exit(f"Error: replays need {error.name}: pip install 'headrace[replay]'")
    app.main(os.environ.get(NAME_VARIABLE, "python -m services.replay"))


if __name__ == "__main__":
    main()
