"""Make docs/tutorial.ipynb of docs/tutorial.md: text, programs, and commands as `!` lines.

python docs/make_notebook.py
"""

import json
import re
from pathlib import Path

HERE = Path(__file__).parent


def notebook(page: str) -> str:
    """Return the notebook of a page; code cells are its python and bash blocks."""
    cells = []
    for index, part in enumerate(re.split(r"^(```(?:python|bash)\n.*?^```)\n", page, flags=re.DOTALL | re.MULTILINE)):
        block = re.fullmatch(r"```(python|bash)\n(.*)\n```", part, re.DOTALL)
        if block:
            source = block[2] if block[1] == "python" else re.sub(r"^", "!", block[2], flags=re.MULTILINE)
            more = {"cell_type": "code", "execution_count": None, "outputs": []}
        else:
            source, more = part.strip(), {"cell_type": "markdown"}
        if source:
            cells.append({"id": f"cell{index}", "metadata": {}, "source": source.splitlines(keepends=True), **more})
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    whole = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(whole, indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    (HERE / "tutorial.ipynb").write_text(notebook((HERE / "tutorial.md").read_text()))
