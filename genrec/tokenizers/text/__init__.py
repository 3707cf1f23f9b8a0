"""From an item's words to codes: cleaned texts, sub-words, salient words, generated phrases."""
