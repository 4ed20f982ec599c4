"""``python -m zilc``, and the console script: exit status 0, 1 for an error of the input, 2 for usage."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence

#: What shells report for a process that SIGINT ended.
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; a ZilcError becomes one line on stderr."""
    import click

    from zilc.cli import zilc
    from zilc.errors import ZilcError

    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = zilc.main(args=arguments, prog_name="zilc", standalone_mode=False, obj=arguments)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return 2
    except click.ClickException as error:
        error.show(sys.stderr)
        return error.exit_code
    except ZilcError as error:
        if "--debug" in arguments:
            raise
        click.echo(f"zilc: error: {error}", err=True)
        return 1
    except (KeyboardInterrupt, click.Abort):
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout has gone; keep the interpreter from complaining when it flushes at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as leaving:  # click's answer to a broken pipe in the middle of a command
        return int(leaving.code or 0)


def run() -> None:
    """The console script."""
    sys.exit(main())


if __name__ == "__main__":
    run()
