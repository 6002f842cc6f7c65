"""An adapted model: PEFT's tuner for ID-LoRA. Walks models, computes no product."""
