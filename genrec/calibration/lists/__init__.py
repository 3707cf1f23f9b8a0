"""Re-ranking of finished lists: trade score for calibration, rarity, variety or fair exposure.

Exact rules about lists (quotas, shares, spacing) are in `genrec.decoding.lists`; here are the soft
ones, each with a strength of which 0 changes nothing (docs/list-layer.md).
"""

RERANKERS = {
    "steck": "genrec.calibration.lists.steck:Steck",
    "popularity": "genrec.calibration.lists.popularity:PopularityPenalty",
    "long_tail": "genrec.calibration.lists.popularity:LongTail",
    "mmr": "genrec.calibration.lists.diversity:MMR",
    "xquad": "genrec.calibration.lists.diversity:XQuAD",
    "exposure": "genrec.calibration.lists.exposure:Exposure",
}
