"""Sizes of the small models that other packages build and cut in the nightly tests."""

WORLD, LAYERS, VOCAB, HIDDEN = 2, 2, 64, 32
#: What models of transformers' kind are built with.
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 64,
}
