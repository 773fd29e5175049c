"""The command line interface: one module for each command, which parses flags, calls the package and prints.

Results go to standard output, progress and errors to standard error.
"""

import importlib
import sys

from neuromas.system.process import configure_process
from neuromas.system.terminal import one_line

USAGE = """usage: neuromas COMMAND [ARGUMENTS]

  screen --tasks NAMES  answer many times without training; says which tasks reinforcement can learn
  train [CONFIG.toml]   train a network; without arguments a small one on a bundled backbone, in minutes
  finetune [CONFIG.toml]  let agents that debate learn from what they agree on, without labels
  grow RUN --to WIDTHS  add nodes or layers to a trained network, or none, and train on, in a new run
  eval RUN              score a trained run on held-out problems or on a file
  ask RUN QUESTION      put one question to a trained run; prints every message on its edge, then the answer
  chat RUN              talk to a trained run in the terminal, every message on its edge as it is written
  serve RUN             answer OpenAI's clients with a trained run, and host a page to talk to it
  show RUN|CONFIG.toml  draw a network and its budget
  view RUN [RUN ...]    write one HTML page: every message before and after training, curves, budget; runs side by side
  diagnose RUN          disturb a trained network: what each node, edge and adapter is worth
  compare CONFIG.toml   run methods x tasks x seeds at matched budgets; one report with intervals, floors and tests
  export RUN --out DIR  write the adapters as PEFT folders with a model card
  import DIR            make a run of such a folder again
  traces RUN --out DIR  write all rollouts as traces of Trackio
  tasks                 list tasks with their splits, floors and verifiers; `tasks show NAME` prints an example

neuromas COMMAND --help explains a command. Results go to standard output; with --json they are one JSON object."""

COMMANDS = (
    "screen", "train", "finetune", "grow", "compare", "eval", "ask", "chat", "serve", "show", "view", "diagnose", "export",
    "import", "traces", "tasks",
)  # fmt: skip
"""Modules of this package, each with a function `run` of arguments; only the one that is called is loaded."""


def main() -> None:
    """Run the command of the command line; exit with 2 after an error of the user."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print(USAGE)
        sys.exit(0 if args else 2)
    if args[0] not in COMMANDS:
        print(f"error: unknown command {args[0]!r}; known are {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        configure_process()
        importlib.import_module(f"neuromas.cli.{args[0]}").run(args[1:])
    except ValueError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader has closed the pipe, as `head` does.
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        print(f"error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(2)
