"""A weight: which rows of ``W`` become ``A_i``, their scales, a router's start, a fingerprint. No layer, no PEFT."""
