"""Entry point of the program: Ctrl-C while it loads ends it without a traceback."""

import signal


def main() -> None:
    """Load the command line interface and run it."""
    # Loading takes a while, and nothing has to be cleaned up yet.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from neuromas.cli import main as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
