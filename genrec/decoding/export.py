"""How does a server that knows nothing of genrec keep to the catalogue?

Writes the tree as tokens of the model's vocabulary, in a folder of JSON and safetensors which
twenty lines in any language can walk (docs/decoding.md describes the layout; its reader in the
tests needs numpy and safetensors only). It knows no network and does no search.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from genrec.artifacts import Artifact, pack_strings, save_artifact
from genrec.decoding.csr import CSRIndex
from genrec.item_index import END, ItemIndex

KIND = "catalogue_constraint"
LAYOUT_VERSION = 1


def export_constraint(
    path: str | Path,
    index: ItemIndex,
    *,
    first_token: int,
    upstream: Mapping[str, str] | None = None,
) -> Artifact:
    """Write the catalogue's tree for other servers.

    Args:
        path: folder to create or replace: `manifest.json` and `arrays.safetensors`.
        index: the catalogue.
        first_token: token of code 0 of level 0 in the model's vocabulary (for backbones,
            `genrec.models.base.FIRST_TOKEN`).
        upstream: fingerprints to record beside the index's own.
    """
    constraint = CSRIndex.from_index(index)
    arrays = {"rows": constraint.rows_N.numpy()}
    for number, level in enumerate(constraint.levels):
        offset = first_token + int(index.level_offsets[number])
        arrays[f"level.{number}.pointers"] = level.pointers.numpy()
        arrays[f"level.{number}.tokens"] = level.codes.numpy().astype(np.int32) + offset
    arrays["item_ids.bytes"], arrays["item_ids.offsets"] = pack_strings(index.item_ids)
    facts = {
        "layout_version": LAYOUT_VERSION,
        "num_items": len(index),
        "num_levels": index.num_levels,
        "first_token": first_token,
        "num_tokens": index.num_tokens,
        "level_offsets": index.level_offsets.tolist(),
        "codebook_sizes": list(index.codebook_sizes),
        "shared_vocabulary": index.shared_vocabulary,
        "end_token": first_token + END if index.shared_vocabulary else None,
    }
    upstream = {"index": index.fingerprint, **(upstream or {})}
    return save_artifact(path, kind=KIND, arrays=arrays, upstream=upstream, extra=facts)
