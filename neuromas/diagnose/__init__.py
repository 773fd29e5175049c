"""What the parts of a trained network are worth. The kinds of interventions are named here, where torch is not loaded."""

from typing import Literal, get_args

Kind = Literal["silence", "drop", "shuffle", "swap", "bare", "exchange"]
KINDS: tuple[Kind, ...] = get_args(Kind)
