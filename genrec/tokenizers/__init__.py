"""Item tokenizers: from item vectors to codes, and from codes with collisions to unique ones.

The tables are all that YAML, the command line, the contract tests and the artifacts know. A new
tokenizer is one file, one line here and one file in `configs/tokenizer/` (docs/add-a-tokenizer.md).
"""

TOKENIZERS = {
    "action_piece": "genrec.tokenizers.action_piece:ActionPiece",
    "collaborative": "genrec.tokenizers.spectral:Collaborative",
    "hybrid": "genrec.tokenizers.hybrid:Hybrid",
    "independent": "genrec.tokenizers.atomic:Independent",
    "letter": "genrec.tokenizers.letter:LETTER",
    "multi_facet": "genrec.tokenizers.multi_facet:MultiFacet",
    "opq": "genrec.tokenizers.pq:OPQ",
    "pq": "genrec.tokenizers.pq:PQ",
    "random": "genrec.tokenizers.atomic:Random",
    "rqkmeans": "genrec.tokenizers.rqkmeans:RQKMeans",
    "rqvae": "genrec.tokenizers.rqvae:RQVAE",
    "semantic_category": "genrec.tokenizers.category:SemanticCategory",
    "sequential": "genrec.tokenizers.atomic:Sequential",
    "textual": "genrec.tokenizers.textual:Textual",
    "title": "genrec.tokenizers.title:Title",
}

COLLISIONS = {
    "extra_level": "genrec.tokenizers.collisions.numbering:extra_level",
    "assign_last": "genrec.tokenizers.collisions.last_codes:assign_last",
    "sinkhorn": "genrec.tokenizers.collisions.last_codes:sinkhorn",
    "nearest_free": "genrec.tokenizers.collisions.last_codes:nearest_free",
    "first_unused": "genrec.tokenizers.collisions.candidates:first_unused",
    "forbid": "genrec.tokenizers.collisions.numbering:forbid",
}

# The same names where all levels draw from one vocabulary.
SHARED_COLLISIONS = {
    "extra_level": "genrec.tokenizers.collisions.numbering:suffix",
    "first_unused": "genrec.tokenizers.collisions.candidates:first_unused",
    "forbid": "genrec.tokenizers.collisions.numbering:forbid",
}

__all__ = ["COLLISIONS", "SHARED_COLLISIONS", "TOKENIZERS"]
