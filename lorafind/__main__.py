"""Entry point of ``lorafind`` and of ``python -m lorafind``."""

import sys


def main() -> None:
    """Run the command line; Ctrl-C during the imports ends like Ctrl-C during the work."""
    try:
        from lorafind.cli.app import run

        run()
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
