"""heal: attention distillation layer by layer, then LoRA distillation of the model."""
