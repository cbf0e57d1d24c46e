"""What goes beside an exported model: manifest, results, card, a forest as JSON, public directions.

Source: the safetensors format; ``common.results``. Rules: made from the state and the manifest alone, so that
the same study always gives the same files.
"""

import json
from typing import Any

import numpy as np
from safetensors.numpy import save

from common.admissible import Admitted, check
from common.methods import KernelSvm
from common.results import card, forest_json, results
from common.study import Manifest
from common.tasks.models.projection import projection
from common.tasks.state import State, load_state


def documents(manifest: Manifest, state_bytes: bytes, cohort: int) -> dict[str, bytes]:
    """The files beside a state, by suffix."""
    admitted, state = _read(manifest, state_bytes)
    found = results(manifest, admitted, state, cohort)
    made = {
        "manifest.json": manifest.to_bytes(),
        "card.md": card(manifest, admitted, found, cohort).encode(),
    }
    if found:
        made["results.json"] = (json.dumps(found, indent=1) + "\n").encode()
    text = forest_json(manifest, admitted, state, cohort)
    if text:
        made["forest.json"] = text.encode()
    model = manifest.study.model
    if isinstance(model, KernelSvm):
        directions, phases = projection(model, manifest.study.contract)
        public = {"directions": np.ascontiguousarray(directions), "phases": np.ascontiguousarray(phases)}
        made["public.safetensors"] = save(public)
    return made


def shown(manifest: Manifest, state_bytes: bytes, cohort: int) -> tuple[str, dict[str, Any]]:
    """What a state says, as text and as JSON."""
    admitted, state = _read(manifest, state_bytes)
    found = results(manifest, admitted, state, cohort)
    if not found:
        return "this study has no evaluation and no statistics", {}
    return card(manifest, admitted, found, cohort), found


def _read(manifest: Manifest, state_bytes: bytes) -> tuple[Admitted, State]:
    admitted = check(manifest, None)
    bound = manifest.study.aggregation.state_norm_bound
    return admitted, load_state(state_bytes, admitted.layout, bound)
