"""How far apart the nodes' adapters are: norms and cosines of their updates of the backbone, B A, over all modules.

<B1 A1, B2 A2> = sum of (B1' B2) * (A1 A2'), so that no matrix larger than rank x rank is built.
"""

import math
from itertools import combinations
from typing import Any

from neuromas.model.adapters import AdapterBank


def distances(bank: AdapterBank) -> dict[str, Any]:
    """Return the norm of each adapter's update, and cosine and distance of each pair; a cosine with a zero update is None."""
    products = {(a, b): _inner(bank, a, b) for a in bank.nodes for b in bank.nodes if a <= b}
    norms = {node: math.sqrt(products[node, node]) for node in bank.nodes}
    pairs = []
    for a, b in combinations(sorted(bank.nodes), 2):
        product, both = products[a, b], norms[a] * norms[b]
        distance = math.sqrt(max(0.0, products[a, a] + products[b, b] - 2 * product))
        cosine = max(-1.0, min(1.0, product / both)) if both else None
        pairs.append({"nodes": [a, b], "cosine": cosine, "distance": distance})
    return {"norms": {str(node): norm for node, norm in norms.items()}, "pairs": pairs}


def _inner(bank: AdapterBank, first: int, second: int) -> float:
    """Return the inner product of two nodes' updates, scaled by alpha / rank, summed over modules."""
    total = 0.0
    for (a1, b1), (a2, b2) in zip(bank.factors(first), bank.factors(second), strict=True):
        a1, b1, a2, b2 = (tensor.double() for tensor in (a1, b1, a2, b2))
        total += float(((b1.T @ b2) * (a1 @ a2.T)).sum())
    return bank.state.scaling**2 * total
