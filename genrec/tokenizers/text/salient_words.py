"""Which few words of an item's own text tell it from the others: TF-IDF, without any model.

What a generator of textual ids is trained to say when no pretrained one is at hand.

Shapes: N texts, T terms.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.feature_extraction.text import TfidfVectorizer

TOKEN_PATTERN = r"(?u)\b\w+\b"


def salient_phrases(texts: Sequence[str], num_words: int) -> list[str]:
    """Return a phrase of at most `num_words` words of each text, the most common word first.

    Words are ranked by TF-IDF (sub-linear counts) within three classes: words that at least two and
    at most half of the texts have, then words of one text only (they tell items apart but say
    nothing that another item shares), then words of more than half of the texts. The chosen words
    stand in the order of how many texts have them, so that phrases go from coarse to fine. A text
    without words is its own phrase.
    """
    vectorizer = TfidfVectorizer(token_pattern=TOKEN_PATTERN, sublinear_tf=True, norm=None)
    try:
        weights = vectorizer.fit_transform(texts).tocsr()
    except ValueError:  # no word in any text
        return list(texts)
    words = vectorizer.get_feature_names_out()
    having_T = np.bincount(weights.indices, minlength=len(words))
    class_T = np.where(having_T > max(1, len(texts) / 2), 2, np.where(having_T < 2, 1, 0))
    phrases = []
    for row, text in enumerate(texts):
        span = slice(weights.indptr[row], weights.indptr[row + 1])
        terms, values = weights.indices[span], weights.data[span]
        # Terms are numbered in alphabetical order: the last key settles ties.
        best = terms[np.lexsort((terms, -values.round(9), class_T[terms]))][:num_words]
        ordered = best[np.lexsort((best, -having_T[best]))]
        phrases.append(" ".join(words[ordered]) or text)
    return phrases
