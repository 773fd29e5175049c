"""Programs that try to be paid without solving the task, or to harm the host.

They are text: the sandbox runs them and nothing else does. Every program is to add its two arguments, and none does. Before
each stand facts of the host that a real attacker would have to guess (paths, a port, a process) and `HELP`. What `solve`
returns ends up in the outcome's detail, where a test can read it.
"""

from attacks.base import HELP, HONEST, TESTS, Attack
from attacks.channel import CHANNEL
from attacks.ending import ENDING
from attacks.host import HOST
from attacks.interpreter import INTERPRETER
from attacks.iteration import ITERATION
from attacks.resources import RESOURCES
from attacks.search import SEARCH
from attacks.values import VALUES

__all__ = ["ATTACKS", "HELP", "HONEST", "TESTS", "Attack"]

ATTACKS = [*ENDING, *ITERATION, *VALUES, *INTERPRETER, *CHANNEL, *SEARCH, *RESOURCES, *HOST]
