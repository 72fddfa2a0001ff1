"""Keep the words that a corpus uses: a smaller vocabulary, for a tokenizer and its model, with the same tokens."""
