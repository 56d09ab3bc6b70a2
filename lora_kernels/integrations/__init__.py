"""What other trainers ask for by name. transformers and TRL need nothing here: `patch_peft`."""
