"""Folders that stock transformers opens: codes as compressed-tensors packs them, adapters as PEFT names them."""
