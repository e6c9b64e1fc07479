"""Branching trees of vessels and bronchi."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Tree:
    """A branching tree of round segments that taper away from the root.

    Attributes:
        starts, ends: (segments, xyz) end points in mm.
        start_radii, end_radii: (segments,) radii in mm.
    """

    starts: np.ndarray
    ends: np.ndarray
    start_radii: np.ndarray
    end_radii: np.ndarray


def grow_tree(
    root_xyz: np.ndarray,
    targets_xyz: np.ndarray,
    rng: np.random.Generator,
    *,
    tip_radius_mm: float,
) -> Tree:
    """Grows a tree from `root_xyz` that reaches every target.

    Targets are connected in order of their distance from the root, each to the node
    that keeps both the new segment and the path short (Wu and Bullmore's balance of
    wiring and path length). Radii follow Murray's law with the exponent 2.7 measured in
    the lung.
    """
    order = np.argsort(np.linalg.norm(targets_xyz - root_xyz, axis=1))
    nodes = np.vstack([root_xyz, targets_xyz[order]])
    parents = np.zeros(len(nodes), int)
    paths = np.zeros(len(nodes))
    for node in range(1, len(nodes)):
        steps = np.linalg.norm(nodes[:node] - nodes[node], axis=1)
        parents[node] = np.argmin(steps + 0.25 * paths[:node])
        paths[node] = paths[parents[node]] + steps[parents[node]]
    nodes = _relaxed(nodes, parents)
    flow = np.ones(len(nodes))
    for node in range(len(nodes) - 1, 0, -1):
        flow[parents[node]] += flow[node]
    radii = tip_radius_mm * flow ** (1 / 2.7)
    return _bent(nodes, parents, radii, rng)


def _relaxed(nodes: np.ndarray, parents: np.ndarray) -> np.ndarray:
    """Moves every fork towards the middle of its neighbours; root and tips stay."""
    children = np.bincount(parents[1:], minlength=len(nodes))
    inner = children > 0
    inner[0] = False
    for _ in range(4):
        total = np.zeros_like(nodes)
        np.add.at(total, parents[1:], nodes[1:])
        mean_child = total[inner] / children[inner, None]
        middle = (nodes[parents[inner]] + mean_child) / 2
        nodes = nodes.copy()
        nodes[inner] = 0.5 * nodes[inner] + 0.5 * middle
    return nodes


def _bent(nodes, parents, radii, rng) -> Tree:
    """Splits each branch into two segments that meet off its straight line."""
    start, end = nodes[parents[1:]], nodes[1:]
    length = np.linalg.norm(end - start, axis=1, keepdims=True)
    middle = (start + end) / 2 + 0.07 * length * rng.standard_normal(start.shape)
    r_end = radii[1:]
    r_start = np.minimum(radii[parents[1:]], 1.15 * r_end)
    r_middle = (r_start + r_end) / 2
    return Tree(
        np.vstack([start, middle]),
        np.vstack([middle, end]),
        np.concatenate([r_start, r_middle]),
        np.concatenate([r_middle, r_end]),
    )
