"""Item vectors: from the texts of a catalogue (or a file) to one float32 vector per item.

Adding an extractor: one file here, one line in the table.
"""

FEATURES = {
    "auto": "genrec.features.auto:Auto",
    "lsa": "genrec.features.text:LSA",
    "sentence_encoder": "genrec.features.sentence_encoder:SentenceEncoder",
    "file": "genrec.features.file:VectorFile",
    "collaborative": "genrec.features.collaborative:Collaborative",
    "hf_encoder": "genrec.features.hf_encoder:HFEncoder",
    "image": "genrec.features.image:Image",
    "fusion": "genrec.features.fusion:Fusion",
}

__all__ = ["FEATURES"]
