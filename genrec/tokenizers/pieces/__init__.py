"""Sets of features that grow into tokens: the vocabulary of ActionPiece."""
