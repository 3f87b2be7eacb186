"""Model making: corpora, training, distillation, quantization and certification of bundles."""
