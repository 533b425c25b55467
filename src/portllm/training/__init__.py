"""LoRA fine-tuning, distillation, and updates of a base."""
