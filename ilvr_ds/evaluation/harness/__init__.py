"""Our models inside the field's evaluation harnesses, with their latents: lmms-eval and VLMEvalKit."""
