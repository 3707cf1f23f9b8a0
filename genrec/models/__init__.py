"""Which backbones a config can name. Importing this module imports no torch."""

BACKBONES = {
    "encoder_decoder": "genrec.models.encoder_decoder:EncoderDecoder",
    "decoder_only": "genrec.models.decoder_only:DecoderOnly",
    "ensemble": "genrec.models.ensemble:Ensemble",
    "hierarchical": "genrec.models.hierarchical:Hierarchical",
    "parallel": "genrec.models.parallel:Parallel",
    "pretrained_causal": "genrec.models.pretrained_causal:PretrainedCausal",
    "pretrained_seq2seq": "genrec.models.pretrained_seq2seq:PretrainedSeq2Seq",
}
"""Name in YAML -> "module:Class"."""
