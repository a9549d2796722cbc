"""Mechanics that know nothing of bilevel problems: pure functions of Keras code, tapes, nests of tensors."""
