"""Item tokenizers: from item vectors to codes, and from codes with collisions to unique ones.

The two tables are all that YAML, the command line, the contract tests and the artifacts know. A new
tokenizer is one file, one line here and one file in `configs/tokenizer/` (docs/add-a-tokenizer.md).
"""

TOKENIZERS = {
    "rqkmeans": "genrec.tokenizers.rqkmeans:RQKMeans",
    "rqvae": "genrec.tokenizers.rqvae:RQVAE",
}

COLLISIONS = {
    "extra_level": "genrec.tokenizers.collisions:extra_level",
    "assign_last": "genrec.tokenizers.collisions:assign_last",
    "forbid": "genrec.tokenizers.collisions:forbid",
}

__all__ = ["COLLISIONS", "TOKENIZERS"]
