"""Where the program starts: a signal that comes while it loads ends it, without a word of Python's."""

import signal


def main() -> None:
    """Load the command line and run it."""
    # Loading takes a while, and there is nothing yet that would have to be put in order.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from neuromas.cli import main as cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
