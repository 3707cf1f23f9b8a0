"""From raw files to a checked dataset folder: sources, preparation, splits, examples, doctor."""

from genrec.data.catalog import Catalog
from genrec.data.dataset import Dataset
from genrec.data.interactions import TEST, TRAIN, VALID, Examples, Interactions

SOURCES = {
    "amazon": "genrec.data.amazon:Amazon",
    "movielens": "genrec.data.movielens:MovieLens",
    "recbole": "genrec.data.recbole:RecBole",
    "sequences": "genrec.data.sequences:Sequences",
    "tabular": "genrec.data.tabular:Tabular",
}

__all__ = ["SOURCES", "TEST", "TRAIN", "VALID", "Catalog", "Dataset", "Examples", "Interactions"]
